"""The KV cache of a loaded model: go back to an earlier position, reuse a prefix, shift the context.

A ring buffer holds only the sinks, the window and a little more. If the ring doesn't reach back far enough, a snapshot
of the ring is tried. If no snapshot helps, the caller evaluates the tokens again or gets an error.

    end = cache.reach(llm.input_ids[: llm.n_tokens], prompt); cache.cut(end)
"""

from __future__ import annotations

import numpy as np

from swaa_edge import native
from swaa_edge.config import SwaaConfig
from swaa_edge.engine.snapshots import Snapshots
from swaa_edge.errors import GenerationError


class KVCache:
    """The KV cache of sequence 0. The caller keeps track of the number of valid tokens.

    context: the `llama_context *`.
    swaa: the settings of the context, or None for full attention.
    n_snapshots: maximum number of copies of the ring.
    """

    def __init__(self, context: int, swaa: SwaaConfig | None, n_snapshots: int) -> None:
        self._context, self._swaa = context, swaa
        self.snapshots = Snapshots(context, n_snapshots)

    def cut(self, n_tokens: int) -> None:
        """Keep only the first `n_tokens` tokens.

        Raises `GenerationError` if the ring doesn't reach back that far. The cache is then unchanged.
        """
        llama_cpp = native.load()
        memory = llama_cpp.llama_get_memory(self._context)
        if memory and not llama_cpp.llama_memory_seq_rm(memory, 0, n_tokens, -1):
            raise GenerationError(
                f"the cache can't go back to {n_tokens} tokens: the ring no longer holds all tokens that the next "
                "token must see; call reset() and evaluate all tokens again, or load the model with swa_full=True"
            )

    def reach(self, held: np.ndarray, tokens: list[int], has_logits: bool = False) -> int | None:
        """Restore a snapshot if the ring doesn't reach back to where `tokens` differ from the held tokens.

        held: the tokens in the cache.
        tokens: the new tokens, from the start of the sequence.
        has_logits: whether the engine holds the logits of the last token.

        Returns None if llama_cpp can cut the cache itself. Otherwise returns the number of tokens to keep. 0 means that
        all tokens must be evaluated again.
        """
        length = min(len(held), len(tokens))
        differs = held[:length] != np.asarray(tokens[:length], np.intc)
        shared = int(differs.argmax()) if differs.any() else length
        if shared == len(tokens) == len(held) and has_logits:
            return None
        position = shared - (shared == len(tokens))  # evaluate the last token again, for its logits
        if native.can_continue(self._context, 0, position):
            return None
        return self.snapshots.restore(position) or 0

    def check_shift(self, n_tokens: int, n_discard: int | None, n_keep: int | None) -> tuple[int, int]:
        """Return n_discard and n_keep for a context shift of `n_tokens` tokens. None is replaced by a default.

        Raises `GenerationError` if a number is out of range, or if the model or its ring can't make the shift.
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
        # Two kinds of tokens become visible. Kept tokens can enter the window. If n_keep is less than the number of
        # sinks, other tokens move down and become sinks.
        return native.holds(self._context, 0, end - swaa.window_size + 1, n_keep) and native.holds(
            self._context, 0, n_keep + n_discard, min(swaa.sink_count, end) + n_discard
        )

    def shift(self, n_tokens: int, n_discard: int, n_keep: int) -> bool:
        """Discard the `n_discard` tokens after the first `n_keep`, and move the later tokens down.

        n_discard, n_keep: the result of `check_shift`.

        Returns False if the engine failed to move the later tokens. All tokens must then be evaluated again.
        Raises `GenerationError` if the engine refuses the shift. The cache is then unchanged.
        """
        llama_cpp = native.load()
        memory, start = llama_cpp.llama_get_memory(self._context), n_keep + n_discard
        # Cells after the first n_tokens must not move along.
        for first, last in ((n_tokens, -1), (n_keep, start)):
            if not llama_cpp.llama_memory_seq_rm(memory, 0, first, last):
                raise GenerationError(f"the engine can't discard tokens: {native.last_error()}")
        llama_cpp.llama_memory_seq_add(memory, 0, start, -1, -n_discard)
        self.snapshots.invalidate(n_keep)
        return llama_cpp.llama_memory_seq_pos_max(memory, 0) == n_tokens - n_discard - 1


def shift_range(n_tokens: int, n_discard: int | None, n_keep: int | None, sinks: int) -> tuple[int, int]:
    """Replace None by defaults, and return n_discard and n_keep. Raises `GenerationError` for numbers out of range."""
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
