"""Runs one heavy step of a conversion in a separate Python process.

A child process protects the caller. Torch keeps gigabytes of memory until the process ends. llama.cpp calls abort() on
internal errors. The system kills a process that uses too much memory.

    child.run("swaa_edge.convert.lora_merge:merge", {"base": base, "adapter": adapter, "output": folder})
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import swaa_edge
from swaa_edge import errors

# Longer messages quote data, so only the beginning is kept.
_REASON_LIMIT = 400


class ChildError(Exception):
    """A step failed with an error other than a `SwaaError`. The message is one line."""


def run(task: str, request: Mapping[str, Any], *, verbose: bool = False) -> Any:
    """Call the function `task` in a child process. Return the function's result.

    task: the function, as "module:function".
    request: the keyword arguments. Arguments and result are passed as JSON, paths as text.
    verbose: show the child's stderr and all logs. Without `verbose`, stderr is shown only on a terminal, without logs.

    Hugging Face libraries work offline in the child process.

    Raises the `SwaaError` that the task raised, `OSError` if the disk is full, or `ChildError` for any other failure.
    """
    with tempfile.TemporaryDirectory(prefix="swaa-edge-") as scratch:
        report = Path(scratch, "report.json")
        program = [sys.executable, str(Path(__file__).with_name("child_main.py")), swaa_edge.__file__, task]
        done = subprocess.run(
            [*program, json.dumps(request, default=os.fspath), str(report)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if verbose or sys.stderr.isatty() else subprocess.PIPE,
            env=_environment(verbose),
            check=False,
        )
        if done.returncode == 130:
            raise KeyboardInterrupt
        if not report.exists():
            raise ChildError(_death(done.returncode, done.stderr or b""))
        outcome = json.loads(report.read_text(encoding="utf-8"))
    if "result" in outcome:
        return outcome["result"]
    reason = outcome["reason"] or "no reason given"
    if "ours" in outcome:
        raise getattr(errors, outcome["ours"])(reason)
    if "errno" in outcome:
        raise OSError(outcome["errno"], reason)
    raise ChildError(reason if len(reason) <= _REASON_LIMIT else reason[:_REASON_LIMIT] + " ...")


def _environment(verbose: bool) -> dict[str, str]:
    # With NO_LOCAL_GGUF, the converter would not use its own gguf package.
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_LOCAL_GGUF", "SWAA_EDGE_VERBOSE")}
    loud = {"SWAA_EDGE_VERBOSE": "1"} if verbose else {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    # Bytecode files would change upstream's folder.
    return kept | loud | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _death(code: int, log: bytes) -> str:
    lines = log.decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if code == -9:  # SIGKILL, a name that Windows doesn't have
        return "it was killed, most likely because memory ran out"
    ended = f"it died of {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"
    return f"{ended}: {last}"[:_REASON_LIMIT] if last else ended
