"""Runs the stages of the GPU check. A stage that already finished with the same inputs is skipped.

Each result is stored in the work folder as a JSON file, with a fingerprint of the inputs. So the next call resumes a
run that stopped early.

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
    """A step failed, or a program is missing. The message is for the person who runs the check."""


class OutOfTime(Exception):
    """The time limit of this call was exceeded. `partial` is the stage's incomplete result."""

    def __init__(self, partial: Result | None = None) -> None:
        super().__init__("out of time")
        self.partial = partial


def execute(command: Sequence[str], seconds: float = math.inf, **options: Any) -> tuple[int | None, str, str]:
    """Run a command for at most `seconds`. Return the exit code, stdout and stderr.

    The exit code is None if the command was killed. The command has its own process group, so child processes are also
    killed.

    options: arguments of Popen.
    """
    child = subprocess.Popen(command, text=True, errors="replace", start_new_session=True, **options)
    try:
        output, errors = child.communicate(timeout=None if seconds == math.inf else max(seconds, 1))
        return child.returncode, output, errors
    except subprocess.TimeoutExpired:
        for end in (signal.SIGTERM, signal.SIGKILL):  # a process that waits for the GPU may ignore SIGTERM
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

    work: work folder. Results are stored in the subfolder results/.
    deadline: the value of time.monotonic() at which this call must end.
    """

    def __init__(self, work: Path, deadline: float = float("inf"), say: Callable[[str], object] | None = None) -> None:
        self.folder = work / "results"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.deadline = deadline
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        #: Unfinished stages, as {name: reason}.
        self.open: dict[str, str] = {}

    def left(self) -> float:
        """Seconds left in this call."""
        return self.deadline - time.monotonic()

    def run(self, name: str, inputs: Any, work: Callable[[], Result], needs: float = 0.0) -> Result | None:
        """Return the result of stage `name`. Calls `work()` if no finished result is stored for these inputs.

        inputs: the plain JSON values that the result depends on.
        needs: minimum number of seconds left to start the stage.

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
            # GPU time is short, so a broken stage must not stop the others.
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
