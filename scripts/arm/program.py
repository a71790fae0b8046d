"""Builds test-backend-ops for one -march, and runs the cases under qemu.

qemu logs each block of code before the block first runs. The log shows which instructions of our kernels ran.

    program = Program(tools, tree, Path("build/arm/armv8-a"), "armv8-a"); program.build(jobs=2)
    program.vector()                  # "neon": the vector type the kernels were compiled for
    outcome = program.run_op("FLASH_ATTN_EXT_KV_BLOCKS", None, threads=2)
    outcome["passed"], outcome["ours"], len(outcome["addresses"])
"""

from __future__ import annotations

import bisect
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpu.building import run_logged
from gpu.operators import read_ops
from gpu.runner import CheckError

from arm.tools import Tools, processor

#: Our op with a block table, and upstream's op.
BLOCKS, PLAIN = "FLASH_ATTN_EXT_KV_BLOCKS", "FLASH_ATTN_EXT"
#: Selects about 200 of upstream's 5,308 cases, with every head size and cache type. A case takes about a second.
SELECTION = r"kv=113,nb=(1|75),mask=1,sinks=1|kv=(17|64|96|128|256|1025),"
_COUNTS = re.compile(r"^attention: ops (\d+), ours (\d+), reference (\d+), threads (\d+)$", re.MULTILINE)
HERE = Path(__file__).resolve().parent
TOOLCHAIN = HERE.parent.parent / "cmake" / "aarch64-linux-gnu.cmake"
_OBJECTS = HERE.parent / "gpu" / "objects.py"
# A code section in the linker's map. A long name has its own line.
_SECTION = re.compile(r"^ \.text\S*\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)\s+\S*?\(?(fattn[\w-]*\.cpp)\.o\)?$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(?:[0-9a-f]{8} *\t)?(\S+)(?:[ \t]+(.*))?$", re.MULTILINE)
# Vector multiply-adds, and the instructions that only newer processors have.
_NOTABLE = ("fmla", "fmlal", "sdot", "usdot", "smmla", "usmmla", "bfdot", "bfmmla", "bfmlalb", "bfmlalt", "bfcvtn")


#: Our kernels' code as {address: (source, instruction)}. An instruction looks like "fmla v0.4s, v1.4s, v2.4s".
Code = Mapping[int, tuple[str, str]]


class Part(NamedTuple):
    """A range of the program's code that was compiled from one of our sources."""

    start: int
    size: int
    source: str


@dataclass(frozen=True)
class Program:
    """A build of test-backend-ops.

    tree: the folder of the exported sources.
    folder: the build folder.
    march: the value for g++'s option -march.
    """

    tools: Tools
    tree: Path
    folder: Path
    march: str

    def build(self, jobs: int) -> None:
        """Configure the build, and compile the files that changed.

        Builds for other values of -march share the object files that do not depend on -march. Raises `CheckError` with
        the compiler's first errors.
        """
        objects = (sys.executable, _OBJECTS, self.folder.parent / "objects", self.tree, self.folder)
        launcher = ";".join(map(str, objects))
        options = {
            "CMAKE_TOOLCHAIN_FILE": TOOLCHAIN,
            "CMAKE_C_COMPILER": self.tools.cc,
            "CMAKE_CXX_COMPILER": self.tools.cxx,
            "CMAKE_C_COMPILER_LAUNCHER": launcher,
            "CMAKE_CXX_COMPILER_LAUNCHER": launcher,
            "TREE": self.tree,
            "GGML_CPU_ARM_ARCH": self.march,
        }
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={self.tools.ninja}"] if self.tools.ninja else []
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        self._run("configure", self.tools.cmake, "-S", HERE, "-B", self.folder, *generator, *definitions)
        self._run("build", self.tools.cmake, "--build", self.folder, "--parallel", jobs)

    def _run(self, what: str, *command: object) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        run_logged(f"{what} for {self.march}", self.folder / f"{what}.log", [*map(str, command)])

    def vector(self) -> str | None:
        """Return the value of the kernels' macro FATTN_SIMD_NAME in this build, such as "neon"."""
        commands = json.loads((self.folder / "compile_commands.json").read_text())
        entry = next((entry for entry in commands if entry["file"].endswith("fattn/fattn-tile.cpp")), None)
        if entry is None:
            raise CheckError("the build has no compile command for fattn-tile.cpp")
        words = shlex.split(entry["command"])
        words = words[words.index(self.tools.cxx) :]  # without the launcher
        cut = words.index("-o")
        command = [*words[:cut], *words[cut + 2 :], "-E", "-dM"]
        done = subprocess.run(command, cwd=entry["directory"], capture_output=True, text=True, check=False)
        found = re.search(r'^#define FATTN_SIMD_NAME "(\w+)"$', done.stdout, re.MULTILINE)
        return found.group(1) if found else None

    def parts(self) -> list[Part]:
        """Address ranges of our kernels in the program, read from the linker's map."""
        parts = read_map((self.folder / "test-backend-ops.map").read_text())
        if not parts:
            raise CheckError("test-backend-ops does not contain our kernels")
        return parts

    def code(self) -> Code:
        """Instructions of our kernels by address, read from a disassembly."""
        parts = self.parts()
        first, end = parts[0].start, max(part.start + part.size for part in parts)
        command = [
            self.tools.objdump,
            "-d",
            f"--start-address={first}",
            f"--stop-address={end}",
            str(self.folder / "test-backend-ops"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return read_code(done.stdout, parts)

    def run_op(self, op: str, params: str | None, threads: int) -> dict[str, Any]:
        """Run the cases of `op`.

        params: regular expression that selects cases by their parameters. None selects all cases.

        The result has the fields of `gpu.operators.read_ops`, `params` and these fields:
        ops, ours, reference, threads: counts by the program, or None if the program ended early.
        addresses: addresses of our instructions that ran.
        seconds: duration of the run.

        Raises `CheckError` if qemu cannot run the program.
        """
        log = self.folder / f"{op}.code"
        log.unlink(missing_ok=True)
        command = [self.tools.qemu, "-cpu", processor(self.march), "-d", "in_asm", "-D", str(log)]
        command += [
            "-dfilter",
            ranges(self.parts()),
            str(self.folder / "test-backend-ops"),
            "test",
            "-b",
            "CPU",
            "-o",
            op,
        ]
        command += ["-p", params] if params else []
        output, errors = self.folder / f"{op}.out", self.folder / f"{op}.err"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GGML_")}
        began = time.monotonic()
        with open(output, "wb") as out, open(errors, "wb") as err:
            code = subprocess.run(
                command, stdout=out, stderr=err, env=environment | {"ARM_CHECK_THREADS": str(threads)}, check=False
            ).returncode
        result = read(op, output.read_text(errors="replace"), errors.read_text(errors="replace"), code)
        result["addresses"] = executed(log.read_text(errors="replace") if log.exists() else "")
        return result | {"seconds": round(time.monotonic() - began, 1), "params": params}


def read_map(text: str) -> list[Part]:
    """Return the sorted address ranges of our sources in a linker's map. Empty and discarded ranges are omitted."""
    found = (Part(int(start, 16), int(size, 16), source) for start, size, source in _SECTION.findall(text))
    return sorted({part for part in found if part.size and part.start})


def read_code(text: str, parts: list[Part]) -> Code:
    """Return the instructions of a disassembly in these ranges, by address."""
    starts = [part.start for part in parts]
    code = {}
    for place, name, operands in _INSTRUCTION.findall(text):
        address = int(place, 16)
        part = parts[bisect.bisect_right(starts, address) - 1]
        if part.start <= address < part.start + part.size and not name.startswith((".", "udf")):
            code[address] = (part.source, f"{name} {operands}".strip())
    return code


def count(code: Code, ran: Collection[int]) -> dict[str, dict[str, Any]]:
    """Count all instructions and executed instructions, per source file and per notable instruction."""
    found: dict[str, dict[str, Any]] = {}
    for address, (source, text) in sorted(code.items(), key=lambda item: item[1]):
        row = found.setdefault(source, {"instructions": 0, "ran": 0, "notable": {}})
        row["instructions"] += 1
        row["ran"] += address in ran
        name, _, operands = text.partition(" ")
        if name in _NOTABLE and operands.startswith("v"):
            both = row["notable"].setdefault(name, [0, 0])
            both[0] += 1
            both[1] += address in ran
    return found


def read(op: str, output: str, errors: str, code: int) -> dict[str, Any]:
    """Parse the output of test-backend-ops. The total is 0 if no case of `op` matches the filter."""
    counts = _COUNTS.search(errors)
    counted = map(int, counts.groups()) if counts else [None] * 4
    return read_ops(op, output, errors, code) | dict(zip(("ops", "ours", "reference", "threads"), counted, strict=True))


def ranges(parts: Iterable[Part]) -> str:
    """Code ranges in the syntax of qemu's option -dfilter."""
    return ",".join(f"{part.start:#x}+{part.size:#x}" for part in parts)


def executed(log: str) -> set[int]:
    """Addresses of the instructions in qemu's log."""
    return {int(place, 16) for place in re.findall(r"^0x([0-9a-f]+):", log, re.MULTILINE)}
