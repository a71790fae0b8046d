"""Runs test-backend-ops over flash attention, plainly and under compute-sanitizer, and reads what it says.

result = run_ops(Path("build/bin/test-backend-ops"), "CUDA0", "FLASH_ATTN_EXT", jobs=16)
result["passed"], result["total"], result["unsupported"], result["failures"]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.errors import CheckError, OutOfTime

#: Upstream's cases, and ours with a table.
OPS = ("FLASH_ATTN_EXT", "FLASH_ATTN_EXT_KV_BLOCKS")
TOOLS = ("memcheck", "racecheck")

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def run_ops(
    program: Path,
    backend: str,
    op: str,
    *,
    seconds: float,
    jobs: int = 1,
    params: str | None = None,
    wrapper: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What test-backend-ops says of one op: passed, total, unsupported, failures (at most 20 lines), and the log's end.

    seconds: at most so long, then `OutOfTime`. params: only cases whose parameters match this expression. wrapper:
    what to run it under. Raises `CheckError` if it examined nothing.
    """
    command = [*wrapper, str(program), "test", "-b", backend, "-o", op]
    command += (["-p", params] if params else []) + (["-j", str(jobs)] if jobs > 1 else [])
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=max(seconds, 1),
            env=environment or dict(os.environ),
        )
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode("utf-8", "replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        raise OutOfTime({"printed": text}) from None
    except OSError as error:
        raise CheckError(f"{program} does not run: {error}") from None
    return read_ops(op, done.stdout, done.stderr, done.returncode)


def read_ops(op: str, output: str, errors: str, code: int) -> dict[str, Any]:
    """The same from what it printed and its exit code."""
    lines = [_COLOURS.sub("", line).rstrip() for line in output.splitlines()]
    # The error of a case that fails stands before its name.
    mine = [line for line in lines if f"{op}(" in line]
    unsupported = [line.strip() for line in mine if "not supported" in line]
    failures = [line.strip() for line in mine if "FAIL" in line.rsplit("):", 1)[-1]]
    told = re.findall(r"(\d+)/(\d+) tests passed", "\n".join(lines))
    result = {
        "op": op,
        "passed": int(told[0][0]) if told else 0,
        "total": int(told[0][1]) if told else 0,
        "unsupported": len(unsupported),
        "examples_unsupported": unsupported[:5],
        "failures": failures[:20],
        "exit_code": code,
        "cut": False,
    }
    if not told:
        tail = " | ".join(_COLOURS.sub("", line) for line in (output + "\n" + errors).strip().splitlines()[-4:])
        if code == 0:
            raise CheckError(f"test-backend-ops examined nothing for {op}: {tail}")
        # A crash is a result: it is the one that matters most.
        result["failures"].append(f"ended with code {code} before it was through: {tail}"[:600])
    elif result["total"] == 0 and not unsupported:
        raise CheckError(f"test-backend-ops has no case of {op} on this backend that matches")
    return result


def sanitize(
    program: Path, backend: str, tool: str, *, seconds: float, params: str | None, environment: dict[str, str]
) -> dict[str, Any]:
    """Our cases under compute-sanitizer's `tool`: what `run_ops` tells, and the errors that the tool counts."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise CheckError("compute-sanitizer is not here; it is part of CUDA's toolkit")
    log = program.parent / f"{tool}.log"
    wrapper = [sanitizer, "--tool", tool, "--log-file", str(log), "--error-exitcode", "0"]
    try:
        result = run_ops(
            program, backend, OPS[1], seconds=seconds, params=params, wrapper=wrapper, environment=environment
        )
    except OutOfTime as late:
        # It is slow by a factor of a hundred, and a call has ten minutes: what it got through is the result.
        result = read_until(OPS[1], (late.partial or {}).get("printed", ""))
    return result | {"tool": tool} | read_log(log.read_text(errors="replace") if log.exists() else "", result["cut"])


def read_until(op: str, output: str) -> dict[str, Any]:
    """As `read_ops`, of a run that was ended: total is how many cases were done. `cut` says so."""
    done = [line for line in map(str.strip, _COLOURS.sub("", output).splitlines()) if f"{op}(" in line]
    passed = [line for line in done if line.endswith("OK")]
    failures = [line for line in done if "FAIL" in line.rsplit("):", 1)[-1]]
    unsupported = [line for line in done if "not supported" in line]
    return {
        "op": op,
        "passed": len(passed),
        "total": len(passed) + len(failures),
        "unsupported": len(unsupported),
        "examples_unsupported": unsupported[:5],
        "failures": failures[:20],
        "exit_code": 0,
        "cut": True,
    }


def read_log(text: str, cut: bool) -> dict[str, Any]:
    """errors, and the first lines of compute-sanitizer's log; counted one by one where it was ended before its summary.

    Raises `CheckError` if it says nothing of a run that ended by itself.
    """
    found = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    counts = [re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", line) for line in found]
    told = [int(count.group(1)) for count in counts if count]
    if not told and not cut:
        raise CheckError(f"compute-sanitizer gave no summary: {' | '.join(text.splitlines()[-3:])}")
    each = [line for line in found if re.match(r"(Invalid|Misaligned|Program hit|Error:|Warning: Race)", line)]
    return {"errors": told[-1] if told else len(each), "log": found[:20]}
