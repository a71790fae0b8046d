"""Bookkeeping, independent of the engine: the tokens of each sequence of a context, and those its ring may have lost.

The engine promises a ring that evicts only when it must, the oldest tokens of a sequence first, never sink tokens and
never a token that the next one can see. The book tracks the worst case of that promise: a token that is not `lost` must
be in the ring, so an engine that refuses a request without need for a lost token is wrong.

Use: `book = Book(4, unified=True, cells=512, ring=Ring(256, window=31, sinks=4, keep=63))`
     `book.append([((0,), range(20))]); book.servable(0, 12)`
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

END = 2**31


class Cell(NamedTuple):
    """A token of a sequence: its entry in the oracle, its position, its cell in the full cache, its copy in the ring.

    Sequences that share a cell have the same numbers; a number is never used again.
    """

    entry: int
    position: int
    full: int
    ring: int


@dataclass(frozen=True)
class Ring:
    """cells: per stream; keep: how many of the newest positions a sequence's state holds, besides the sink tokens."""

    cells: int
    window: int
    sinks: int
    keep: int


@dataclass(frozen=True)
class State:
    """A copy of the book."""

    of: dict[int, tuple[Cell, ...]]
    lost: frozenset[tuple[int, int]]
    used: dict[int, int]


class Book:
    """of: the cells of each sequence, by position. lost: (sequence, ring number) that may be gone. used: how many cells
    of each stream's ring may be in use."""

    def __init__(self, sequences: int, unified: bool, cells: int, ring: Ring | None):
        self.sequences, self.unified, self.cells, self.ring = sequences, unified, cells, ring
        self.of: dict[int, tuple[Cell, ...]] = dict.fromkeys(range(sequences), ())
        self.lost: set[tuple[int, int]] = set()
        self.used = {self.stream(seq): 0 for seq in range(sequences)}
        self._numbers = itertools.count()

    def stream(self, seq: int) -> int:
        return 0 if self.unified else seq

    def next_position(self, seq: int) -> int:
        return self.of[seq][-1].position + 1 if self.of[seq] else 0

    def range_of(self, seq: int) -> tuple[int, int]:
        """As the engine's range_of."""
        return (self.of[seq][0].position, self.of[seq][-1].position) if self.of[seq] else (-1, -1)

    def free(self, stream: int) -> int:
        """Free cells of the full cache in one stream."""
        return self.cells - len({cell.full for seq in self._members(stream) for cell in self.of[seq]})

    def shared(self, seq: int, p0: int = 0, p1: int = END) -> bool:
        """Whether another sequence holds one of these cells too."""
        own = {cell.full for cell in self.of[seq] if p0 <= cell.position < p1}
        return any(cell.full in own for other in self.of if other != seq for cell in self.of[other])

    def servable(self, seq: int, position: int | None = None) -> bool:
        """Whether the ring certainly has all tokens that a token at `position`, the next one, would see."""
        if position is None:
            position = self.next_position(seq)
        return not self.ring or not any(
            cell.position < position and self._needed(cell, position) and (seq, cell.ring) in self.lost
            for cell in self.of[seq]
        )

    # What changes a sequence.

    def append(self, parts: Iterable[tuple[tuple[int, ...], list[int]]]) -> None:
        """Add the tokens of one batch; each part is (owners, entries). The owners, of one stream, share its cells."""
        written = dict.fromkeys(self.used, 0)
        for owners, entries in parts:
            start = self.next_position(owners[0])
            cells = tuple(Cell(entry, start + i, self._new(), self._new()) for i, entry in enumerate(entries))
            for seq in owners:
                self.of[seq] += cells
            written[self.stream(owners[0])] += len(cells)
        for stream, n in written.items():
            self.used[stream] += n - self._evict(stream, n)

    def remove(self, seq: int, p0: int, p1: int) -> None:
        self._change({seq: tuple(cell for cell in self.of[seq] if not p0 <= cell.position < p1)})

    def copy(self, source: int, target: int, p0: int, p1: int) -> None:
        """Copy into an empty target. A copy to another stream has cells of its own."""
        cells = tuple(cell for cell in self.of[source] if p0 <= cell.position < p1)
        if self.stream(source) != self.stream(target):
            self.of[target] = self._again(cells, source, target, self.lost)
            self.used[target] = self._held(target)
        else:
            self.of[target] = cells
            self.lost |= {(target, cell.ring) for cell in cells if (source, cell.ring) in self.lost}

    def keep(self, seq: int, other_streams: bool) -> None:
        """Remove all other sequences; those of other streams only if `other_streams`."""
        here = self.stream(seq)
        self._change({x: () for x in self.of if x != seq and (other_streams or self.stream(x) == here)})

    def clear(self) -> None:
        self._change(dict.fromkeys(self.of, ()))

    def shift(self, seq: int, p0: int, p1: int, delta: int) -> None:
        self.of[seq] = tuple(
            cell._replace(position=cell.position + delta) if p0 <= cell.position < p1 else cell for cell in self.of[seq]
        )

    # States.

    def state(self) -> State:
        return State(dict(self.of), frozenset(self.lost), dict(self.used))

    def restore(self, saved: State) -> None:
        """Restore the whole context."""
        self.of, self.lost, self.used = dict(saved.of), set(saved.lost), dict(saved.used)

    def put(self, seq: int, saved: State, source: int) -> None:
        """Load one sequence of a saved state into cells of its own."""
        self._change({seq: ()})
        self.of[seq] = self._again(saved.of[source], source, seq, saved.lost)
        self._arrived(seq)

    def rewind_to(self, seq: int, saved: State, source: int) -> None:
        """Load a ring snapshot of `source`; its cells in the full cache are the beginning of `seq`."""
        before = saved.of[source]
        head = self.of[seq][: len(before)]
        if [cell[:2] for cell in head] != [cell[:2] for cell in before]:
            raise ValueError(f"the snapshot is not a prefix of sequence {seq}")
        self._change({seq: ()})
        again = self._again(before, source, seq, saved.lost)
        self.of[seq] = tuple(new._replace(full=old.full) for new, old in zip(again, head, strict=True))
        self._arrived(seq)

    def trim(self, seq: int) -> None:
        """Reduce the sequence's ring cells to those that its state holds."""
        if self.ring:
            dropped = {(seq, cell.ring) for cell in self.of[seq] if self._dropped(cell, self.of[seq])}
            self.lost |= dropped

    # The ring.

    def _needed(self, cell: Cell, position: int) -> bool:
        return cell.position < self.ring.sinks or position - cell.position < self.ring.window

    def _dropped(self, cell: Cell, cells: tuple[Cell, ...]) -> bool:
        """Whether the state of one sequence omits it."""
        return cell.position >= self.ring.sinks and cells[-1].position - cell.position >= self.ring.keep

    def _evict(self, stream: int, n: int) -> int:
        """Make room for n cells in the ring of a stream; returns how many were evicted.

        They may belong to any of its sequences. A shared cell is freed when its last owner releases it.
        """
        evicted = max(0, self.used[stream] + n - self.ring.cells) if self.ring else 0
        if not evicted:
            return 0
        members = self._members(stream)
        owners = Counter(c.ring for seq in members for c in self.of[seq] if (seq, c.ring) not in self.lost)
        for seq in members:
            left, end = evicted, self.next_position(seq)
            for cell in self.of[seq]:
                if left and not self._needed(cell, end) and (seq, cell.ring) not in self.lost:
                    self.lost.add((seq, cell.ring))
                    left -= owners[cell.ring] == 1
        return evicted

    def _again(self, cells: tuple[Cell, ...], source: int, seq: int, lost) -> tuple[Cell, ...]:
        """The same tokens in new cells of `seq`, which lacks those that `lost` lists for `source`."""
        out = tuple(cell._replace(full=self._new(), ring=self._new()) for cell in cells)
        self.lost |= {(seq, new.ring) for new, old in zip(out, cells, strict=True) if (source, old.ring) in lost}
        return out

    def _arrived(self, seq: int) -> None:
        """After a state was loaded: the engine makes room for the largest possible one, whatever its size."""
        if self.ring:
            self.trim(seq)
            stream = self.stream(seq)
            held = self._held(seq)
            evicted = self._evict(stream, max(held, self.ring.keep + self.ring.sinks))
            self.used[stream] = min(self.ring.cells, self.used[stream] - evicted + held)

    def _held(self, seq: int) -> int:
        return sum((seq, cell.ring) not in self.lost for cell in self.of[seq])

    def _change(self, changed: dict[int, tuple[Cell, ...]]) -> None:
        """Reduce the cells of some sequences."""
        before = {self.stream(seq): self._rings(self.stream(seq)) for seq in changed}
        self.of.update(changed)
        for stream, rings in before.items():
            self.used[stream] = max(0, self.used[stream] - len(rings - self._rings(stream)))

    def _rings(self, stream: int) -> set[int]:
        """The ring cells of a stream that certainly exist."""
        return {c.ring for seq in self._members(stream) for c in self.of[seq] if (seq, c.ring) not in self.lost}

    def _members(self, stream: int) -> list[int]:
        return [seq for seq in self.of if self.stream(seq) == stream]

    def _new(self) -> int:
        return next(self._numbers)
