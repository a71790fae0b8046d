"""Defines the stages of the GPU check in order: build, op tests, oracle, SWAA off, benchmark, sanitizer.

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
from gpu.measuring import Workload
from gpu.runner import CheckError, OutOfTime, Result, Runner

SIDES = ("patched", "baseline")
# Selects the few op cases of a trial run.
_TINY_PARAMS = r"^hs=64,.*(nb=1,|w=256)|hsk=64,hsv=64,nh=4,nr23=\[1,1\],kv=113,nb=1,mask=1,sinks=0"
# Selects few cases with a block table, because a sanitizer makes each case a hundred times slower.
_SANITIZED = r"kv=4096,nb=(1|2|7|33|65|70|75|97),"
# Number of workloads before the sanitizer: SWAA off, and the model with published ratios.
_FIRST_WORKLOADS = 6
# Minimum number of seconds left to start a build or a check.
_BUILD_SECONDS, _CHECK_SECONDS = 60, 20
# Time limit of each sanitizer tool. The cases finished by then are the result.
_SANITIZER_SECONDS = 60


class Stages:
    """Iterates over the stages of one call as (name, result). The result is None if the stage gave no result."""

    def __init__(self, given: argparse.Namespace, top: Path, pack: dict[str, Any], runner: Runner) -> None:
        self.given, self.top, self.pack, self.runner = given, top, pack, runner
        self.gpu, self.device = given.backend == "cuda", "CUDA0" if given.backend == "cuda" else "CPU"
        self.work = given.work.resolve()
        libraries = [given.patched, given.baseline, given.op_tests]
        self.given_libraries = all(libraries)
        if any(libraries) and not self.given_libraries:
            raise CheckError("give --patched, --baseline and --op-tests together")
        carried_for = None if self.given_libraries else pack["built_for"]
        arch = given.arch if self.given_libraries or not self.gpu else given.arch or building.card_arch()
        if carried_for and self.gpu and arch != carried_for:
            raise CheckError(f"the archive's libraries are for compute capability {carried_for}, not {arch}")
        # Each archive content gets its own builds. Equal sources share objects.
        self.build = Build(top, self.work / pack["digest"][:12], given.backend, arch, given.jobs, self.work / "objects")
        self.builds = not (self.given_libraries or carried_for)
        if not self.given_libraries:
            sides = [top / packing.BUILT / side if carried_for else self.build.library(side) for side in SIDES]
            libraries = [*sides, sides[0] / "test-backend-ops"]
            if carried_for:
                libraries[2].chmod(0o755)
        self.patched, self.unpatched, self.op_tests = libraries
        self.built = [_stamp(path) for path in libraries] if self.given_libraries else [pack["digest"], arch]
        self._set_paths()

    def _set_paths(self) -> None:
        """Set the search paths for our package, the tests' helpers, the archive's packages and CUDA."""
        places = [str(self.top), str(self.top / "tests"), str(self.top / "site")]
        sys.path[:0] = places
        os.environ["PYTHONPATH"] = os.pathsep.join([*places[::2], *filter(None, [os.environ.get("PYTHONPATH")])])
        if self.gpu:
            known = filter(None, [os.environ.get("LD_LIBRARY_PATH")])
            os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*known, *dict.fromkeys(building.library_paths())])

    def facts(self) -> dict[str, Any]:
        """The fields of the report that describe the whole run."""
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

    def __iter__(self) -> Iterator[tuple[str, Result | None]]:
        for side in SIDES if self.builds else ():
            name, work = f"build-{side}", partial(self._built, side)
            built = self.runner.run(name, self.built, work, _BUILD_SECONDS)
            yield name, built
            if built is None:
                return
        only = tuple(self.given.only.split(",")) if self.given.only else ("",)
        for name, detail, work in self._checks():
            if name.startswith(only):
                yield name, self.runner.run(name, [self.built, self.device, detail], work, _CHECK_SECONDS)

    def _checks(self) -> Iterator[tuple[str, str | None, Callable[[], Result]]]:
        """Yield the name, the inputs besides the libraries, and the function of each stage after the builds."""
        params = None if self.given.size == "full" else _TINY_PARAMS
        for op in reversed(operators.OPS):
            yield f"ops-{op}", params, partial(self._ops, op, params)
        yield "oracle", None, self._oracle
        yield "off", None, self._off
        loads = [
            (load.name, repr(load), partial(self._workload, load)) for load in measuring.workloads(self.given.size)
        ]
        yield from loads[:_FIRST_WORKLOADS]
        for tool in operators.TOOLS if self.gpu else ():
            yield f"sanitizer-{tool}", None, partial(self._sanitized, tool)
        yield from loads[_FIRST_WORKLOADS:]

    def _built(self, side: str) -> Result:
        self.build.run(side, self.runner.left())
        return {"side": side}

    def _ops(self, op: str, params: str | None) -> Result:
        limits = {"seconds": self.runner.left(), "jobs": self.given.jobs}
        return operators.run_ops(self.op_tests, self.device, op, params=params, **limits)

    def _oracle(self) -> Result:
        found: list[dict[str, Any]] = []
        for row in oracle.check(self.top / "prepared", self.patched, gpu=self.gpu):
            found.append(row)
            self.runner.say(f"  {row['case']}: {'; '.join(row['problems']) or 'ok'}")
            if self.runner.left() <= 0:
                raise OutOfTime({"cases": found})
        return {"cases": found}

    def _off(self) -> Result:
        lines = cases.OFF_CASES[: self.given.cases]
        found = oracle.same_bits(self.top / "prepared", self.patched, self.unpatched, lines, gpu=self.gpu)
        return {"cases": list(found)}

    def _workload(self, workload: Workload) -> Result:
        model = measuring.write_model(workload, self.work / "models")
        return measuring.measure(workload, model, self.patched, self.unpatched, self.runner, gpu=self.gpu)

    def _sanitized(self, tool: str) -> Result:
        seconds = min(self.runner.left(), _SANITIZER_SECONDS)
        return operators.sanitize(self.op_tests, self.device, tool, seconds=seconds, params=_SANITIZED)


def _stamp(path: Path) -> list[Any]:
    """Return the names, sizes and modification times of a built file or of a folder's libraries."""
    files = [path] if path.is_file() else sorted(path.glob("*llama.*")) + sorted(path.glob("libggml*"))
    return [str(path), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]
