"""Copies of a ring, by which a context can go back further than the ring itself reaches.

A ring holds the window and a ubatch. After an answer longer than that, the end of the prompt before it is out of
reach, and going back there would mean evaluating the whole prompt again: for a thinking model, whose thoughts are
dropped from the conversation, at each turn. So before the ring forgets the end of a prompt, a copy of it is taken.

    checkpoints.mark(100); checkpoints.advance(100, 512); checkpoints.restore(100)
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from swaa_edge import native


@dataclass
class _Checkpoint:
    """The ring as it was when the next token had `position`; what it holds of tokens before `valid` is still right."""

    position: int
    data: bytearray
    valid: int


class Checkpoints:
    """The newest copies of the ring of sequence 0 of a `llama_context *`, `limit` of them at most.

    A copy at position c also serves positions up to a ubatch before c, as long as no token before those is evaluated
    anew: K and V of all layers must come from the same tokens, computed in the same way.
    """

    def __init__(self, context: int, limit: int) -> None:
        self._context = context
        # Without a ring nothing is ever forgotten.
        self._limit = limit if native.ring_cells(context) else 0
        # What a ring can always take back.
        self._reach: int = native.load().llama_n_ubatch(context)
        self._mark: int | None = None
        self._kept: list[_Checkpoint] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(len(checkpoint.data) for checkpoint in self._kept)

    def mark(self, position: int) -> None:
        """A prompt ends before `position`: what comes may go back there."""
        self._mark = position

    def advance(self, position: int, count: int) -> None:
        """To be called before `count` tokens are evaluated from `position` on."""
        self.forget(position)
        # Half of the reach is left for going back into the prompt's last tokens, which often differ next time. A copy
        # for an answer shorter than the other half isn't needed.
        if self._limit and self._mark is not None and position + count > self._mark + self._reach // 2:
            self._take(position)
            self._mark = None

    def restore(self, position: int) -> int | None:
        """Put the ring back as it was at `position`, or at the nearest position before that can be had.

        Returns the position that the next token has now, with the cache cut there; None if nothing serves, and then
        the sequence must be evaluated from its start.
        """
        llama_cpp = native.load()
        for checkpoint in reversed(self._kept):
            if checkpoint.position - self._reach > position:
                continue
            size, data = len(checkpoint.data), checkpoint.data
            source = (ctypes.c_uint8 * size).from_buffer(data)
            flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
            if llama_cpp.llama_state_seq_set_data_ext(self._context, source, size, 0, flags) != size:
                return None
            end = min(checkpoint.valid, position)
            if native.can_continue(self._context, 0, end):
                memory = llama_cpp.llama_get_memory(self._context)
                return end if llama_cpp.llama_memory_seq_rm(memory, 0, end, -1) else None
        return None

    def forget(self, position: int) -> None:
        """Drop what builds on tokens from `position` on."""
        for checkpoint in self._kept:
            checkpoint.valid = min(checkpoint.valid, position)
        self._kept = [checkpoint for checkpoint in self._kept if checkpoint.position - checkpoint.valid <= self._reach]
        if self._mark is not None and self._mark > position:
            self._mark = None

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self._mark = None

    def _take(self, position: int) -> None:
        llama_cpp = native.load()
        flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        others = [checkpoint for checkpoint in self._kept if checkpoint.position < position]
        self._kept = others[max(0, len(others) - self._limit + 1) :]
        size = llama_cpp.llama_state_seq_get_size_ext(self._context, 0, flags)
        try:
            data = bytearray(size)
        except MemoryError:
            return  # a copy saves time; the answer doesn't depend on it
        target = (ctypes.c_uint8 * size).from_buffer(data)
        if size and llama_cpp.llama_state_seq_get_data_ext(self._context, target, size, 0, flags) == size:
            self._kept.append(_Checkpoint(position, data, position))
