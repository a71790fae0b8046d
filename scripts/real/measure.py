#!/usr/bin/env python3
"""Measure how SWAA's strategies change the accuracy and speed of a real model. Write docs/results-real.md.

scripts/real/measure.py --plan     # prints the plan and its expected time
scripts/real/measure.py --quick    # measures for about a minute; prints a table and writes no file
scripts/real/measure.py            # measures for hours; writes docs/results/real.json (after Ctrl-C: what is complete)
scripts/real/measure.py --train    # trains the LoRA adapters, for about an hour; the next run measures them
scripts/real/measure.py --write    # writes docs/results-real.md from docs/results/real.json
scripts/real/measure.py --check    # fails if docs/results-real.md is stale

The model is SmolLM2-135M-Instruct; fetch it first with scripts/real/fetch.py. The texts come from this machine
(corpus.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "scripts")]  # where swaa_edge and this package lie

from real.page import page
from swaa_edge.errors import SwaaError
from swaa_edge.support.atomic import atomic_output

DATA = ROOT / "docs" / "results" / "real.json"
PAGE = ROOT / "docs" / "results-real.md"


def show_plan(threads: int) -> None:
    from real.run import plan_table

    print(plan_table(threads))


def quick(threads: int) -> None:
    from real.page import quick_table
    from real.run import measure_quick

    print(quick_table(measure_quick(threads)))


def measure(threads: int) -> int:
    from real.run import measure_all

    before = _committed() if DATA.is_file() else None
    document = measure_all(threads, before)
    if not document["complete"]:
        print("interrupted; the same command without options continues", file=sys.stderr)
    if _worse(document, before):
        print(f"{DATA.relative_to(ROOT)} has more rows, and is unchanged", file=sys.stderr)
    else:
        with atomic_output(DATA, force=True) as file:
            file.write_text(dumped(document), encoding="utf-8")
        print(f"{DATA.relative_to(ROOT)} written; next: {Path(sys.argv[0]).name} --write", file=sys.stderr)
    return 0 if document["complete"] else 130


def _worse(document: dict, before: dict | None) -> bool:
    """Return whether an interrupted run has nothing to write, or fewer rows than the results of an earlier run."""
    return not document["complete"] and len(document["rows"]) < max(len(before["rows"]) if before else 0, 1)


def train(threads: int) -> None:
    from real.corpus import corpus
    from real.fetch import real_model
    from real.lora import train

    train(real_model(), corpus(), threads)


def dumped(document: dict) -> str:
    """Return the document as JSON. Each element of a top-level list is one line, so that diffs are readable."""
    lines = []
    for key, value in document.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _committed() -> dict:
    return json.loads(DATA.read_text(encoding="utf-8"))


def write(threads: int) -> None:
    PAGE.write_text(page(_committed()), encoding="utf-8")


def check(threads: int = 0) -> None:
    """Exit with an error if docs/results-real.md is stale."""
    if PAGE.read_text(encoding="utf-8") != page(_committed()):
        sys.exit("docs/results-real.md is stale: scripts/real/measure.py --write")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    for name, function in (("plan", show_plan), ("quick", quick), ("train", train), ("write", write), ("check", check)):
        action.add_argument(f"--{name}", dest="action", action="store_const", const=function, default=measure)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), metavar="N", help="CPU threads (default: all cores)"
    )
    given = parser.parse_args(arguments)
    try:
        return given.action(given.threads) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (SwaaError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
