"""Runs test-backend-ops for flash attention, directly or under compute-sanitizer, and parses the output.

result = run_ops(Path("build/bin/test-backend-ops"), "CUDA0", "FLASH_ATTN_EXT", seconds=540, jobs=16)
result["passed"], result["total"], result["unsupported"], result["failures"]
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gpu.runner import CheckError, OutOfTime, Result, execute

#: The ops of upstream's cases, and of our cases with a block table.
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
) -> Result:
    """Run test-backend-ops for one op. Return the result of `read_ops`.

    seconds: time limit.
    params: regular expression that selects cases by their parameters.
    wrapper: command that runs test-backend-ops, such as compute-sanitizer.

    At the time limit, raises `OutOfTime` with the results of the finished cases. Raises `CheckError` if no case was
    run.
    """
    command = [*wrapper, str(program), "test", "-b", backend, "-o", op]
    command += (["-p", params] if params else []) + (["-j", str(jobs)] if jobs > 1 else [])
    try:
        code, output, errors = execute(command, seconds, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        raise CheckError(f"{program} does not run: {error}") from None
    result = read_ops(op, output, errors, code)
    if code is None:
        raise OutOfTime(result)
    if not result["failures"] and result["total"] == result["unsupported"] == 0:
        raise CheckError(f"test-backend-ops has no matching case of {op} on this backend")
    return result


def read_ops(op: str, output: str, errors: str, code: int | None) -> Result:
    """Parse the output of test-backend-ops.

    The result holds passed, total, unsupported, exit_code and failures (at most 20 lines).

    code: exit code, or None for a stopped run.

    For a stopped run, `truncated` is true and only finished cases are counted. Raises `CheckError` if the exit code is
    0 but the output has no summary.
    """
    lines = [_COLOURS.sub("", line).strip() for line in output.splitlines()]
    # A failed case's error message precedes the name on the same line.
    mine = [line for line in lines if f"{op}(" in line]
    unsupported = [line for line in mine if "not supported" in line]
    failures = [line for line in mine if "FAIL" in line.rsplit("):", 1)[-1]]
    passed = sum(line.endswith("OK") for line in mine)
    counts = passed, passed + len(failures)
    if code is not None:
        summary = re.findall(r"(\d+)/(\d+) tests passed", output)
        counts = map(int, summary[0]) if summary else (0, 0)
        if not summary:
            tail = " | ".join(_COLOURS.sub("", line) for line in (output + "\n" + errors).strip().splitlines()[-4:])
            if code == 0:
                raise CheckError(f"test-backend-ops ran no case of {op}: {tail}")
            # A crash counts as a failure.
            failures.append(f"ended early with code {code}: {tail}"[:600])
    return {
        "op": op,
        **dict(zip(("passed", "total"), counts, strict=True)),
        "unsupported": len(unsupported),
        "examples_unsupported": unsupported[:5],
        "failures": failures[:20],
        "exit_code": code or 0,
        "truncated": code is None,
    }


def sanitize(program: Path, backend: str, tool: str, *, seconds: float, params: str | None) -> Result:
    """Run our cases under a `tool` of compute-sanitizer. Return the result of `run_ops` and the errors."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise CheckError("compute-sanitizer is not installed; it is part of CUDA's toolkit")
    log = program.parent / f"{tool}.log"
    wrapper = [sanitizer, "--tool", tool, "--log-file", str(log), "--error-exitcode", "0"]
    try:
        result = run_ops(program, backend, OPS[1], seconds=seconds, params=params, wrapper=wrapper)
    except OutOfTime as late:
        # The sanitizer is a hundred times slower, so the finished cases are the result.
        result = late.partial or {}
    found = read_log(log.read_text(errors="replace") if log.exists() else "", result["truncated"])
    return result | {"tool": tool} | found


def read_log(text: str, truncated: bool) -> Result:
    """Return the number of errors in compute-sanitizer's log, and the first lines of the report.

    A truncated log has no summary, so the error lines are counted. Raises `CheckError` if a complete log has no
    summary.
    """
    found = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    counts = [re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", line) for line in found]
    totals = [int(count.group(1)) for count in counts if count]
    if not totals and not truncated:
        raise CheckError(f"compute-sanitizer gave no summary: {' | '.join(text.splitlines()[-3:])}")
    each = [line for line in found if re.match(r"(Invalid|Misaligned|Program hit|Error:|Warning: Race)", line)]
    return {"errors": totals[-1] if totals else len(each), "log": found[:20]}
