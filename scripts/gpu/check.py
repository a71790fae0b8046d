#!/usr/bin/env python3
"""Check and measure the patched llama.cpp on a GPU, against the unpatched one: one file to carry, one command to run.

    python3 scripts/gpu/check.py pack                       # here: build/gpu-check.tar.gz, with the oracle's answers
    tar xf gpu-check.tar.gz && python3 gpu-check/scripts/gpu/check.py run --out results      # where the GPU is

There it needs Python 3.10 or newer with numpy, nvcc with cuBLAS, a C++ compiler and CMake, and no network; with
`pack --arch 90`, which builds here, of CUDA its libraries only. It takes two calls of ten minutes or so on 16 cores:
what one call did not get to, the next one does. In a checkout, `run` packs for itself. Exit code 0: all as it must be;
1: something is not; 3: not finished, call again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
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

from gpu import building, cases, measuring, operators, oracle, packing, report
from gpu.building import Build
from gpu.errors import CheckError, OutOfTime
from gpu.stages import Runner

ROOT = Path(__file__).resolve().parents[2]
NOT_FINISHED = 3
# test-backend-ops runs few cases without a GPU to compare, to show that they are run and read.
_TINY_PARAMS = r"^hs=64,.*(nb=1,|w=256)|hsk=64,hsv=64,nh=4,nr23=\[1,1\],kv=113,nb=1,mask=1,sinks=0"
# Table cases that a sanitizer gets through: each a hundred times slower than it is.
_SANITIZED = r"kv=4096,nb=(1|2|7|33|65|70|75|97),"
# Of tests/: what the oracle's answers depend on.
_SOURCES = ("oracle/oracle", "oracle/rule", "oracle/grid", "oracle/grid_models", "oracle/verdict", "models")
# These before the sanitizer: what the patches cost when they are not used, and the model of the published ratios.
_FIRST_PLANS = 6
_COMPILE_SECONDS, _OP_SECONDS = 60, 20
# Each of the sanitizer's tools gets so long: what it got through by then is the result.
_SANITIZER_SECONDS = 60


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="pack|run")

    add = commands.add_parser("pack", help="make the file that travels")
    add.add_argument("-o", "--output", type=Path, help="default: build/gpu-check.tar.gz, with --arch .tar.xz")
    add.add_argument("--with-cmake", action="store_true", help="carry CMake and ninja as wheels, some 30 MB")
    add.add_argument("--arch", type=_arch, help="build here, for this compute capability, like 90; carry no sources")
    add.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    pack_options(add)

    add = commands.add_parser("run", help="build, check, measure, report")
    add.add_argument("--work", type=Path, default=Path("gpu-check-work"), help="folder for builds and results so far")
    add.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu", help="folder for the report")
    add.add_argument("--backend", choices=("cuda", "cpu"), default="cuda")
    add.add_argument("--arch", type=_arch, help="build for this compute capability, like 90 (default: the card's)")
    add.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    add.add_argument("--seconds", type=float, default=570.0, help="begin nothing after so long (default: %(default)s)")
    add.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: show that it works")
    add.add_argument("--only", metavar="NAME,...", help="only stages of names that start so: ops, oracle, off, ...")
    group = add.add_argument_group("built libraries, instead of building (all three)")
    group.add_argument("--patched", type=Path, metavar="DIR")
    group.add_argument("--baseline", type=Path, metavar="DIR")
    group.add_argument("--op-tests", type=Path, metavar="FILE", help="test-backend-ops of the patched tree")
    pack_options(add)
    return parser


def _arch(text: str) -> str:
    digits = text.replace(".", "", 1)
    if not (digits.isdecimal() and 2 <= len(digits) <= 3):
        raise argparse.ArgumentTypeError(f"{text} must be a compute capability, like 90 or 8.6")
    return digits


def pack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all-kernels", action="store_true", help="leave no kernel out of the build; takes far longer")
    parser.add_argument("--cases", type=int, metavar="N", help="only the first N end-to-end cases")


def main(arguments: Sequence[str] | None = None) -> int:
    given = make_parser().parse_args(arguments)
    try:
        if given.command == "pack":
            given.output = given.output or ROOT / "build" / f"gpu-check.tar.{'xz' if given.arch else 'gz'}"
            given.output.parent.mkdir(parents=True, exist_ok=True)
            make_pack(given.output, given)
            print(f"{given.output}: {given.output.stat().st_size / 1e6:.1f} MB")
            return 0
        if not (ROOT / "PACK.json").exists():
            return run_packed(given, sys.argv[1:] if arguments is None else arguments)
        return run(given, ROOT)
    except (CheckError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def make_pack(output: Path, given: argparse.Namespace) -> None:
    """Prepare the oracle's answers, unless they are there for the same sources, and write the archive."""
    lines, off = cases.CASES[: given.cases], cases.OFF_CASES[: given.cases]
    prepared = output.parent / "gpu-check-prepared"
    sources = [ROOT / "tests" / "support" / f"{name}.py" for name in _SOURCES]
    key = json.dumps([lines, off, *(path.read_text() for path in sources)])
    stamp = output.parent / "gpu-check-prepared.made-of"
    if not prepared.exists() or not stamp.exists() or stamp.read_text() != key:
        sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
        print("preparing the oracle's answers", file=sys.stderr)
        oracle.prepare(prepared, lines, models_of=off)
        stamp.write_text(key)
    wheels = _cmake_wheels(output.parent / "gpu-check-wheels") if getattr(given, "with_cmake", False) else []
    built = _build_here(output.parent / "gpu-check-built", given) if given.command == "pack" and given.arch else None
    packing.pack(output, prepared=prepared, wheels=wheels, all_kernels=given.all_kernels, built=built)


def _build_here(folder: Path, given: argparse.Namespace) -> packing.Built:
    """Both sides, built from an archive of sources, for any processor with AVX2."""
    folder.mkdir(exist_ok=True)
    archive = folder / "sources.tar.gz"
    digest = packing.pack(archive, all_kernels=given.all_kernels)["digest"]
    # A folder for each content, since all files of an archive are of the same time; what is alike comes as objects.
    work = folder / digest[:12]
    for old in folder.iterdir():
        if old.is_dir() and old.name not in (work.name, "objects"):
            shutil.rmtree(old)
    with tarfile.open(archive) as opened:
        opened.extractall(work, filter="data")
    build = Build(work / packing.TOP, work, "cuda", given.arch, given.jobs, folder / "objects", native=False)
    for side in ("patched", "baseline"):
        print(f"building the {side} library for compute capability {given.arch}", file=sys.stderr)
        build.run(side)
    return packing.Built(given.arch, {side: build.library(side) for side in ("patched", "baseline")})


def _cmake_wheels(folder: Path) -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    subprocess.run([*command, str(folder), "cmake", "ninja"], check=True)
    return sorted(folder.glob("*.whl"))


def run_packed(given: argparse.Namespace, arguments: Sequence[str]) -> int:
    """In a checkout: pack, unpack into the work folder, and run from there, as on any other machine."""
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
    """All stages from an unpacked archive, and the report; the exit code."""
    started = time.monotonic()
    pack = json.loads((top / "PACK.json").read_text())
    runner = Runner(given.work.resolve(), started + given.seconds)
    check = Check(given, top, pack, runner)
    results: dict[str, Any] = {}
    try:
        for name, result in check.stages():
            results[name] = result
            # Whatever ends this call, what was had until then is on disk.
            report.write(report.make_document(check.facts(), results, runner.open), given.out)
    except KeyboardInterrupt:
        runner.open["the rest"] = "interrupted"
    document = report.make_document(check.facts(), results, runner.open)
    for path in report.write(document, given.out):
        print(path)
    found = report.problems(document)
    print("\n".join(found) if found else "all that was run is as it must be")
    for name, why in runner.open.items():
        print(f"not done: {name}: {why}")
    return 1 if found else NOT_FINISHED if runner.open else 0


class Check:
    """The stages of one call."""

    def __init__(self, given: argparse.Namespace, top: Path, pack: dict[str, Any], runner: Runner) -> None:
        self.given, self.top, self.pack, self.runner = given, top, pack, runner
        self.gpu = given.backend == "cuda"
        self.work = given.work.resolve()
        libraries = [given.patched, given.baseline, given.op_tests]
        if any(libraries) and not all(libraries):
            raise CheckError("--patched, --baseline and --op-tests go together")
        self.given_libraries, self.carried = all(libraries), pack["built_for"] is not None and not all(libraries)
        arch = given.arch if self.given_libraries or not self.gpu else given.arch or building.card_arch()
        if self.carried and self.gpu and arch != pack["built_for"]:
            raise CheckError(f"the archive's libraries are for compute capability {pack['built_for']}, not {arch}")
        # An archive of other content gets builds of its own; what both have in common is shared as objects.
        self.build = Build(top, self.work / pack["digest"][:12], given.backend, arch, given.jobs, self.work / "objects")
        if self.carried:
            sides = [top / packing.BUILT / side for side in ("patched", "baseline")]
            libraries = [*sides, sides[0] / "test-backend-ops"]
            libraries[2].chmod(0o755)
        elif not self.given_libraries:
            libraries = [self.build.library("patched"), self.build.library("baseline"), self.build.op_tests()]
        self.patched, self.unpatched, self.op_tests = libraries
        self.built = [_stamp(path) for path in libraries] if self.given_libraries else [pack["digest"], arch]
        # For this process and those that it starts: our package, the tests' engine, and what travelled along.
        places = [str(top), str(top / "tests"), str(top / "site")]
        sys.path[:0] = places
        os.environ["PYTHONPATH"] = os.pathsep.join([*places[::2], *filter(None, [os.environ.get("PYTHONPATH")])])
        if self.gpu:
            known = filter(None, [os.environ.get("LD_LIBRARY_PATH")])
            os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*known, *dict.fromkeys(building.library_paths())])

    def facts(self) -> dict[str, Any]:
        """What the document says of the whole run."""
        return {
            "card": building.card_name() if self.gpu else None,
            "commit": self.pack["commit"],
            "uncommitted": self.pack["uncommitted"],
            "digest": self.pack["digest"],
            "made": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "backend": self.given.backend,
            "arch": self.build.arch,
            "size": self.given.size,
            "built_for": self.pack["built_for"],
            "left_out": None if self.given_libraries else self.pack["left_out"],
            "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        }

    def stages(self) -> Any:
        """(name, result) of every stage that is wanted, in order; a result is None where it could not be had."""
        device, ops, sizes = "CUDA0" if self.gpu else "CPU", self.built, self.given.size
        if not (self.given_libraries or self.carried):
            for side in ("patched", "baseline"):
                built = self.stage(f"build-{side}", ops, lambda side=side: self._built(side), _COMPILE_SECONDS)
                yield f"build-{side}", built
                if built is None:
                    return
        params = None if sizes == "full" else _TINY_PARAMS
        for op in reversed(operators.OPS):

            def run_op(op: str = op) -> dict[str, Any]:
                return operators.run_ops(
                    self.op_tests, device, op, seconds=self.runner.left(), jobs=self.given.jobs, params=params
                )

            yield from self.wanted(f"ops-{op}", [ops, device, params], run_op, _OP_SECONDS)
        yield from self.wanted("oracle", [ops, self.gpu], self._oracle, _OP_SECONDS)
        yield from self.wanted("off", [ops, self.gpu], self._off, _OP_SECONDS)
        planned = list(measuring.plans(sizes))
        for plan in planned[:_FIRST_PLANS]:
            yield from self._measured(plan)
        if self.gpu:
            for tool in operators.TOOLS:

                def sanitized(tool: str = tool) -> dict[str, Any]:
                    return self._sanitized(tool, device)

                yield from self.wanted(f"sanitizer-{tool}", [ops, device], sanitized, _OP_SECONDS)
        for plan in planned[_FIRST_PLANS:]:
            yield from self._measured(plan)

    def stage(self, name: str, inputs: Any, work: Any, needs: float = 0.0) -> dict[str, Any] | None:
        return self.runner.run(name, inputs, work, needs)

    def wanted(self, name: str, inputs: Any, work: Any, needs: float = 0.0) -> Any:
        only = self.given.only.split(",") if self.given.only else [""]
        if name.startswith(tuple(only)):
            yield name, self.stage(name, inputs, work, needs)

    def _built(self, side: str) -> dict[str, Any]:
        self.build.run(side, self.runner.left())
        return {"side": side}

    def _oracle(self) -> dict[str, Any]:
        def tick(_line: str) -> None:
            self.runner.check_time()

        found: list[dict[str, Any]] = []
        try:
            for row in oracle.check(self.top / "prepared", self.patched, gpu=self.gpu, on_case=tick):
                found.append(row)
                self.runner.say(f"  {row['case']}: {'; '.join(row['problems']) or 'ok'}")
        except OutOfTime:
            raise OutOfTime({"cases": found}) from None
        return {"cases": found}

    def _off(self) -> dict[str, Any]:
        lines = cases.OFF_CASES[: self.given.cases]
        found = oracle.same_bits(self.top / "prepared", self.patched, self.unpatched, lines, gpu=self.gpu)
        return {"cases": list(found)}

    def _measured(self, plan: measuring.Plan) -> Any:
        def work() -> dict[str, Any]:
            model = measuring.write_model(plan, self.work / "models")
            return measuring.measure(plan, model, self.patched, self.unpatched, self.runner, gpu=self.gpu)

        yield from self.wanted(plan.name, [self.built, repr(plan)], work, _OP_SECONDS if self.gpu else 0.0)

    def _sanitized(self, tool: str, device: str) -> dict[str, Any]:
        return operators.sanitize(
            self.op_tests,
            device,
            tool,
            seconds=min(self.runner.left(), _SANITIZER_SECONDS),
            params=_SANITIZED,
            environment=dict(os.environ),
        )


def _stamp(path: Path) -> list[Any]:
    """Tells a built file, or the files of a folder, apart from others of the same name."""
    files = [path] if path.is_file() else sorted(path.glob("*llama.*")) + sorted(path.glob("libggml*"))
    return [str(path), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]


if __name__ == "__main__":
    sys.exit(main())
