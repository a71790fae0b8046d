#!/usr/bin/env python3
"""Check the patched llama.cpp on a GPU, and compare the speed of the patched and the unpatched library.

    python3 scripts/gpu/check.py pack                       # here: build/gpu-check.tar.gz, with the oracle's logits
    tar xf gpu-check.tar.gz && python3 gpu-check/scripts/gpu/check.py run --out results      # where the GPU is

The GPU machine needs Python 3.10 or newer with numpy, nvcc with cuBLAS, a C++ compiler and CMake, but no network. With
`pack --arch 90`, the libraries are built here. The GPU machine then needs only Python with numpy and CUDA's libraries.
A complete check takes two calls of about ten minutes on 16 cores. Each call continues where the previous call stopped.
In a checkout, `run` makes the archive first.

The exit code is 0 if all checks passed, 1 if a check failed, and 3 if the check is not finished. After exit code 3, run
the command again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # scripts/, where this package lies

from gpu import cases, oracle, packing, report
from gpu.building import Build
from gpu.runner import CheckError, Runner
from gpu.stages import SIDES, Stages

ROOT = Path(__file__).resolve().parents[2]
NOT_FINISHED = 3
# Modules of tests/support/ that the prepared logits depend on.
_SOURCES = ("oracle/oracle", "oracle/rule", "oracle/grid", "oracle/grid_models", "oracle/verdict", "models")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="pack|run")
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--jobs", type=int, default=os.cpu_count() or 1, help="number of compilers to run in parallel")
    add("--all-kernels", action="store_true", help="compile every kernel, which takes far longer")
    add("--cases", type=int, metavar="N", help="run only the first N end-to-end cases")

    pack = commands.add_parser("pack", parents=[shared], help="make the archive to carry to the GPU machine")
    add = pack.add_argument
    add("-o", "--output", type=Path, help="archive to write (default: build/gpu-check.tar.gz, or .tar.xz with --arch)")
    add("--with-cmake", action="store_true", help="add CMake and ninja to the archive as wheels (30 MB)")
    add("--arch", type=_arch, help="pack libraries built here for this compute capability, like 90, instead of sources")

    run = commands.add_parser("run", parents=[shared], help="build, check, measure and write the report")
    add = run.add_argument
    add("--work", type=Path, default=Path("gpu-check-work"), help="folder for builds and results")
    add("--out", type=Path, default=ROOT / "docs" / "gpu", help="folder for the report")
    add("--backend", choices=("cuda", "cpu"), default="cuda")
    add("--arch", type=_arch, help="build for this compute capability, like 90 (default: that of the GPU)")
    add("--seconds", type=float, default=570.0, help="time limit of this call (default: %(default)s)")
    add("--size", choices=("full", "tiny"), default="full", help="full, or tiny for a quick trial of the check itself")
    add("--only", metavar="NAME,...", help="run only stages whose names start with one of these: ops, oracle, off, ...")
    add = run.add_argument_group("built libraries, instead of building (all three)").add_argument
    add("--patched", type=Path, metavar="DIR")
    add("--baseline", type=Path, metavar="DIR")
    add("--op-tests", type=Path, metavar="FILE", help="the program test-backend-ops of the patched tree")
    return parser


def _arch(text: str) -> str:
    digits = text.replace(".", "", 1)
    if not (digits.isdecimal() and 2 <= len(digits) <= 3):
        raise argparse.ArgumentTypeError(f"{text} must be a compute capability, like 90 or 8.6")
    return digits


def main(arguments: Sequence[str] | None = None) -> int:
    given = make_parser().parse_args(arguments)
    try:
        if given.command == "pack":
            output = given.output or ROOT / "build" / f"gpu-check.tar.{'xz' if given.arch else 'gz'}"
            output.parent.mkdir(parents=True, exist_ok=True)
            make_pack(output, given)
            print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
            return 0
        if not (ROOT / "PACK.json").exists():
            return run_packed(given, sys.argv[1:] if arguments is None else arguments)
        return run(given, ROOT)
    except (CheckError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def make_pack(output: Path, given: argparse.Namespace) -> None:
    """Write the archive. If neither the oracle's cases nor its sources changed, the saved logits are reused."""
    lines, off = cases.CASES[: given.cases], cases.OFF_CASES[: given.cases]
    prepared = output.parent / "gpu-check-prepared"
    sources = [ROOT / "tests" / "support" / f"{name}.py" for name in _SOURCES]
    key = json.dumps([lines, off, *(path.read_text() for path in sources)])
    stamp = output.parent / "gpu-check-prepared.made-of"
    if not prepared.exists() or not stamp.exists() or stamp.read_text() != key:
        sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
        print("computing the oracle's logits", file=sys.stderr)
        oracle.prepare(prepared, lines, models_of=off)
        stamp.write_text(key)
    wheels = _cmake_wheels(output.parent / "gpu-check-wheels") if getattr(given, "with_cmake", False) else []
    arch = given.arch if given.command == "pack" else None
    built = _build_here(output.parent / "gpu-check-built", given) if arch else None
    packing.pack(output, prepared=prepared, wheels=wheels, all_kernels=given.all_kernels, built_for=arch, built=built)


def _build_here(folder: Path, given: argparse.Namespace) -> dict[str, Path]:
    """Build both libraries for any processor with AVX2. Return {side: folder}."""
    folder.mkdir(exist_ok=True)
    archive = folder / "sources.tar.gz"
    digest = packing.pack(archive, all_kernels=given.all_kernels)["digest"]
    # All files of an archive have the same time stamp, so each content gets its own folder.
    work = folder / digest[:12]
    for old in folder.iterdir():
        if old.is_dir() and old.name not in (work.name, "objects"):
            shutil.rmtree(old)
    with tarfile.open(archive) as opened:
        opened.extractall(work, filter="data")
    build = Build(work / packing.TOP, work, "cuda", given.arch, given.jobs, folder / "objects", native=False)
    for side in SIDES:
        print(f"building the {side} library for compute capability {given.arch}", file=sys.stderr)
        build.run(side)
    return {side: build.library(side) for side in SIDES}


def _cmake_wheels(folder: Path) -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    subprocess.run([*command, str(folder), "cmake", "ninja"], check=True)
    return sorted(folder.glob("*.whl"))


def run_packed(given: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Pack the checkout, unpack the archive into the work folder, and run the check there."""
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    archive = work / "gpu-check.tar.gz"
    make_pack(archive, given)
    with tarfile.open(archive) as opened:
        opened.extractall(work, filter="data")
    program = work / packing.TOP / "scripts" / "gpu" / "check.py"
    words = [*arguments, "--work", str(work), "--out", str(given.out.resolve())]
    return subprocess.run([sys.executable, str(program), *words], check=False).returncode


def run(given: argparse.Namespace, top: Path) -> int:
    """Run all stages from an unpacked archive and write the report. Return the exit code."""
    started = time.monotonic()
    pack = json.loads((top / "PACK.json").read_text())
    runner = Runner(given.work.resolve(), started + given.seconds)
    stages = Stages(given, top, pack, runner)
    results: dict[str, Any] = {}
    document = report.make_document(stages.facts(), results, runner.open)
    try:
        for name, result in stages:
            results[name] = result
            # The report is written after every stage. So an interrupted call leaves a report of the finished stages.
            document = report.make_document(stages.facts(), results, runner.open)
            report.write(document, given.out)
    except KeyboardInterrupt:
        runner.open["the rest"] = "interrupted"
    for path in report.write(document, given.out):
        print(path)
    found = report.problems(document)
    print("\n".join(found) if found else "all checks passed")
    for name, why in runner.open.items():
        print(f"not finished: {name}: {why}")
    return 1 if found else NOT_FINISHED if runner.open else 0


if __name__ == "__main__":
    sys.exit(main())
