"""Runs the op tests of a program under qemu: which cases passed, whose kernels computed them, and which code ran.

qemu logs each block of code when it first translates it, which proves that a kernel ran, and how much of it.

    outcome = run_op(program, "FLASH_ATTN_EXT_KV_BLOCKS", None, threads=2)
    outcome["passed"], outcome["ours"], len(outcome["addresses"])
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable
from typing import Any

from gpu.operators import read_ops

from arm.program import Part, Program
from arm.tools import processor

#: Our op with a block table, and upstream's.
BLOCKS, PLAIN = "FLASH_ATTN_EXT_KV_BLOCKS", "FLASH_ATTN_EXT"
#: About 200 of upstream's 5,308 cases, of every head size and cache type: each takes qemu about a second.
SELECTION = r"kv=113,nb=(1|75),mask=1,sinks=1|kv=(17|64|96|128|256|1025),"
_COUNTS = re.compile(r"^attention: ops (\d+), ours (\d+), reference (\d+), threads (\d+)$", re.MULTILINE)


def run_op(program: Program, op: str, params: str | None, threads: int) -> dict[str, Any]:
    """Run the cases of one op whose parameters match, all by default.

    Returns the fields of `gpu.operators.read_ops`, and ops, ours, reference, threads (None if the program ended
    early), addresses (of our code that ran) and seconds. Raises `CheckError` if qemu cannot run the program.
    """
    log = program.folder / f"{op}.code"
    log.unlink(missing_ok=True)
    command = [program.tools.qemu, "-cpu", processor(program.march), "-d", "in_asm", "-D", str(log)]
    command += ["-dfilter", ranges(program.parts()), str(program.path), "test", "-b", "CPU", "-o", op]
    command += ["-p", params] if params else []
    output, errors = program.folder / f"{op}.out", program.folder / f"{op}.err"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GGML_")}
    began = time.monotonic()
    with open(output, "wb") as out, open(errors, "wb") as err:
        code = subprocess.run(
            command, stdout=out, stderr=err, env=environment | {"ARM_CHECK_THREADS": str(threads)}, check=False
        ).returncode
    result = read(op, output.read_text(errors="replace"), errors.read_text(errors="replace"), code)
    result["addresses"] = executed(log.read_text(errors="replace") if log.exists() else "")
    return result | {"seconds": round(time.monotonic() - began, 1), "params": params}


def read(op: str, output: str, errors: str, code: int) -> dict[str, Any]:
    """Parse the output of a run; the total is 0 if a filter matches no case of this op."""
    counts = _COUNTS.search(errors)
    counted = map(int, counts.groups()) if counts else [None] * 4
    return read_ops(op, output, errors, code) | dict(zip(("ops", "ours", "reference", "threads"), counted, strict=True))


def ranges(parts: Iterable[Part]) -> str:
    """The code ranges for qemu's log, as -dfilter takes them."""
    return ",".join(f"{part.start:#x}+{part.size:#x}" for part in parts)


def executed(log: str) -> set[int]:
    """Addresses of the instructions in qemu's log."""
    return {int(place, 16) for place in re.findall(r"^0x([0-9a-f]+):", log, re.MULTILINE)}
