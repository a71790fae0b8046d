#!/usr/bin/env python3
"""Fetch the pinned llama.cpp, apply our patch series to it, write edits back to the series, and verify it.

Our C/C++ code is in whole files (patches/src/). The patches contain only call sites. The commands keep the built source
tree consistent with these files and patches. CMake runs this script before anything is installed, so the script uses
only the standard library. The commands refresh and check also need git. patches/README.md explains the workflow.

    scripts/patches.py apply      # fetches what is missing, makes or updates vendor/llama.cpp-patched
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from patches_lib.check import check
from patches_lib.move import against, drop, onto
from patches_lib.patchfile import PatchError, make_header
from patches_lib.refresh import refresh
from patches_lib.workspace import Workspace, apply, fetch

ROOT = Path(__file__).resolve().parent.parent
FETCH = """Download the sdist that patches/UPSTREAM pins, check its sha256, unpack its llama.cpp into vendor/llama.cpp.
Does nothing if this folder exists. The sdist is kept in vendor/, or in the folder that SWAA_EDGE_CACHE names."""
APPLY = """Make vendor/llama.cpp-patched from upstream's tree, patches/src/ and every patch in patches/series. Each hunk
must fit exactly at its line. Writes only files that change. Refuses to overwrite edits that are not in patches/."""
REFRESH = """Write edits made in vendor/llama.cpp-patched back to patches/. Our own files go to patches/src/. An edit of
an upstream file goes into the only patch that changes this file, or into the patch that --into or --new names."""
CHECK = """Verify that every patch has its header, fits without fuzz or offset and re-exports byte-identically, that
patches/series and the folder agree, and that our files describe themselves and are compiled. Changes nothing."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    root = "checkout to work on (default: the checkout that holds this script)"
    parser.add_argument("--root", type=Path, default=ROOT, help=root)
    commands = parser.add_subparsers(dest="command", required=True, metavar="fetch|apply|refresh|check")
    commands.add_parser("fetch", help="unpack the pinned upstream release", description=FETCH)

    add = commands.add_parser("apply", help="make the patched tree", description=APPLY)
    either = add.add_mutually_exclusive_group()
    either.add_argument("--discard", action="store_true", help="overwrite local edits of the patched tree")
    either.add_argument("--keep", action="store_true", help="leave locally edited files as they are")

    add = commands.add_parser("refresh", help="write edits of the patched tree to patches/", description=REFRESH)
    paths = "write back only the edits in this file, folder or line range (FILE:FIRST-LAST)"
    add.add_argument("paths", nargs="*", metavar="PATH", help=paths)
    either = add.add_mutually_exclusive_group()
    either.add_argument("--into", metavar="NAME", help="put the edits of upstream files into this patch")
    either.add_argument(
        "--new", metavar="NAME", help="put the edits into a new patch of this name, such as 0007-name.patch"
    )
    either.add_argument("--drop", metavar="NAME", help="only remove this patch and re-export the later ones")
    either.add_argument("--onto", metavar="VERSION", help="only move the series to this upstream release")
    for field in ("subject", "why", "goes-away-when"):
        add.add_argument(f"--{field}", default="", metavar="TEXT", help="text for this header field of the --new patch")

    add = commands.add_parser("check", help="verify the series", description=CHECK)
    add.add_argument("--against", metavar="VERSION", help="only report which patches apply to this release")
    return parser


def run(args: argparse.Namespace, ws: Workspace) -> tuple[str, int]:
    """Run the command in `args`. Return the text to print and the number of patches that failed."""
    if args.command == "fetch":
        return fetch(ws), 0
    if args.command == "apply":
        return apply(ws, args.discard, args.keep), 0
    if args.command == "check":
        return against(ws, args.against) if args.against else (check(ws), 0)
    if args.drop or args.onto:
        if args.paths:
            raise PatchError("--drop and --onto take no paths")
        return drop(ws, args.drop) if args.drop else onto(ws, args.onto), 0
    header = make_header(args.subject, args.why, args.goes_away_when) if args.new else b""
    return refresh(ws, args.into, args.new, header, args.paths), 0


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    cache = os.environ.get("SWAA_EDGE_CACHE")
    try:
        ws = Workspace(args.root.resolve(), Path(cache).resolve() if cache else None)
        with ws.lock():
            text, failed = run(args, ws)
            print(text)
            if failed:
                raise PatchError(f"{failed} patches do not apply to {args.against}")
        return 0
    except (PatchError, OSError) as error:
        for line in str(error).splitlines():
            print(f"Error: {line}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
