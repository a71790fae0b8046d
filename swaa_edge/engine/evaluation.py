"""Evaluate tokens of a `SwaaLlama`, one llama_decode per ubatch, with progress, cancellation and recovery.

evaluate(llm, Part(Phase.PREFILL, tokens, decode_from=len(tokens) - 128))
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from swaa_edge import native
from swaa_edge.engine.phases import Part, Phase
from swaa_edge.engine.translate import decode_failure
from swaa_edge.errors import GenerationCancelled

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

OnLogits = Callable[[np.ndarray], object]


def evaluate(llm: SwaaLlama, part: Part, on_logits: OnLogits | None = None) -> None:
    """Evaluate the tokens of `part` after the first `llm.n_tokens` tokens.

    `on_logits` and the errors are as in `SwaaLlama.eval`.
    """
    tokens, phase = part.tokens, part.phase
    done, started, timings = 0, time.perf_counter(), llm.last_timings
    report = llm.on_prefill if phase is Phase.PREFILL else None
    # The logits before a drafted token judge the token. All these logits must come from one llama_decode.
    drafted = phase is Phase.DECODE and len(tokens) > 1 and llm._phases.turn is not None
    every_row = llm._logits_all or drafted or on_logits is not None
    # If anything stops the evaluation, the engine no longer has the last token's logits.
    llm._requires_eval = True
    try:
        with decoding_from(llm, part.decode_from):
            if report:
                report(0, len(tokens))
            for chunk in _chunks(tokens, llm.n_batch, llm.n_batch if drafted else llm.context_params.n_ubatch):
                if llm._abort:
                    raise GenerationCancelled("cancelled")
                llm._kv_cache.snapshots.advance(llm.n_tokens, len(chunk))
                _decode(llm, chunk, every_row)
                done += len(chunk)
                if on_logits:
                    on_logits(_logits(llm, len(chunk)))
                if report:
                    native.load().llama_synchronize(llm.ctx)
                    report(done, len(tokens))
            if phase is Phase.PREFILL:
                native.load().llama_synchronize(llm.ctx)
                llm._kv_cache.snapshots.mark(llm.n_tokens)
    except RuntimeError as error:
        failed = failure(llm, error, tokens)
        _recover(llm)
        raise failed from error
    except BaseException:
        _recover(llm)
        raise
    finally:
        # generate() measures the decode time itself, with sampling.
        timings.add(phase, done, time.perf_counter() - started, with_decode_time=llm._phases.turn is None)


@contextlib.contextmanager
def decoding_from(llm: SwaaLlama, position: int) -> Iterator[None]:
    """Set the decode boundary of all sequences to `position` within the block."""
    if llm.swaa is None:
        yield
        return
    native.set_decode_from(llm.ctx, position)
    try:
        yield
    finally:
        # Chat handlers for images call llama_decode on the context themselves.
        native.set_decode_from(llm.ctx, native.AUTO)


def failure(llm: SwaaLlama, error: RuntimeError, tokens: Sequence[int]) -> RuntimeError:
    """Return our error for an error that was raised while `tokens` were evaluated."""
    if llm._abort:
        return GenerationCancelled("cancelled")
    return decode_failure(error, tokens, n_vocab=llm._n_vocab, n_ctx=llm._n_ctx)


def _chunks(tokens: Sequence[int], n_batch: int, size: int) -> Iterator[Sequence[int]]:
    # Upstream passes batches to llama_decode, which splits them into ubatches. The same ubatches here give the same
    # results to the bit.
    for start in range(0, len(tokens), n_batch):
        end = min(start + n_batch, len(tokens))
        for first in range(start, end, size):
            yield tokens[first : min(first + size, end)]


def _decode(llm: SwaaLlama, tokens: Sequence[int], every_row: bool) -> None:
    """Run one llama_decode.

    every_row: compute the logits of every token. Otherwise only the last token gets logits.
    """
    past, count = llm.n_tokens, len(tokens)
    llm._phases.rows = 0
    llm._batch.set_batch(batch=tokens, n_past=past, logits_all=every_row)
    llm._ctx.decode(llm._batch)
    llm.input_ids[past : past + count] = tokens
    if llm._logits_all:
        llm.scores[past : past + count, :] = _logits(llm, count)
    llm.n_tokens += count
    llm._phases.rows, llm._phases.end = count if every_row else 1, llm.n_tokens
    llm._requires_eval = False


def _logits(llm: SwaaLlama, count: int) -> np.ndarray:
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(count, llm._n_vocab))


def _recover(llm: SwaaLlama) -> None:
    """Remove the tokens from the cache that were not evaluated completely."""
    llm._forget_cancel()
    llm._phases.sampled = None
    # An aborted batch can leave ubatches in the cache. A recurrent state can't drop tokens.
    if not llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens, -1):
        llm.reset()
