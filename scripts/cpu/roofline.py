"""What the machine can do at best, to hold the measured speeds against: compiles and runs roofline.cpp.

    Roofline.compiled(folder).measure(threads=8)["read_gb_s"]

A machine's clock and bandwidth move with its heat and its other programs, so one measurement would be of that moment:
the benchmark takes one between its rounds, and their medians count.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("roofline.cpp")
#: What is measured: multiply-adds and dot products in 1e9 operations per second, reading in 1e9 bytes per second.
UNITS = ("f32_gflops", "bf16_gflops", "int8_gops", "read_gb_s")
#: Memory that one measurement reads, over and over, in MiB: far more than caches hold.
MIB = 256


class NoRoofline(Exception):
    """There is none; the message is one line that says why."""


class Roofline:
    """The compiled program at `path`, and every sample that it gave."""

    def __init__(self, path: Path, compiler: str) -> None:
        self.path, self.compiler = path, compiler
        self.samples: list[dict[str, float | None]] = []

    @classmethod
    def compiled(cls, folder: Path) -> Roofline:
        """Compile into `folder` for this very machine. Raises `NoRoofline`."""
        compiler = find_compiler()
        # The two spellings of "all that this processor has".
        native = "-mcpu=native" if sys.platform == "darwin" and platform.machine() == "arm64" else "-march=native"
        path = folder / "roofline"
        command = [*compiler, "-O3", "-std=c++17", "-pthread", native, str(SOURCE), "-o", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise NoRoofline(f"{compiler[0]} does not run: {error.strerror}") from None
        if done.returncode:
            told = [line.strip() for line in done.stderr.splitlines() if "error" in line] or ["no word of it"]
            raise NoRoofline(f"{compiler[0]} does not compile {SOURCE.name}: {told[0][:300]}")
        return cls(path, shlex.join(compiler))

    def measure(self, threads: int, mib: float = MIB, seconds: float = 0.08) -> dict[str, float | None]:
        """One more sample, about 25 times `seconds` long: `UNITS`, None for a unit that the processor lacks.

        Raises `NoRoofline` if the program dies, as it does where the compiler took the processor for another.
        """
        self.samples.append(self._run(threads, mib, seconds))
        return self.samples[-1]

    def read(self, threads: int, mib: float = MIB, seconds: float = 0.04) -> float:
        """Reading alone in 1e9 bytes per second, right now; no sample. About 6 times `seconds` long.

        Raises `NoRoofline` as `measure`.
        """
        return self._run(threads, mib, seconds, "read")["read_gb_s"]

    def _run(self, *arguments: object) -> dict[str, Any]:
        command = [str(self.path), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise NoRoofline(f"the program for it ended with code {done.returncode}")
        return json.loads(done.stdout)

    def summary(self) -> dict[str, Any]:
        """The median of every unit over the samples, and how they were got."""
        return medians(self.samples) | {"read_mib": MIB, "samples": self.samples, "compiler": self.compiler}


def find_compiler() -> list[str]:
    """The words of $CXX, or the first C++ compiler that there is. Raises `NoRoofline`."""
    given = shlex.split(os.environ.get("CXX", ""))
    if given:
        return given
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NoRoofline("there is no C++ compiler (c++, g++, clang++); set CXX to one")


def medians(samples: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """`UNITS`, each the median of the samples that have it, None where none has."""
    found = {unit: [sample[unit] for sample in samples if sample[unit] is not None] for unit in UNITS}
    return {unit: statistics.median(values) if values else None for unit, values in found.items()}
