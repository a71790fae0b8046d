"""The fraction of each layer's attention that a window and its sinks would see: the "lazy ratio", as a baseline.

A layer that attends to little else than its surroundings and the start of the text is lazy: it needs no full attention.
A layer with a low fraction reaches far back. The measurement is cheap, one pass over each sample, but where a layer
attends predicts less well than a loss what the layer is needed for.

    fractions = visible_attention(load, SwaaConfig(2048, 100), n_layers, cases)

Flash attention stores no probabilities, so the prompts run in a second context without it, where llama.cpp passes each
layer's softmax ("kq_soft_max") for the last tokens of a sample to a callback.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from swaa_edge.calibrate.cases import Case
from swaa_edge.calibrate.losses import Load
from swaa_edge.config import FULL_ATTENTION, SwaaConfig
from swaa_edge.engine.settings import CACHE_TYPES, CONTEXT_STEP
from swaa_edge.errors import GenerationCancelled, GenerationError, UnsupportedModelError
from swaa_edge.support.interrupt import interruptible

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

#: The attention of so many tokens at the end of each sample is measured.
QUERIES = 32
_UBATCH = 128
_NAME = b"kq_soft_max-"
# What llama_decode returns when the abort callback ended it.
_ABORTED = 2


def visible_attention(load: Load, swaa: SwaaConfig, n_layers: int, cases: Sequence[Case]) -> list[float]:
    """Per layer, from 0 to 1: the mean over cases, heads and the last `QUERIES` tokens under full attention.

    Ctrl-C stops it within one ubatch. Raises `UnsupportedModelError` for a model whose attention probabilities can't
    be read, and the errors of loading and running it.
    """
    sums = np.zeros(n_layers)
    n_tokens = max(map(len, cases))
    with (
        contextlib.closing(load(FULL_ATTENTION, CONTEXT_STEP)) as llm,
        contextlib.closing(_Softmax(llm, n_tokens)) as softmax,
    ):
        for case in cases:
            tokens = [*case.prompt, *case.answer[:-1]]
            queries = min(QUERIES, len(tokens))
            with interruptible(llm):
                found = softmax.last_rows(tokens, queries)
            if sorted(found) != list(range(n_layers)):
                raise UnsupportedModelError(
                    f"only {len(found)} of the model's {n_layers} layers show their attention; use another --method"
                )
            for layer, rows in found.items():
                sums[layer] += visible_fraction(rows, len(tokens) - queries, swaa)
    return (sums / len(cases)).tolist()


def visible_fraction(rows: np.ndarray, first: int, swaa: SwaaConfig) -> float:
    """The mean attention inside window and sinks.

    rows: probabilities [heads, queries, keys]; queries start at position `first`, keys at 0.
    """
    positions, keys = np.arange(first, first + rows.shape[1])[:, None], np.arange(rows.shape[2])[None]
    seen = (keys <= positions) & ((positions - keys < swaa.window_size) | (keys < swaa.sink_count))
    return float((rows * seen).sum(axis=2, dtype=np.float64).mean())


class _Softmax:
    """A second context on the model of `llm`, without flash attention, from which each layer's softmax can be read."""

    def __init__(self, llm: SwaaLlama, n_tokens: int) -> None:
        from swaa_edge import native

        self._llama_cpp, self._ggml = native.load(), _ggml()
        self._caught: dict[int, np.ndarray] = {}
        self._reading, self._queries = False, 0
        self._error: Exception | None = None
        params = type(llm.context_params).from_buffer_copy(llm.context_params)
        self._callback = type(params.cb_eval)(self._on_tensor)
        params.cb_eval, params.cb_eval_user_data = self._callback, None
        params.flash_attn_type = self._llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = CACHE_TYPES["f16"]
        params.n_ctx, params.n_batch, params.n_ubatch = n_tokens, _UBATCH, _UBATCH
        self._context = self._llama_cpp.llama_init_from_model(llm.model, params)
        if not self._context:
            raise GenerationError(f"llama.cpp can't create a context of {n_tokens} tokens without flash attention")
        llm._abort.attach(self._context)  # so that cancel() ends this one, too

    def close(self) -> None:
        self._llama_cpp.llama_free(self._context)

    def last_rows(self, tokens: Sequence[int], queries: int) -> dict[int, np.ndarray]:
        """Per layer, the softmax of the last `queries` of these tokens: float32 [heads, queries, keys]."""
        self._caught.clear()
        self._llama_cpp.llama_memory_clear(self._llama_cpp.llama_get_memory(self._context), True)
        self._evaluate(tokens[:-queries])
        self._reading = True
        try:
            self._evaluate(tokens[-queries:])
        finally:
            self._reading = False
        if self._error is not None:
            raise GenerationError(f"the engine's attention can't be read: {self._error}")
        return self._caught

    def _evaluate(self, tokens: Sequence[int]) -> None:
        for at in range(0, len(tokens), _UBATCH):
            part = tokens[at : at + _UBATCH]
            self._queries = len(part)
            array = (self._llama_cpp.llama_token * len(part))(*part)
            batch = self._llama_cpp.llama_batch_get_one(array, len(part))
            code = self._llama_cpp.llama_decode(self._context, batch)
            if code == _ABORTED:
                raise GenerationCancelled("cancelled")
            if code:
                raise GenerationError(f"the engine failed with code {code} while computing attention")

    def _on_tensor(self, tensor: int, ask: bool, _: Any) -> bool:
        # llama.cpp asks whether to pass a tensor, then passes it; False then would end the run. An exception must not
        # reach C.
        try:
            name = self._ggml.ggml_get_name(tensor)
            if not self._reading or not name.startswith(_NAME):
                return not ask
            if not ask:
                self._caught[int(name[len(_NAME) :])] = _read(self._ggml, tensor, self._queries)
            return True
        except Exception as error:
            self._error = error
            return not ask


def _read(ggml: ctypes.CDLL, tensor: int, queries: int) -> np.ndarray:
    """The softmax of one layer, as [heads, queries, keys]; ggml states the dimensions in reverse order."""
    count, rows = ggml.ggml_nelements(tensor), ggml.ggml_nrows(tensor)
    if ggml.ggml_nbytes(tensor) != 4 * count or rows % queries:
        raise ValueError(f"{count} numbers in {rows} rows are not float32 probabilities of {queries} tokens")
    values = np.empty(count, np.float32)
    ggml.ggml_backend_tensor_get(tensor, values.ctypes.data_as(ctypes.c_void_p), 0, values.nbytes)
    return values.reshape(rows // queries, queries, count // rows)


def _ggml() -> ctypes.CDLL:
    from swaa_edge import native

    # Windows looks symbols up in one file only; elsewhere libllama also resolves those of ggml.
    if sys.platform == "win32":
        ggml = ctypes.CDLL(os.fspath(native.library_dir() / "ggml-base.dll"))
    else:
        ggml = native.load().llama_cpp._lib
    ggml.ggml_get_name.argtypes, ggml.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    for name, kind in (("nelements", ctypes.c_int64), ("nrows", ctypes.c_int64), ("nbytes", ctypes.c_size_t)):
        function = getattr(ggml, f"ggml_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p], kind
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    ggml.ggml_backend_tensor_get.restype = None
    return ggml
