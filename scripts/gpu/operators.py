"""Runs test-backend-ops for flash attention, directly and under compute-sanitizer, and parses its output.

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
    """Run test-backend-ops for one op; returns passed, total, unsupported and failures (at most 20 lines).

    seconds: time limit; `OutOfTime` when it has passed. params: only cases whose parameters match this expression.
    wrapper: the command to run it under. Raises `CheckError` if no case was run.
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
    """Parse the same from its output and exit code."""
    lines = [_COLOURS.sub("", line).rstrip() for line in output.splitlines()]
    # The error of a case that fails stands before its name.
    mine = [line for line in lines if f"{op}(" in line]
    unsupported = [line.strip() for line in mine if "not supported" in line]
    failures = [line.strip() for line in mine if "FAIL" in line.rsplit("):", 1)[-1]]
    summary = re.findall(r"(\d+)/(\d+) tests passed", "\n".join(lines))
    result = {
        "op": op,
        "passed": int(summary[0][0]) if summary else 0,
        "total": int(summary[0][1]) if summary else 0,
        "unsupported": len(unsupported),
        "examples_unsupported": unsupported[:5],
        "failures": failures[:20],
        "exit_code": code,
        "truncated": False,
    }
    if not summary:
        tail = " | ".join(_COLOURS.sub("", line) for line in (output + "\n" + errors).strip().splitlines()[-4:])
        if code == 0:
            raise CheckError(f"test-backend-ops ran nothing for {op}: {tail}")
        # A crash is a result, the most important one.
        result["failures"].append(f"ended early with code {code}: {tail}"[:600])
    elif result["total"] == 0 and not unsupported:
        raise CheckError(f"test-backend-ops has no case of {op} on this backend that matches")
    return result


def sanitize(
    program: Path, backend: str, tool: str, *, seconds: float, params: str | None, environment: dict[str, str]
) -> dict[str, Any]:
    """Run our cases under compute-sanitizer's `tool`: the result of `run_ops`, and the number of errors it found."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise CheckError("compute-sanitizer is not installed; it is part of CUDA's toolkit")
    log = program.parent / f"{tool}.log"
    wrapper = [sanitizer, "--tool", tool, "--log-file", str(log), "--error-exitcode", "0"]
    try:
        result = run_ops(
            program, backend, OPS[1], seconds=seconds, params=params, wrapper=wrapper, environment=environment
        )
    except OutOfTime as late:
        # It is a hundred times slower, and a call has ten minutes: the finished cases are the result.
        result = read_until(OPS[1], (late.partial or {}).get("printed", ""))
    return (
        result | {"tool": tool} | read_log(log.read_text(errors="replace") if log.exists() else "", result["truncated"])
    )


def read_until(op: str, output: str) -> dict[str, Any]:
    """As `read_ops`, for a run that was stopped: total counts the finished cases, and `truncated` is true."""
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
        "truncated": True,
    }


def read_log(text: str, truncated: bool) -> dict[str, Any]:
    """Parse compute-sanitizer's log: errors, and its first lines. In a truncated log, errors are counted one by one.

    Raises `CheckError` if a complete run left no summary.
    """
    found = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    counts = [re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", line) for line in found]
    totals = [int(count.group(1)) for count in counts if count]
    if not totals and not truncated:
        raise CheckError(f"compute-sanitizer gave no summary: {' | '.join(text.splitlines()[-3:])}")
    each = [line for line in found if re.match(r"(Invalid|Misaligned|Program hit|Error:|Warning: Race)", line)]
    return {"errors": totals[-1] if totals else len(each), "log": found[:20]}
