"""Manage the KV cache of a loaded model, with or without a ring buffer: go back to an earlier position, reuse a prefix,
shift the context.

A ring holds only the sinks, the window and a little more, so the engine is asked whether the sequence can go back to a
position. If the ring doesn't reach back far enough, a snapshot of the ring is tried. If no snapshot reaches back far
enough either, the caller evaluates the tokens again or gets an error.

    end = cache.reach(llm.input_ids[: llm.n_tokens], prompt); cache.cut(end)
"""

from __future__ import annotations

import numpy as np

from swaa_edge import native
from swaa_edge.config import SwaaConfig
from swaa_edge.engine.snapshots import Snapshots
from swaa_edge.errors import GenerationError


class KVCache:
    """K and V of sequence 0 of a `llama_context *` that runs under `swaa`, with up to `n_snapshots` copies of its ring.

    The caller keeps track of the number of valid tokens.
    """

    def __init__(self, context: int, swaa: SwaaConfig | None, n_snapshots: int) -> None:
        self._context, self._swaa = context, swaa
        self.snapshots = Snapshots(context, n_snapshots)

    def cut(self, n_tokens: int) -> None:
        """Keep only the first `n_tokens` tokens. Raises `GenerationError` if the ring doesn't reach back that far; the
        cache is then unchanged."""
        llama_cpp = native.load()
        memory = llama_cpp.llama_get_memory(self._context)
        if memory and not llama_cpp.llama_memory_seq_rm(memory, 0, n_tokens, -1):
            raise GenerationError(
                f"the cache can't go back to {n_tokens} tokens: the ring no longer holds all tokens that the next "
                "token must see; call reset() and evaluate all tokens again, or load the model with swa_full=True"
            )

    def reach(self, held: np.ndarray, tokens: list[int], has_logits: bool = False) -> int | None:
        """If llama_cpp can't cut the cache itself because of a ring, restore the cache so that llama_cpp can continue
        with `tokens`.

        held: the tokens in the cache.
        has_logits: whether the engine holds the logits of the last token.

        Returns the number of tokens that the cache now holds (0 if all must be evaluated again), or None if llama_cpp
        can cut the cache itself.
        """
        length = min(len(held), len(tokens))
        differs = held[:length] != np.asarray(tokens[:length], np.intc)
        shared = int(differs.argmax()) if differs.any() else length
        if shared == len(tokens) == len(held) and has_logits:
            return None
        position = shared - (shared == len(tokens))  # the last token is evaluated again, for its logits
        if native.can_continue(self._context, 0, position):
            return None
        return self.snapshots.restore(position) or 0

    def check_shift(self, n_tokens: int, n_discard: int | None, n_keep: int | None) -> tuple[int, int]:
        """Return n_discard and n_keep for a context shift of `n_tokens` tokens, with defaults in place of None.

        Raises `GenerationError` if the model or its ring can't make this shift, or if the numbers are out of range.
        """
        llama_cpp = native.load()
        memory = llama_cpp.llama_get_memory(self._context)
        if memory is None or not llama_cpp.llama_memory_can_shift(memory):
            raise GenerationError("this model's keys can't move to other positions; evaluate the tokens to keep again")
        sinks = self._swaa.sink_count if self._swaa else 0
        n_discard, n_keep = shift_range(n_tokens, n_discard, n_keep, sinks)
        if self._swaa and not self._can_shift(self._swaa, n_tokens, n_discard, n_keep):
            raise GenerationError(
                f"the ring no longer holds all tokens that are visible after a shift by {n_discard} with "
                f"n_keep = {n_keep}; set n_keep = {sinks} and discard fewer tokens, "
                "or load the model with swa_full=True"
            )
        return n_discard, n_keep

    def _can_shift(self, swaa: SwaaConfig, n_tokens: int, n_discard: int, n_keep: int) -> bool:
        """Return whether the ring holds all tokens that the next token would see after the shift."""
        end = n_tokens - n_discard
        # Tokens that move down into the window were in the window. New to it are kept tokens that aren't sinks; new
        # among the sinks are tokens that move down there because fewer are kept.
        return native.holds(self._context, 0, end - swaa.window_size + 1, n_keep) and native.holds(
            self._context, 0, n_keep + n_discard, min(swaa.sink_count, end) + n_discard
        )

    def shift(self, n_tokens: int, n_discard: int, n_keep: int) -> bool:
        """Discard the `n_discard` tokens after the first `n_keep`, and move the rest of the `n_tokens` tokens down.

        n_discard, n_keep: the numbers that `check_shift` returned.

        Returns False if the engine failed to move the remaining tokens; all tokens must then be evaluated again. Raises
        `GenerationError` if the engine refuses the shift; the cache is then unchanged.
        """
        llama_cpp = native.load()
        memory, start = llama_cpp.llama_get_memory(self._context), n_keep + n_discard
        # Cells behind the tokens that count must not be moved along.
        for first, last in ((n_tokens, -1), (n_keep, start)):
            if not llama_cpp.llama_memory_seq_rm(memory, 0, first, last):
                raise GenerationError(f"the engine can't discard tokens: {native.last_error()}")
        llama_cpp.llama_memory_seq_add(memory, 0, start, -1, -n_discard)
        self.snapshots.invalidate(n_keep)
        return llama_cpp.llama_memory_seq_pos_max(memory, 0) == n_tokens - n_discard - 1


def shift_range(n_tokens: int, n_discard: int | None, n_keep: int | None, sinks: int) -> tuple[int, int]:
    """Return n_discard and n_keep with defaults in place of None. Raises `GenerationError` if they are out of range."""
    n_keep = max(sinks, 1) if n_keep is None else n_keep
    rest = n_tokens - n_keep
    if n_tokens < 3 or not 0 <= n_keep <= n_tokens - 2:
        raise GenerationError(
            f"n_keep = {n_keep} must be at least 0, and at least 2 of the {n_tokens} tokens must follow the kept ones"
        )
    n_discard = rest // 2 if n_discard is None else n_discard
    if not 0 < n_discard < rest:
        raise GenerationError(
            f"n_discard = {n_discard} must be from 1 to {rest - 1}: "
            f"{rest} of the {n_tokens} tokens follow the first n_keep"
        )
    return n_discard, n_keep
