#!/usr/bin/env python3
"""Break the native code on purpose, one edit at a time, and check that a test fails.

A good test suite must fail if, for example, a window is off by one. Each mutation in mutations.txt is one edit of the
patched sources. The edit is made in a copy of the tree. The copy is built incrementally and tested with the oracle's
tests. A mutant survives if no test fails. Then a test is missing, or the edit has no visible effect and should be
removed from the list.

Run this script after changing the oracle's tests in tests/patches/. `make test` only checks that every mutation applies
to the sources (tests/scripts/test_mutate.py). `make test` also runs separate mutations of the CUDA and Metal kernels.

    scripts/mutate.py                       # all; about two minutes each
    scripts/mutate.py --only sinks --list
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu.building import run_logged, search_path
from gpu.runner import CheckError, execute
from patches_lib.workspace import mirror, walk

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "vendor" / "llama.cpp-patched"
TESTS = ["tests/patches/test_oracle.py", "tests/patches/test_semantics.py", "tests/patches/test_reuse.py"]
# The tests that run the engine. The other tests in these files pass with any mutant.
SELECTED = "test_grid or test_semantics or test_reuse"
TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Mutation:
    """An edit that replaces `old` by `new` in `file`. `old` must occur exactly once."""

    name: str
    file: str
    old: str
    new: str


def read_mutations(path: Path = ROOT / "scripts" / "mutations.txt") -> list[Mutation]:
    """Read a file in the format of scripts/mutations.txt.

    Raises ValueError with the line number if a mutation is incomplete.
    """
    found, part = [], []
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], start=1):
        if line.startswith("#"):
            continue
        if line.strip():
            part.append(line)
            continue
        if part:
            marks = ("", "  in ", "  -  ", "  +  ")
            if len(part) != len(marks) or not all(map(str.startswith, part, marks)):
                raise ValueError(f"{path}:{number}: expected a name, then lines that start with 'in', '-' and '+'")
            found.append(Mutation(*(line[len(mark) :] for line, mark in zip(part, marks, strict=True))))
            part = []
    return found


def stale(tree: Path, mutations: Sequence[Mutation]) -> list[str]:
    """Return one line of text per mutation that can't be applied to the tree."""
    problems = []
    for mutation in mutations:
        path = tree / mutation.file
        count = path.read_text(encoding="utf-8").count(mutation.old) if path.is_file() else None
        if count != 1:
            found = "is missing" if count is None else f"has it {count} times"
            problems.append(f"{mutation.name}: {mutation.file} {found}, expected once: {mutation.old!r}")
    return problems


class Lab:
    """A copy of the patched tree with its build folder, and the tests that run on this build."""

    def __init__(self, folder: Path, jobs: int, cases: int):
        self.tree, self.build, self.cases, self.jobs = folder / "llama.cpp", folder / "build", cases, jobs
        self.library, self.models = folder / "lib", folder / "models"

    def prepare(self) -> None:
        """Update the copy of the tree and configure the build."""
        shutil.rmtree(self.models, ignore_errors=True)
        self.models.mkdir(parents=True)
        mirror({name: path.read_bytes() for name, path in walk(TREE).items()}, self.tree)
        options = [f"-DSWAA_EDGE_TREE={self.tree}", f"-DPython_EXECUTABLE={sys.executable}"]
        self._cmake("-S", ROOT, "-B", self.build, *options)

    def make(self) -> None:
        """Build, and install the libraries into `library`. Raises `CheckError`."""
        self._cmake("--build", self.build, "--target", "swaa-edge-libraries", "-j", self.jobs)
        self._cmake("--install", self.build, "--prefix", self.library.parent, "--component", "swaa_edge")

    def _cmake(self, *words: object) -> None:
        environment = os.environ | {"PATH": search_path()}
        command = ["cmake", *map(str, words)]
        run_logged(" ".join(command[:2]), self.models.parent / "build.log", command, env=environment)

    def test(self) -> tuple[str, str]:
        """Run the tests. Return ("passed" or "failed", first failed test).

        Raises RuntimeError if the tests could not run.
        """
        environment = os.environ | {
            "SWAA_EDGE_LIB_PATH": str(self.library),
            "SWAA_GRID_CASES": str(self.cases),
            "SWAA_GRID_MODELS": str(self.models),
            "SWAA_REUSE_SCALE": "0.4",
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", SELECTED, *TESTS]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        code, output, _ = execute(command, TIMEOUT_SECONDS, cwd=ROOT, env=environment, **pipes)
        if code is None:
            return "failed", f"not finished within {TIMEOUT_SECONDS} s"
        failures = [line.split()[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        if code not in (0, 1) or (code == 1 and not failures):
            raise RuntimeError(f"pytest exited with code {code} without naming a failed test:\n{output[-2000:]}")
        return ("failed", failures[0]) if code else ("passed", "")


def try_mutation(lab: Lab, mutation: Mutation) -> dict:
    """Test one mutation.

    Returns a dict with "name", "outcome" (killed, survived or not built), "by" (failed test or build error) and
    "seconds".
    """
    path, start = lab.tree / mutation.file, time.monotonic()
    original = path.read_text(encoding="utf-8")
    try:
        path.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
        lab.make()
        result, test = lab.test()
        outcome = "killed" if result == "failed" else "survived"
    except CheckError as error:
        outcome, test = "not built", str(error)
    finally:
        path.write_text(original, encoding="utf-8")
    return {"name": mutation.name, "outcome": outcome, "by": test, "seconds": round(time.monotonic() - start)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 if every mutant was killed, and 1 otherwise. Wrong arguments exit with 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="try only mutations with TEXT in their name")
    parser.add_argument(
        "--list", action="store_true", help="only print the mutations and check that they apply to the tree"
    )
    parser.add_argument(
        "--cases", type=int, default=80, help="cases of the oracle's grid to test per mutant (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="compilers to run in parallel (default: one per core)"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "mutants", help="build folder, which is kept for the next run"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the outcomes to this file")
    options = parser.parse_args(arguments)

    chosen = [mutation for mutation in read_mutations() if options.only in mutation.name]
    if not chosen:
        parser.error(f"no mutation has {options.only!r} in its name; --list shows them")
    if not TREE.is_dir():
        parser.error(f"{TREE} is missing; run `make setup` first")
    problems = stale(TREE, chosen)
    for line in problems:
        print(line, file=sys.stderr)
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name:40s} {mutation.file}: {mutation.old} -> {mutation.new}")
    if problems or options.list:
        return int(bool(problems))

    lab = Lab(options.work.resolve(), options.jobs, options.cases)
    lab.prepare()
    lab.make()
    result, test = lab.test()
    if result == "failed":
        print(f"{test} fails without a mutation; fix that first", file=sys.stderr)
        return 1
    outcomes = []
    for mutation in chosen:
        outcomes.append(try_mutation(lab, mutation))
        print("{outcome:9s} {seconds:4d} s  {name:40s} {by}".format(**outcomes[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    killed = sum(outcome["outcome"] == "killed" for outcome in outcomes)
    print(f"{killed} of {len(outcomes)} mutants killed")
    return int(killed != len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
