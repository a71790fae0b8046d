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
from collections.abc import Callable, Iterator, Sequence
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
    with contextlib.closing(load(FULL_ATTENTION, CONTEXT_STEP)) as llm, _context(llm, n_tokens) as (evaluate, catch):
        for case in cases:
            tokens = [*case.prompt, *case.answer[:-1]]
            queries = min(QUERIES, len(tokens))
            with interruptible(llm):
                evaluate(tokens[:-queries], True)
                caught = catch(lambda tail=tokens[-queries:]: evaluate(tail, False))
            if sorted(caught) != list(range(n_layers)):
                raise UnsupportedModelError(
                    f"only {len(caught)} of the model's {n_layers} layers show their attention; use another --method"
                )
            for layer, rows in caught.items():
                sums[layer] += visible_fraction(rows, len(tokens) - queries, swaa)
    return (sums / len(cases)).tolist()


def visible_fraction(rows: np.ndarray, first: int, swaa: SwaaConfig) -> float:
    """The mean attention inside window and sinks.

    rows: probabilities [heads, queries, keys]; queries start at position `first`, keys at 0.
    """
    positions, keys = np.arange(first, first + rows.shape[1])[:, None], np.arange(rows.shape[2])[None]
    seen = (keys <= positions) & ((positions - keys < swaa.window_size) | (keys < swaa.sink_count))
    return float((rows * seen).sum(axis=2, dtype=np.float64).mean())


@contextlib.contextmanager
def _context(
    llm: SwaaLlama, n_tokens: int
) -> Iterator[tuple[Callable[..., None], Callable[..., dict[int, np.ndarray]]]]:
    """A second context on the model of `llm`, without flash attention.

    Yields evaluate(tokens, start), which clears the cache first if start is true, and catch(run), which returns the
    softmax of each layer that llama.cpp computes during run(): float32 [heads, queries, keys].
    """
    from swaa_edge import native

    llama_cpp, ggml = native.load(), _ggml()
    caught: dict[int, np.ndarray] = {}
    state: dict[str, Any] = {"on": False, "error": None, "queries": 0}

    def look(tensor: int, ask: bool, _: Any) -> bool:
        # An exception must not reach C. False means "don't pass this tensor" if ask is true, else "end the run".
        try:
            if not state["on"] or not ggml.ggml_get_name(tensor).startswith(_NAME):
                return not ask
            if not ask:
                layer = int(ggml.ggml_get_name(tensor)[len(_NAME) :])
                caught[layer] = _read(ggml, tensor, state["queries"])
            return True
        except Exception as error:
            state["error"] = error
            return not ask

    params = type(llm.context_params).from_buffer_copy(llm.context_params)
    callback = type(params.cb_eval)(look)
    params.cb_eval, params.cb_eval_user_data = callback, None
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = CACHE_TYPES["f16"]
    params.n_ctx, params.n_batch, params.n_ubatch = n_tokens, _UBATCH, _UBATCH
    context = llama_cpp.llama_init_from_model(llm.model, params)
    if not context:
        raise GenerationError(f"llama.cpp can't create a context of {n_tokens} tokens without flash attention")
    llm._abort.attach(context)  # so that cancel() ends this one, too
    memory = llama_cpp.llama_get_memory(context)

    def evaluate(tokens: Sequence[int], start: bool) -> None:
        if start:
            llama_cpp.llama_memory_clear(memory, True)
        for at in range(0, len(tokens), _UBATCH):
            part = tokens[at : at + _UBATCH]
            state["queries"] = len(part)
            array = (llama_cpp.llama_token * len(part))(*part)
            code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(part)))
            if code == _ABORTED:
                raise GenerationCancelled("cancelled")
            if code:
                raise GenerationError(f"the engine failed with code {code} while computing attention")

    def catch(run: Callable[[], None]) -> dict[int, np.ndarray]:
        caught.clear()
        state["on"] = True
        try:
            run()
        finally:
            state["on"] = False
        if state["error"] is not None:
            raise GenerationError(f"the engine's attention can't be read: {state['error']}")
        return dict(caught)

    try:
        yield evaluate, catch
    finally:
        llama_cpp.llama_free(context)


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
