"""Snapshots of a KV ring: copies that let a context go back further than the ring itself reaches.

A ring has room for the window and one ubatch. After a response longer than a ubatch, the ring no longer reaches back to
the end of the prompt. Then the whole prompt must be evaluated again. With a reasoning model, every turn is affected,
because the reasoning is dropped from the conversation. So the ring is copied before the end of a prompt is lost.

    snapshots.mark(100); snapshots.advance(100, 512); snapshots.restore(100)
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from swaa_edge import native


@dataclass
class _Snapshot:
    """A copy of the ring.

    position: the copy was made before the token at this position was evaluated.
    valid: the copy's tokens before this position are still in the sequence.
    """

    position: int
    data: bytearray
    valid: int


class Snapshots:
    """The newest copies of the ring of sequence 0.

    A copy made at position c can also restore positions up to a ubatch before c, unless an earlier token was evaluated
    again. K and V of all layers must come from the same tokens, computed in the same way.

    context: the `llama_context *`.
    limit: maximum number of copies.
    """

    def __init__(self, context: int, limit: int) -> None:
        self._context = context
        # Without a ring, nothing is lost.
        self._limit = limit if native.ring_cells(context) else 0
        # Number of tokens by which a ring can always go back.
        self._reach: int = native.load().llama_n_ubatch(context)
        self._mark: int | None = None
        self._kept: list[_Snapshot] = []

    def mark(self, position: int) -> None:
        """Record that a prompt ends before `position`."""
        self._mark = position

    def advance(self, position: int, count: int) -> None:
        """Copy the ring, if necessary, before `count` tokens from `position` are evaluated."""
        self.invalidate(position)
        # A response shorter than half of the reach needs no copy. The other half lets the sequence go back into the
        # prompt's last tokens, because the last tokens often change in the next turn.
        if self._limit and self._mark is not None and position + count > self._mark + self._reach // 2:
            self._take(position)
            self._mark = None

    def restore(self, position: int) -> int | None:
        """Restore the ring as it was at `position`, or at the nearest earlier position that a copy allows.

        Returns the position from which evaluation must continue. Returns None if no copy can be used. The sequence must
        then be evaluated from the start.
        """
        llama_cpp = native.load()
        for snapshot in reversed(self._kept):
            if snapshot.position - self._reach > position:
                continue
            size, data = len(snapshot.data), snapshot.data
            source = (ctypes.c_uint8 * size).from_buffer(data)
            flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
            if llama_cpp.llama_state_seq_set_data_ext(self._context, source, size, 0, flags) != size:
                return None
            end = min(snapshot.valid, position)
            if native.can_continue(self._context, 0, end):
                memory = llama_cpp.llama_get_memory(self._context)
                return end if llama_cpp.llama_memory_seq_rm(memory, 0, end, -1) else None
        return None

    def invalidate(self, position: int) -> None:
        """Drop copies that depend on tokens from `position` on."""
        for snapshot in self._kept:
            snapshot.valid = min(snapshot.valid, position)
        self._kept = [snapshot for snapshot in self._kept if snapshot.position - snapshot.valid <= self._reach]
        if self._mark is not None and self._mark > position:
            self._mark = None

    def clear(self) -> None:
        self._kept.clear()
        self._mark = None

    def _take(self, position: int) -> None:
        llama_cpp = native.load()
        flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        others = [snapshot for snapshot in self._kept if snapshot.position < position]
        self._kept = others[max(0, len(others) - self._limit + 1) :]
        size = llama_cpp.llama_state_seq_get_size_ext(self._context, 0, flags)
        try:
            data = bytearray(size)
        except MemoryError:
            return  # a copy only saves time
        target = (ctypes.c_uint8 * size).from_buffer(data)
        if size and llama_cpp.llama_state_seq_get_data_ext(self._context, target, size, 0, flags) == size:
            self._kept.append(_Snapshot(position, data, position))
