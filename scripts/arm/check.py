#!/usr/bin/env python3
"""Build the CPU attention kernels for 64-bit Arm, run the op tests under qemu, and report which instructions ran.

The check needs no Arm machine, but CMake and Debian's packages g++-aarch64-linux-gnu and qemu-user. The current
patches/ are built in a separate source tree. Every case compares our kernels with upstream's reference.

The check fails in these cases:

- A case fails, or no case runs.
- Upstream's kernels compute an op.
- A vector instruction in our kernels never runs.

    scripts/arm/check.py                           # block tables, and a selection of upstream's cases
    scripts/arm/check.py --march all               # armv8-a, with fp16 and dotprod, with bf16 and i8mm
    scripts/arm/check.py --filter 'hs=64,.*nb=1,'  # only cases whose parameters match

The exit code is 0 if all checks passed, 1 if a check failed, and 2 if a program is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # scripts/, where this package lies

from gpu.packing import commit
from gpu.runner import CheckError
from patches_lib.patchfile import PatchError
from patches_lib.workspace import Workspace, fetch, mirror, walk, wanted

from arm import tools
from arm.program import BLOCKS, PLAIN, SELECTION, Program, count
from arm.tools import MissingTools

ROOT = Path(__file__).resolve().parents[2]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    march = f"instruction sets, or all: {', '.join(tools.LEVELS)} (default: {tools.DEFAULT_LEVEL})"
    cores, add = os.cpu_count() or 1, parser.add_argument
    add("--march", nargs="+", default=[tools.DEFAULT_LEVEL], metavar="ARCH", help=march)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--filter", metavar="REGEX", help="run only cases whose parameters match REGEX")
    either.add_argument("--all", action="store_true", help="run all of upstream's cases, which takes hours under qemu")
    add("--threads", type=int, default=2, metavar="N", help="threads per op (default: 2)")
    jobs = "compilers, then op tests, in parallel (default: one per core)"
    add("--jobs", type=int, default=cores, metavar="N", help=jobs)
    work = "folder for sources and builds (default: build/arm)"
    add("--work", type=Path, default=ROOT / "build" / "arm", metavar="DIR", help=work)
    add("--json", type=Path, metavar="FILE", help="also write the result to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.threads < 1 or given.jobs < 1:
        parser.error("--threads and --jobs must be at least 1")
    try:
        document = check(given, tools.find())
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(document, indent=2) + "\n")
    except (CheckError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, MissingTools) else 1
    except KeyboardInterrupt:
        print("Error: interrupted", file=sys.stderr)
        return 130
    print("\n".join(show(document)))
    for line in document["problems"]:
        print(f"error: {line}", file=sys.stderr)
    return 1 if document["problems"] else 0


def check(given: argparse.Namespace, found: tools.Tools) -> dict[str, Any]:
    """Build, run and judge the tests for every -march in `given`. Return the document for `--json`."""
    work = given.work.resolve()
    facts = commit(ROOT, "patches")
    export(ROOT, work / "tree")
    programs = []
    for march in dict.fromkeys(march for word in given.march for march in (tools.LEVELS if word == "all" else (word,))):
        say(f"building for {march}")
        began = time.monotonic()
        program = Program(found, work / "tree", work / march, march)
        program.build(given.jobs)
        programs.append((program, time.monotonic() - began))
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {
            (program.march, op): pool.submit(run_op, program, op, params, given.threads)
            for op, params in selection(given.filter, given.all).items()
            for program, _ in programs
        }
        done = {key: run.result() for key, run in runs.items()}
    levels = []
    for program, seconds in programs:
        ops = [result for (march, _), result in done.items() if march == program.march]
        ran = set[int]().union(*(result.pop("addresses") for result in ops))
        level = {"march": program.march, "cpu": tools.processor(program.march), "vector": program.vector()}
        level |= {"build_seconds": round(seconds, 1), "ops": ops, "kernels": count(program.code(), ran)}
        levels.append(level)
    problems = [line for level in levels for line in judge(level, filtered=bool(given.filter))]
    return facts | {"threads": given.threads, "levels": levels, "problems": problems}


def needed(path: str) -> bool:
    """Return whether ggml's CPU library or test-backend-ops needs this file of a llama.cpp tree."""
    in_ggml_src = path.startswith("ggml/src/") and path.count("/") == 2
    ours = path.startswith("tests/test-kv-") and path.endswith(".h")
    single = path in ("LICENSE", "ggml/CMakeLists.txt", "tests/test-backend-ops.cpp")
    return path.startswith(("ggml/cmake/", "ggml/include/", "ggml/src/ggml-cpu/")) or in_ggml_src or ours or single


def export(root: Path, tree: Path) -> None:
    """Write the patched sources of ggml and the op tests to the folder `tree`.

    Edits that were made only in vendor/llama.cpp-patched are not included. Raises `CheckError` if upstream can't be
    fetched or a patch does not apply.
    """
    cache = os.environ.get("SWAA_EDGE_CACHE")
    try:
        workspace = Workspace(root, Path(cache).resolve() if cache else None)
        with workspace.lock():
            fetch(workspace)
            patched = wanted(workspace)
            files = {name: path.read_bytes() for name, path in walk(workspace.pristine).items() if needed(name)}
    except (PatchError, OSError) as error:
        raise CheckError(f"cannot make the patched tree: {' '.join(str(error).split())}") from None
    files |= {name: data for name, data in patched.items() if needed(name)}
    mirror(files, tree)


def selection(regex: str | None, everything: bool) -> dict[str, str | None]:
    """Return {op: regular expression for the cases' parameters}, slowest op first. None selects all cases."""
    return {BLOCKS: regex, PLAIN: regex or (None if everything else SELECTION)}


def run_op(program: Program, op: str, params: str | None, threads: int) -> dict[str, Any]:
    result = program.run_op(op, params, threads)
    say(f"{program.march} {op}: {counted(result)}")
    return result


def judge(level: Mapping[str, Any], filtered: bool) -> list[str]:
    """Return one line per failed check of one -march.

    filtered: whether only some cases ran. Then fmla is the only vector instruction that must run.
    """
    march, wrong = level["march"], []
    if level["vector"] != "neon":
        wrong.append(f"{march}: the kernels were compiled for {level['vector'] or 'no vector'}, not neon")
    for run in level["ops"]:
        name = f"{march} {run['op']}"
        wrong += [f"{name}: {line}" for line in run["failures"]]
        if run["passed"] != run["total"] or run["exit_code"]:
            wrong.append(f"{name}: {run['passed']} of {run['total']} passed, exit code {run['exit_code']}")
        if run["total"] == 0 and not filtered:
            wrong.append(f"{name}: no case was run")
        if run["ours"] is None:
            wrong.append(f"{name}: ended before reporting how many ops our kernels computed")
        elif run["ours"] != run["ops"] or (run["total"] and not run["ours"]):
            wrong.append(f"{name}: our kernels computed {run['ours']} of {run['ops']} ops")
    if not sum(run["total"] for run in level["ops"]) and filtered:
        wrong.append(f"{march}: no case matches the filter")
    multiplied = sum(row["notable"].get("fmla", (0, 0))[1] for row in level["kernels"].values())
    if not multiplied:
        wrong.append(f"{march}: no vector multiply-add (fmla) of our kernels ran")
    elif not filtered:
        for source, row in level["kernels"].items():
            wrong += [f"{march}: no {name} of {source} ran" for name, (_, ran) in row["notable"].items() if not ran]
    return wrong


def show(document: Mapping[str, Any]) -> list[str]:
    """The lines of the report."""
    edits = " with uncommitted edits of patches/" if document["uncommitted"] else ""
    lines = [f"commit {document['commit'] or 'unknown'}{edits}, {document['threads']} threads per op"]
    for level in document["levels"]:
        where, seconds = f"{level['march']} on qemu's {level['cpu']}", f"{level['build_seconds']:.0f} s"
        lines += ["", f"{where}: vector {level['vector']}, built in {seconds}"]
        lines += [f"  {run['op']}: {counted(run)}" for run in level["ops"]]
        for source, row in level["kernels"].items():
            notable = ", ".join(f"{name} {ran} of {there}" for name, (there, ran) in sorted(row["notable"].items()))
            some = f"  {source}: {row['ran']} of {row['instructions']} instructions ran"
            lines.append(f"{some}; {notable}" if notable else some)
    return lines


def counted(run: Mapping[str, Any]) -> str:
    failed = run["total"] - run["passed"]
    ours = "ops not counted" if run["ours"] is None else f"ours {run['ours']} of {run['ops']} ops"
    return (
        f"{run['passed']} OK, {failed} failed, {run['unsupported']} not supported; {ours} on "
        f"{run['threads'] or 0} threads; {run['seconds'] / 60:.1f} min"
    )


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
