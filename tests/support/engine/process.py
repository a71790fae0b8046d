"""The real engine under test, in a child process.

llama.cpp answers a broken assumption with abort(), which would take pytest along; here it becomes `EngineDied` with
the log's tail, and the next call starts a fresh child. One child serves many runs, and each run has its own model and
context, so runs can't influence each other. A run's steps are fixed beforehand; where the next step depends on the
last answer, `open` keeps one context and takes calls one at a time.

Use: `Engine(library_dir()).run("tiny.gguf", [("decode", tokens_of([5, 9, 2]))], {"swaa.window_size": 7})`
     `context = engine.open("tiny.gguf"); context.call("seq_rm", 0, 40, -1).value`
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support import module_environment

TIMEOUT_SECONDS = 300.0


class EngineError(RuntimeError):
    """The engine refused a model, a context or a batch; the message holds its reason and the log's tail."""


class EngineDied(EngineError):
    """The child process ended by itself: an abort, a crash, or no answer in time."""


@dataclass(frozen=True)
class Settings:
    """What llama_context_params gets. kv: type of K and V; sequences: n_seq_max; policy: forced before creation;
    swa_full: sliding layers keep everything, no ring; gpu_layers: of the model, on the GPU if the library has one."""

    n_ctx: int = 2048
    n_batch: int = 512
    n_ubatch: int = 512
    sequences: int = 1
    threads: int = 1
    kv: str = "f16"
    flash_attn: bool = True
    unified: bool = True
    policy: str = "auto"
    swa_full: bool = False
    gpu_layers: int = 0


@dataclass
class Result:
    """logits: one float32 [rows, vocab] per "decode" step, rows in batch order; policy: name in use, "off" without
    SWAA; config: what the library says about the model (None without SWAA); state: bytes of each "state_get"; log."""

    logits: list[np.ndarray] = field(default_factory=list)
    policy: str = "off"
    config: dict | None = None
    state: list[int] = field(default_factory=list)
    log: str = ""


@dataclass(frozen=True)
class Answer:
    """value: what the C function returned (see engine_calls.Calls); reason: llama_swaa_last_error after it."""

    value: Any
    reason: str


class Context:
    """A model and a context that stay open in the child until another is opened or a run is made."""

    def __init__(self, engine: Engine, config: dict | None, policy: str):
        self.engine, self.config, self.policy = engine, config, policy

    def call(self, name: str, *arguments) -> Answer:
        """Call the method `name` of engine_calls.Calls; EngineDied if that ends the process."""
        return Answer(**self.engine.request("call", name, arguments))

    def close(self) -> None:
        self.engine.request("close")


def tokens_of(tokens: Sequence[int], start: int = 0, seq: int | tuple[int, ...] = 0) -> list[tuple]:
    """A batch of consecutive tokens of one sequence (or of several that share them), all with logits wanted.

    Each entry of a batch is (token, position, sequence ids, want logits).
    """
    owners = seq if isinstance(seq, tuple) else (seq,)
    return [(int(token), start + i, owners, True) for i, token in enumerate(tokens)]


def library_dir() -> Path:
    """Folder of the patched library, as swaa_edge itself finds it (SWAA_EDGE_LIB_PATH, or the installed one)."""
    from swaa_edge import native

    return native.library_dir()


class Engine:
    """A child process that runs models with the llama.cpp library of one folder.

    A step is one of
      ("decode", batch) or ("decode", batch, phase)   llama_decode; phase is set before it and stays
      ("decode_plain", tokens)                        llama_batch_get_one; logits of the last token
      ("phase", name)                                 llama_swaa_set_phase
      ("seq_rm", seq, p0, p1), ("seq_cp", from, to, p0, p1), ("seq_keep", seq), ("seq_add", seq, p0, p1, delta)
      ("state_get", seq), ("state_set", seq)          take a sequence's state; put it into a sequence
      ("threads", n)                                  n threads from here on
      ("abort",)                                      what llama.cpp does about a broken assumption
    or any other method of engine_calls.Calls, whose answer is dropped.

    own_kernels: with the library's own attention kernels for the CPU; else upstream's, which compute the unpatched
    library's bits.
    """

    def __init__(self, library: Path, own_kernels: bool = True):
        self.library, self.own_kernels = Path(library), own_kernels
        self.child: subprocess.Popen | None = None
        self.has_swaa, self.abi = False, 0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def start(self) -> None:
        """Start the child now, if it doesn't run; afterwards `has_swaa` says whether the library has our functions,
        and `abi` in which version."""
        if self.child is not None:
            return
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        environment = module_environment(LLAMA_CPP_LIB_PATH=str(self.library.resolve()))
        if not self.own_kernels:
            environment["GGML_CPU_FATTN"] = "0"
        self.child = subprocess.Popen(
            [sys.executable, "-m", "support.engine.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
        )
        greeting = self._receive()
        self.has_swaa, self.abi = greeting["swaa"], greeting["abi"]

    def run(self, model: Path, steps: Sequence[tuple], overrides: dict | None = None, **settings) -> Result:
        """Load `model` with `overrides` (key -> bool, int, float or str), make a context, execute `steps`.

        settings: the fields of Settings. EngineError if anything is refused, EngineDied if the child is lost.
        """
        answer = self.request("run", *self._arguments(model, overrides, settings), list(steps))
        return Result(log=self._log(), **answer)

    def open(self, model: Path, overrides: dict | None = None, **settings) -> Context:
        """As `run`, but the context stays open for calls; whatever was open before is closed."""
        return Context(self, **self.request("open", *self._arguments(model, overrides, settings)))

    def request(self, name: str, *arguments) -> dict:
        """Have the child call its method `name`."""
        self.start()
        if name != "call":
            self.errors.seek(0, os.SEEK_END)
            self.mark = self.errors.tell()
        body = pickle.dumps((name, *arguments))
        try:
            self.child.stdin.write(struct.pack("<Q", len(body)) + body)
            self.child.stdin.flush()
        except BrokenPipeError:
            self._lost("it had ended already")
        answer = self._receive()
        if "error" in answer:
            raise EngineError(f"{answer['error']}\n{self._log()[-3000:]}")
        return answer

    @staticmethod
    def _arguments(model: Path, overrides: dict | None, settings: dict) -> tuple:
        return str(model), dict(overrides or {}), asdict(Settings(**settings))

    def close(self) -> None:
        """End the child; a later run starts a new one."""
        if self.child is not None:
            self.child.stdin.close()
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
            self.child.stdout.close()
            self.errors.close()
            self.child = None

    def _log(self) -> str:
        self.errors.seek(getattr(self, "mark", 0))
        return self.errors.read().decode("utf-8", "replace")

    def _lost(self, why: str) -> None:
        self.child.kill()
        code = self.child.wait()
        log = self._log()[-3000:]
        self.child.stdout.close()
        self.errors.close()
        self.child = None
        if code < 0 and code != -signal.SIGKILL:
            why = f"signal {signal.Signals(-code).name}"
        raise EngineDied(f"the engine's process was lost ({why}, exit code {code}):\n{log}")

    def _receive(self) -> dict:
        size = struct.unpack("<Q", self._read(8))[0]
        return pickle.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        pipe, parts = self.child.stdout.fileno(), []
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while size:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(pipe, min(size, 1 << 20)) if ready else b""
            if not part:
                self._lost("its pipe closed" if ready else f"no answer in {TIMEOUT_SECONDS:.0f} s")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
