"""The stages of the GPU check in their order: build, op tests, oracle, SWAA off, benchmark, sanitizer.

for name, result in Stages(given, top, pack, runner): results[name] = result
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu import building, cases, measuring, operators, oracle, packing
from gpu.building import Build
from gpu.errors import CheckError, OutOfTime
from gpu.measuring import Workload
from gpu.runner import Result, Runner

# test-backend-ops runs a few cases without a GPU to compare, to try the check itself.
_TINY_PARAMS = r"^hs=64,.*(nb=1,|w=256)|hsk=64,hsv=64,nh=4,nr23=\[1,1\],kv=113,nb=1,mask=1,sinks=0"
# Table cases that a sanitizer finishes in time: it slows each down by a factor of a hundred.
_SANITIZED = r"kv=4096,nb=(1|2|7|33|65|70|75|97),"
# Measured before the sanitizer runs: the cost of unused patches, and the model of the published ratios.
_FIRST_WORKLOADS = 6
_COMPILE_SECONDS, _OP_SECONDS = 60, 20
# Time limit of each sanitizer tool: the cases finished by then are the result.
_SANITIZER_SECONDS = 60

Stage = tuple[str, Result | None]


class Stages:
    """The stages of one call: (name, result), None for a result that could not be obtained."""

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
        # Each archive content gets its own builds; objects of equal sources are shared.
        self.build = Build(top, self.work / pack["digest"][:12], given.backend, arch, given.jobs, self.work / "objects")
        if self.carried:
            sides = [top / packing.BUILT / side for side in ("patched", "baseline")]
            libraries = [*sides, sides[0] / "test-backend-ops"]
            libraries[2].chmod(0o755)
        elif not self.given_libraries:
            libraries = [self.build.library("patched"), self.build.library("baseline"), self.build.op_tests()]
        self.patched, self.unpatched, self.op_tests = libraries
        self.built = [_stamp(path) for path in libraries] if self.given_libraries else [pack["digest"], arch]
        self._set_paths()

    def _set_paths(self) -> None:
        """For this process and its children: our package, the tests' helpers, the packages in the archive, CUDA."""
        places = [str(self.top), str(self.top / "tests"), str(self.top / "site")]
        sys.path[:0] = places
        os.environ["PYTHONPATH"] = os.pathsep.join([*places[::2], *filter(None, [os.environ.get("PYTHONPATH")])])
        if self.gpu:
            known = filter(None, [os.environ.get("LD_LIBRARY_PATH")])
            os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*known, *dict.fromkeys(building.library_paths())])

    def facts(self) -> dict[str, Any]:
        """The document's fields about the whole run."""
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

    def __iter__(self) -> Iterator[Stage]:
        if not (self.given_libraries or self.carried):
            for side in ("patched", "baseline"):
                built = self.runner.run(f"build-{side}", self.built, partial(self._built, side), _COMPILE_SECONDS)
                yield f"build-{side}", built
                if built is None:
                    return
        device = "CUDA0" if self.gpu else "CPU"
        params = None if self.given.size == "full" else _TINY_PARAMS
        for op in reversed(operators.OPS):
            inputs = [self.built, device, params]
            yield from self._stage(f"ops-{op}", inputs, partial(self._ops, op, device, params), _OP_SECONDS)
        yield from self._stage("oracle", [self.built, self.gpu], self._oracle, _OP_SECONDS)
        yield from self._stage("off", [self.built, self.gpu], self._off, _OP_SECONDS)
        workloads = list(measuring.workloads(self.given.size))
        yield from self._measured(workloads[:_FIRST_WORKLOADS])
        for tool in operators.TOOLS if self.gpu else ():
            work = partial(self._sanitized, tool, device)
            yield from self._stage(f"sanitizer-{tool}", [self.built, device], work, _OP_SECONDS)
        yield from self._measured(workloads[_FIRST_WORKLOADS:])

    def _stage(self, name: str, inputs: Any, work: Callable[[], Result], needs: float = 0.0) -> Iterator[Stage]:
        """Run a stage unless --only excludes it."""
        only = self.given.only.split(",") if self.given.only else [""]
        if name.startswith(tuple(only)):
            yield name, self.runner.run(name, inputs, work, needs)

    def _built(self, side: str) -> Result:
        self.build.run(side, self.runner.left())
        return {"side": side}

    def _ops(self, op: str, device: str, params: str | None) -> Result:
        seconds, jobs = self.runner.left(), self.given.jobs
        return operators.run_ops(self.op_tests, device, op, seconds=seconds, jobs=jobs, params=params)

    def _oracle(self) -> Result:
        def check_time(_line: str) -> None:
            self.runner.check_time()

        found: list[dict[str, Any]] = []
        try:
            for row in oracle.check(self.top / "prepared", self.patched, gpu=self.gpu, on_case=check_time):
                found.append(row)
                self.runner.say(f"  {row['case']}: {'; '.join(row['problems']) or 'ok'}")
        except OutOfTime:
            raise OutOfTime({"cases": found}) from None
        return {"cases": found}

    def _off(self) -> Result:
        lines = cases.OFF_CASES[: self.given.cases]
        found = oracle.same_bits(self.top / "prepared", self.patched, self.unpatched, lines, gpu=self.gpu)
        return {"cases": list(found)}

    def _measured(self, workloads: list[Workload]) -> Iterator[Stage]:
        needs = _OP_SECONDS if self.gpu else 0.0
        for workload in workloads:
            inputs = [self.built, repr(workload)]
            yield from self._stage(workload.name, inputs, partial(self._workload, workload), needs)

    def _workload(self, workload: Workload) -> Result:
        model = measuring.write_model(workload, self.work / "models")
        return measuring.measure(workload, model, self.patched, self.unpatched, self.runner, gpu=self.gpu)

    def _sanitized(self, tool: str, device: str) -> Result:
        seconds = min(self.runner.left(), _SANITIZER_SECONDS)
        environment = dict(os.environ)
        return operators.sanitize(
            self.op_tests, device, tool, seconds=seconds, params=_SANITIZED, environment=environment
        )


def _stamp(path: Path) -> list[Any]:
    """Identifies a built file, or the libraries of a folder, by name, size and time."""
    files = [path] if path.is_file() else sorted(path.glob("*llama.*")) + sorted(path.glob("libggml*"))
    return [str(path), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]
