"""Runs each stage of the GPU check once: a stage that already finished with the same inputs is skipped.

A stage's result is stored as a JSON file in the work folder, with a fingerprint of the stage's inputs. So a run that
stops early, at the time limit or by Ctrl-C, resumes at the next call.

    runner = Runner(work, deadline=time.monotonic() + 540); runner.run("oracle", inputs, lambda: {"cases": 3})
    code, output, errors = execute(["nvcc", "--version"], seconds=9, stdout=subprocess.PIPE)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class CheckError(Exception):
    """A step failed or this machine lacks a program; the message is for the person who runs the check."""


class OutOfTime(Exception):
    """The time limit of this call was exceeded. `partial` is the stage's incomplete result."""

    def __init__(self, partial: Result | None = None) -> None:
        super().__init__("out of time")
        self.partial = partial


def execute(command: Sequence[str], seconds: float = math.inf, **options: Any) -> tuple[int | None, str, str]:
    """Run a command for at most `seconds`; returns its exit code (None if it was killed), stdout and stderr.

    The command gets a process group of its own, so killing the command also kills its child processes, such as
    compilers.

    options: arguments of Popen.
    """
    child = subprocess.Popen(command, text=True, errors="replace", start_new_session=True, **options)
    try:
        output, errors = child.communicate(timeout=None if seconds == math.inf else max(seconds, 1))
        return child.returncode, output, errors
    except subprocess.TimeoutExpired:
        for end in (signal.SIGTERM, signal.SIGKILL):  # what waits for a card may ignore the first
            os.killpg(child.pid, end)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return None, *child.communicate(timeout=20)
        return None, "", ""
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()


class Runner:
    """Runs stages and keeps their results.

    work: folder in whose subfolder results/ the results are stored.
    deadline: the value of time.monotonic() at which this call must end.
    """

    def __init__(self, work: Path, deadline: float = float("inf"), say: Callable[[str], object] | None = None) -> None:
        self.folder = work / "results"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.deadline = deadline
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        #: Stages that are not finished when the call ends: the reason by name.
        self.open: dict[str, str] = {}

    def left(self) -> float:
        """Seconds left in this call."""
        return self.deadline - time.monotonic()

    def run(self, name: str, inputs: Any, work: Callable[[], Result], needs: float = 0.0) -> Result | None:
        """Return the stored result of stage `name`, or else call `work()` and return its result.

        inputs: the plain JSON values that the result depends on.
        needs: the number of seconds that must be left for the stage to start.

        Returns None if the stage has no result.
        """
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        kept = self._kept(name)
        if kept and kept["fingerprint"] == fingerprint and kept["complete"]:
            self.say(f"{name}: done before")
            return kept["result"]
        if self.left() <= needs:
            self.open[name] = "no time left"
            self.say(f"{name}: no time left")
            return kept["result"] if kept and kept["fingerprint"] == fingerprint else None
        self.say(f"{name}: started")
        started, complete = time.monotonic(), True
        try:
            result: Result | None = work()
        except CheckError as error:
            self.open[name] = str(error)
            self.say(f"{name}: {error}")
            return None
        except OutOfTime as error:
            self.open[name] = "no time left"
            result, complete = error.partial, False
        except Exception as error:
            # Time on a card is short: a stage that breaks must not stop the others.
            self.open[name] = f"{type(error).__name__}: {error}"
            self.say(f"{name}: {traceback.format_exc()}")
            return None
        seconds = round(time.monotonic() - started, 1)
        if result is not None:
            result = result | {"stage_seconds": seconds}
            self._keep(name, {"fingerprint": fingerprint, "complete": complete, "result": result})
        self.say(f"{name}: {'done' if complete else 'stopped'} after {seconds} s")
        return result

    def _kept(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _keep(self, name: str, document: dict[str, Any]) -> None:
        part = self.folder / f"{name}.json.part"
        part.write_text(json.dumps(document))
        part.replace(self.folder / f"{name}.json")
