"""An open context of the engine and its model by the oracle, driven by the same steps and compared after each.

A step is plain data, so that a failure prints as one line of JSON and can be replayed (see `Session.replay`):
  ["eval", phase, [[owners, n, seed], ...], alternate]   n random tokens of each part; owners: sequences that share them
  ["rm", seq, p0, p1], ["cp", from, to, p0, p1], ["keep", seq], ["clear"]
  ["shift", seq, keep, discard]                          drop [keep, keep + discard), move the rest down
  ["add", seq, p0, p1, delta]                            llama_memory_seq_add alone
  ["save", slot, how], ["load", slot]                    whole context; how: "memory" or "file"
  ["seq_save", slot, seq, how], ["seq_load", slot, seq]
  ["ring_save", slot, seq], ["ring_load", slot, seq]     a snapshot of the ring; loading also cuts the sequence there

Use: `Session(engine, zoo, Setup(sliding="1111")).do("eval", "auto", [[[0], 80, 1]], False)`
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.engine.calls import PARTIAL_ONLY
from support.engine.process import Engine, EngineError
from support.oracle import verdict
from support.oracle.grid import VOCAB
from support.oracle.rule import Rule
from support.reuse.book import END, Book, State
from support.reuse.oracle import EntryPool, Part
from support.reuse.setup import Setup


@dataclass
class Counts:
    """Totals of sessions. refused: steps that the engine refused, with a reason. rows: compared rows of logits. after:
    those of sequences that may have lost cells of the ring. worst: the largest error of a row."""

    steps: int = 0
    refused: int = 0
    rows: int = 0
    after: int = 0
    worst: float = 0.0

    def add(self, other: Counts) -> None:
        for name in ("steps", "refused", "rows", "after"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = max(self.worst, other.worst)


@dataclass(frozen=True)
class Slot:
    """A saved state of one sequence or (None) of the context, as bytes or a file, and the book at that moment."""

    state: bytes | Path
    seq: int | None
    book: State


class Session:
    """Engine and oracle side by side. `rule` replaces the oracle's rule, to see that a wrong one is noticed."""

    def __init__(self, engine: Engine, zoo, setup: Setup, rule: Rule | None = None):
        self.engine, self.setup = engine, setup
        self.context = engine.open(zoo.gguf(setup.arch, len(setup.sliding)), setup.overrides, **setup.settings)
        has_ring = engine.abi >= 2
        self.ring = setup.ring if has_ring else None
        self.pool = EntryPool(zoo.model(setup.arch, len(setup.sliding)), rule or setup.rule)
        self.book = Book(setup.sequences, setup.unified, setup.cells, self.ring)
        self.tokens: list[int] = []  # of each entry
        self.slots: dict[str, Slot] = {}
        self.steps: list[list] = []
        self.counts = Counts()
        self.folder = tempfile.TemporaryDirectory()
        # What upstream does by itself: copies between streams of whole sequences only; shifts and copies that wait for
        # the next llama_decode are not in a state saved before it.
        self.partial_copies = setup.unified or (has_ring and setup.swaa)
        self.pending, self.saves_pending = False, has_ring
        if has_ring:
            found, wanted = self.call("ring_cells"), self.ring.cells if self.ring else 0
            assert found == wanted, f"the ring has {found} cells, expected {wanted}"

    def replay(self, steps: list[list]) -> None:
        """Take steps as a failure printed them."""
        for step in steps:
            self.do(*step)

    def do(self, name: str, *arguments) -> bool:
        """Take one step and compare. Returns False if the engine refused it with good reason."""
        self.steps.append([name, *arguments])
        self.counts.steps += 1
        try:
            done = getattr(self, f"_{name}")(*arguments) is not False
            found = self.call("ranges", self.setup.sequences)
            wanted = [self.book.range_of(seq) for seq in range(self.setup.sequences)]
            assert found == wanted, f"positions per sequence are {found}, expected {wanted}"
            for seq in range(self.setup.sequences) if self.ring else ():
                self._check_can_continue(seq, self.book.next_position(seq))
        except (AssertionError, EngineError) as error:
            raise AssertionError(f"{self.setup}\n{error}\nin the last of {len(self.steps)} steps; {self}") from error
        self.counts.refused += not done
        return done

    def __str__(self) -> str:
        """One line that replays this session."""
        given = {"setup": self.setup.changed(), "steps": self.steps}
        return f"SWAA_REUSE='{json.dumps(given, separators=(',', ':'))}'"

    def close(self) -> None:
        self.context.close()
        self.folder.cleanup()

    def call(self, name: str, *arguments):
        """Call the engine; self.reason is its last_error afterwards."""
        answer = self.context.call(name, *arguments)
        self.reason = answer.reason
        return answer.value

    def can_save(self) -> bool:
        return self.saves_pending or not self.pending

    def fits(self, parts) -> bool:
        """Whether the full cache has room for the parts of an eval step."""
        free = {stream: self.book.free(stream) for stream in self.book.used}
        for owners, n, _ in parts:
            free[self.book.stream(owners[0])] -= n
        return min(free.values()) >= 0

    def unservable(self, parts) -> list[int]:
        """Sequences of an eval step that may have lost tokens that their next one sees."""
        return [seq for owners, *_ in parts for seq in owners if not self.book.servable(seq)]

    # The steps.

    def _eval(self, phase: str, parts: list, alternate: bool) -> bool:
        made, rows = [], []
        for owners, n, seed in parts:
            tokens = np.random.default_rng(seed).integers(6, VOCAB, n).tolist()
            start = self.book.next_position(owners[0])
            past = [(cell.entry, cell.position) for cell in self.book.of[owners[0]]]
            decode = phase == "decode" or (phase == "auto" and n == 1)
            rows.append([(token, start + i, tuple(owners), True) for i, token in enumerate(tokens)])
            made.append(Part(past, tokens, start, decode))
        order = [(part, i) for part, part_rows in enumerate(rows) for i in range(len(part_rows))]
        if alternate:
            order.sort(key=lambda at: (at[1], at[0]))
        code, got = self.call("decode", [rows[part][i] for part, i in order], phase)
        self.pending = self.pending and code != 0
        if not self.fits(parts):
            assert code == 1, f"llama_decode returned {code} for a batch that doesn't fit, expected 1"
            return False
        if code == -1:
            assert self.unservable(parts), f"llama_decode refused although no token it needs is lost: {self.reason}"
            assert self.reason, "llama_decode refused without a reason"
            return False
        assert code == 0, f"llama_decode returned {code}: {self.reason}"
        logits, entries = self.pool.evaluate(made)
        expected = np.stack([logits[part][i] for part, i in order])
        self.book.append([(tuple(owners), new) for (owners, *_), new in zip(parts, entries, strict=True)])
        self.tokens += [token for part in made for token in part.tokens]
        evicted_from = {seq for seq, _ in self.book.lost}
        self.counts.after += sum(len(part_rows) for part_rows in rows if evicted_from.intersection(part_rows[0][2]))
        self._compare(expected, got)
        return True

    def _compare(self, expected: np.ndarray, got: np.ndarray) -> None:
        assert got.shape == expected.shape, f"{got.shape} logits, expected {expected.shape}"
        errors = np.abs(got - expected).max(axis=1) / expected.std()
        worst = float(errors.max()) if np.isfinite(errors).all() else float("inf")
        self.counts.rows += len(expected)
        self.counts.worst = max(self.counts.worst, worst)
        row = int(np.argmax(~(errors < verdict.WORST_F16)))
        assert worst < verdict.WORST_F16, f"row {row} of {len(errors)} is {errors[row]:.3f} standard deviations off"

    def _rm(self, seq: int, p0: int, p1: int) -> bool:
        first, end = max(p0, 0), END if p1 < 0 else p1
        left = [cell.position for cell in self.book.of[seq] if cell.position < first]
        is_cut = bool(left) and left[-1] + 1 < self.book.next_position(seq) <= end
        promised = self._check_can_continue(seq, left[-1] + 1) if is_cut and self.ring else True
        done = self.call("seq_rm", seq, p0, p1)
        if not done:
            assert is_cut, f"a removal that is not a cut was refused: {self.reason}"
            allowed = not self.book.servable(seq, left[-1] + 1) or not self.book.servable(seq, first)
            assert allowed, f"a cut at {first} was refused although its next token sees no lost token: {self.reason}"
            assert self.reason, "a cut was refused without a reason"
            assert not promised, "can_continue promised a cut that was refused"
            return False
        assert promised, f"can_continue denied a cut at {first} that was done"
        self.book.remove(seq, first, end)
        return True

    def _check_can_continue(self, seq: int, position: int) -> bool:
        """The engine's can_continue, which must be true where nothing can be lost."""
        promised = self.call("can_continue", seq, position)
        wrong = not promised and self.book.servable(seq, position)
        assert not wrong, f"can_continue({seq}, {position}) is false although no token it needs is lost"
        return promised

    def _cp(self, source: int, target: int, p0: int, p1: int) -> None:
        assert not self.book.of[target], f"sequence {target} must be empty"
        self.call("seq_cp", source, target, p0, p1)
        self.pending |= not self.setup.unified
        self.book.copy(source, target, max(p0, 0), END if p1 < 0 else p1)

    def _keep(self, seq: int) -> None:
        self.call("seq_keep", seq)
        # Upstream only affects the stream of the sequence.
        self.book.keep(seq, other_streams=self.setup.swaa and self.engine.abi >= 2)

    def _clear(self) -> None:
        self.call("clear")
        self.book.clear()

    def _shift(self, seq: int, keep: int, discard: int) -> bool:
        if not self._rm(seq, keep, keep + discard):
            return False
        return self._add(seq, keep + discard, -1, -discard)

    def _add(self, seq: int, p0: int, p1: int, delta: int) -> bool:
        end = END if p1 < 0 else p1
        refused = self.book.shared(seq, p0, end)
        self.call("seq_add", seq, p0, p1, delta)
        if refused:
            assert self.setup.swaa and self.engine.abi >= 2, "upstream would move shared cells for all their owners"
            assert self.reason, "a shift of shared cells was refused without a reason"
            return False
        self.book.shift(seq, p0, end, delta)
        self.pending = True
        return True

    def _save(self, slot: str, how: str) -> None:
        self._save_state(slot, None, how)

    def _seq_save(self, slot: str, seq: int, how: str) -> None:
        self._save_state(slot, seq, how)

    def _save_state(self, slot: str, seq: int | None, how: str) -> None:
        if how == "file":
            state = Path(self.folder.name) / f"{slot}.state"
            assert self.call("file_save", str(state), seq, self._tokens(seq)), f"saving refused: {self.reason}"
        else:
            state = self.call("state_get", seq)
            assert state, f"saving refused: {self.reason}"
        self.slots[slot] = Slot(state, seq, self.book.state())
        if seq is not None:
            self.book.trim(seq)

    def _load(self, slot: str) -> None:
        self._load_state(slot, None)
        self.book.restore(self.slots[slot].book)
        self.pending = False

    def _seq_load(self, slot: str, seq: int) -> None:
        self._load_state(slot, seq)
        self.book.put(seq, self.slots[slot].book, self.slots[slot].seq)

    def _load_state(self, slot: str, seq: int | None) -> None:
        saved = self.slots[slot]
        if isinstance(saved.state, Path):
            read, tokens = self.call("file_load", str(saved.state), seq)
            assert read, f"loading refused: {self.reason}"
            wanted = self._tokens(saved.seq, saved.book)
            assert tokens == wanted, f"{len(tokens)} tokens came back, not the {len(wanted)} saved"
        else:
            read = self.call("state_set", saved.state, seq)
            assert read == len(saved.state), f"{read} bytes of {len(saved.state)} were read: {self.reason}"

    def _tokens(self, seq: int | None, book: State | None = None) -> list[int]:
        cells = (book or self.book).of[0 if seq is None else seq]
        return [self.tokens[cell.entry] for cell in cells]

    def _ring_save(self, slot: str, seq: int) -> None:
        state = self.call("state_get", seq, PARTIAL_ONLY)
        assert state, f"the snapshot was refused: {self.reason}"
        self.slots[slot] = Slot(state, seq, self.book.state())
        self.book.trim(seq)

    def _ring_load(self, slot: str, seq: int) -> None:
        saved = self.slots[slot]
        read = self.call("state_set", saved.state, seq, PARTIAL_ONLY)
        assert read == len(saved.state), f"{read} bytes of {len(saved.state)} were read: {self.reason}"
        position = saved.book.of[saved.seq][-1].position + 1
        assert self.call("seq_rm", seq, position, -1), f"the cut at the snapshot, {position}, failed: {self.reason}"
        self.book.rewind_to(seq, saved.book, saved.seq)
