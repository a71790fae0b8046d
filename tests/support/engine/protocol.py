"""Requests to a child process that may crash: pickles with their length in front, on its stdin and stdout.

llama.cpp answers a broken assumption with abort(), which would take pytest along. So C runs in a child, and an abort
becomes `EngineDied` with the end of its log; the next request starts a fresh child. Whatever C prints goes to the
child's stderr.

    class Kernels(ChildProcess): ...          # the parent: self.request("attend", case) -> dict
    serve(Child())                            # the child: calls the method that a request names, until stdin ends
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

from support import module_environment

TIMEOUT_SECONDS = 300.0


class EngineError(RuntimeError):
    """The child refused a request, such as a model, a context or a batch; with its reason and the end of the log."""


class EngineDied(EngineError):
    """The child process ended by itself: an abort, a crash, or no response in time."""


class ChildProcess:
    """A child that runs `python -m MODULE ARGUMENTS` with the library of one folder; starts with the first request."""

    module: str

    def __init__(self, library: Path):
        self.library = Path(library)
        self.child: subprocess.Popen | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def command(self) -> tuple[list[str], dict[str, str]]:
        """Arguments of the module and variables of its environment."""
        return [], {}

    def start(self) -> None:
        """Start the child unless it runs."""
        if self.child is not None:
            return
        arguments, variables = self.command()
        self.files = contextlib.ExitStack()
        self.errors, self.mark = self.files.enter_context(new_log()), 0
        self.child = subprocess.Popen(
            [sys.executable, "-m", self.module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=module_environment(**variables),
        )
        self.files.callback(self.child.stdout.close)

    def request(self, name: str, *arguments) -> dict[str, Any]:
        """Have the child call its method `name`; returns the dict it gives. Raises EngineError or EngineDied."""
        self.start()
        body = pickle.dumps((name, *arguments))
        try:
            self.child.stdin.write(struct.pack("<Q", len(body)) + body)
            self.child.stdin.flush()
        except BrokenPipeError:
            self._lost("it had ended already")
        response = self._receive()
        if "error" in response:
            raise EngineError(f"{response['error']}\n{self.log()[-3000:]}")
        return response

    def log(self) -> str:
        """The child's stderr since `clear_log`."""
        self.errors.seek(self.mark)
        return self.errors.read().decode("utf-8", "replace")

    def clear_log(self) -> None:
        self.mark = self.errors.seek(0, os.SEEK_END)

    def close(self) -> None:
        """End the child; the next request starts a new one."""
        if self.child is not None:
            self.child.stdin.close()
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
            self.files.close()
            self.child = None

    def _lost(self, why: str) -> None:
        self.child.kill()
        code = self.child.wait()
        log = self.log()[-3000:]
        self.files.close()
        self.child = None
        if code < 0 and code != -signal.SIGKILL:
            why = f"signal {signal.Signals(-code).name}"
        raise EngineDied(f"the engine's process was lost ({why}, exit code {code}):\n{log}")

    def _receive(self) -> dict[str, Any]:
        size = struct.unpack("<Q", self._read(8))[0]
        return pickle.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        pipe, parts = self.child.stdout.fileno(), []
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while size:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(pipe, min(size, 1 << 20)) if ready else b""
            if not part:
                self._lost("its pipe closed" if ready else f"no response in {TIMEOUT_SECONDS:.0f} s")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def new_log() -> BinaryIO:
    return tempfile.TemporaryFile()


def claim_stdout() -> BinaryIO:
    """The child's pipe to its parent; from here on, whatever C prints to stdout goes to stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out


def send(out: BinaryIO, response: dict[str, Any]) -> None:
    body = pickle.dumps(response)
    out.write(struct.pack("<Q", len(body)) + body)
    out.flush()


def serve(child: object, out: BinaryIO) -> None:
    """Call the methods of `child` that the requests on stdin name, until stdin ends."""
    while head := sys.stdin.buffer.read(8):
        name, *arguments = pickle.loads(sys.stdin.buffer.read(struct.unpack("<Q", head)[0]))
        try:
            response = getattr(child, name)(*arguments)
        except Exception as error:  # reported to the parent, which raises it there
            response = {"error": f"{type(error).__name__}: {error}"}
        send(out, response)
