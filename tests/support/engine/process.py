"""The real engine under test, in a child process.

One child serves many runs, and each run has its own model and context, so runs can't influence each other. The steps of
a run are fixed beforehand; where the next step depends on the last response, `open` keeps one context and takes calls
one at a time.

Use: `Engine(library_dir()).run("tiny.gguf", [("decode", tokens_of([5, 9, 2]))], {"swaa.window_size": 7})`
     `context = engine.open("tiny.gguf"); context.call("seq_rm", 0, 40, -1).value`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support.engine.protocol import ChildProcess, EngineDied, EngineError

__all__ = ["Context", "ContextParams", "Engine", "EngineDied", "EngineError", "Result", "library_dir", "tokens_of"]


@dataclass(frozen=True)
class ContextParams:
    """Parameters of the model and context.

    sequences: n_seq_max. kv: type of K and V. policy: forced before the context is created. swa_full: sliding layers
    keep everything, no ring. gpu_layers: layers on the GPU, if the library supports one.
    """

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
    """What a run gave.

    logits: one float32 [rows, vocab] per "decode" step, rows in batch order. policy: the one in use, "off" without
    SWAA. config: the model's configuration according to the library, None without SWAA. state: size in bytes of each
    "state_get". log: the child's stderr.
    """

    logits: list[np.ndarray] = field(default_factory=list)
    policy: str = "off"
    config: dict | None = None
    state: list[int] = field(default_factory=list)
    log: str = ""


@dataclass(frozen=True)
class Answer:
    """value: what the C function returned (see calls.Calls); reason: llama_swaa_last_error afterwards."""

    value: Any
    reason: str


class Context:
    """A model and a context that stay open in the child until another is opened or a run is made."""

    def __init__(self, engine: Engine, config: dict | None, policy: str):
        self.engine, self.config, self.policy = engine, config, policy

    def call(self, name: str, *arguments) -> Answer:
        """Call the method `name` of calls.Calls; EngineDied if that ends the process."""
        return Answer(**self.engine.request("call", name, arguments))

    def close(self) -> None:
        self.engine.request("close")


def tokens_of(tokens: Sequence[int], start: int = 0, seq: int | tuple[int, ...] = 0) -> list[tuple]:
    """A batch of consecutive tokens of one sequence (or of several that share them), all with logits.

    Each entry of a batch is (token, position, sequence ids, want logits).
    """
    owners = seq if isinstance(seq, tuple) else (seq,)
    return [(int(token), start + i, owners, True) for i, token in enumerate(tokens)]


def library_dir() -> Path:
    """Folder of the patched library, as swaa_edge itself finds it (SWAA_EDGE_LIB_PATH, or the installed one)."""
    from swaa_edge import native

    return native.library_dir()


class Engine(ChildProcess):
    """A child process that runs models with the llama.cpp library of one folder.

    A step is one of
      ("decode", batch) or ("decode", batch, phase)   llama_decode; phase is set before it and stays
      ("decode_plain", tokens)                        llama_batch_get_one; logits of the last token
      ("decode_from", seq, position)                  llama_swaa_set_decode_from
      ("phase", name)                                 the same for all sequences: "auto", "prefill" or "decode"
      ("seq_rm", seq, p0, p1), ("seq_cp", from, to, p0, p1), ("seq_keep", seq), ("seq_add", seq, p0, p1, delta)
      ("state_get", seq), ("state_set", seq)          get a sequence's state; set it in a sequence
      ("threads", n)                                  n threads from here on
      ("abort",)                                      what llama.cpp does about a broken assumption
    or any other method of calls.Calls, whose result is dropped.

    own_kernels: use the library's own attention kernels on the CPU; otherwise upstream's, which compute the unpatched
    library's bits.
    """

    module = "support.engine.child"

    def __init__(self, library: Path, own_kernels: bool = True):
        super().__init__(library)
        self.own_kernels, self.has_swaa, self.abi = own_kernels, False, 0

    def command(self) -> tuple[list[str], dict[str, str]]:
        own = {} if self.own_kernels else {"GGML_CPU_FATTN": "0"}
        return [], {"LLAMA_CPP_LIB_PATH": str(self.library.resolve()), **own}

    def start(self) -> None:
        """Start the child unless it runs; sets `has_swaa`, whether the library has our functions, and their `abi`."""
        if self.child is None:
            super().start()
            greeting = self._receive()
            self.has_swaa, self.abi = greeting["swaa"], greeting["abi"]

    def run(self, model: Path, steps: Sequence[tuple], overrides: dict | None = None, **params) -> Result:
        """Load `model` with `overrides` (key -> bool, int, float or str), make a context, execute `steps`.

        params: fields of ContextParams. EngineError if anything is refused, EngineDied if the child is lost.
        """
        response = self._request("run", model, overrides, params, list(steps))
        return Result(log=self.log(), **response)

    def open(self, model: Path, overrides: dict | None = None, **params) -> Context:
        """As `run`, but the context stays open for calls; a context that was open before is closed."""
        return Context(self, **self._request("open", model, overrides, params))

    def _request(self, name: str, model: Path, overrides: dict | None, params: dict, *more) -> dict:
        self.start()
        self.clear_log()
        return self.request(name, str(model), dict(overrides or {}), asdict(ContextParams(**params)), *more)
