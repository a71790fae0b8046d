"""Hypothesis' choice of steps for a reuse session: small numbers become steps that fit the state of the session.

Use: `run_state_machine_as_test(lambda: ReuseMachine(engine, zoo, Setup("1111"), Counts()))`
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from support.reuse.session import Counts, Session, Slot
from support.reuse.setup import Setup
from support.reuse.shrink import shrunk

SEQUENCES = st.integers(0, 3)
PHASES = st.sampled_from(["auto", "prefill", "decode"])
SEEDS = st.integers(0, 1000)
LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 33, 64, 80, 100, 127])
BACK = st.sampled_from([1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 200, 400])
SLOTS = st.sampled_from(["a", "b"])
WAYS = st.sampled_from(["memory", "file"])


class ReuseMachine(RuleBasedStateMachine):
    """One session; its counts are added to `total`."""

    def __init__(self, engine, zoo, setup: Setup, total: Counts):
        super().__init__()
        self.make = lambda: Session(engine, zoo, setup)
        self.session = self.make()
        self.book, self.setup, self.total = self.session.book, setup, total

    def do(self, *step) -> bool:
        """Take a step; a failure is reduced to as few steps as possible."""
        try:
            return self.session.do(*step)
        except AssertionError as error:
            message, _ = shrunk(self.make, self.session.steps, str(error))
            raise AssertionError(message) from error

    def teardown(self):
        self.total.add(self.session.counts)
        self.session.close()

    def seq(self, number: int) -> int:
        return number % self.setup.sequences

    def evaluate(self, phase: str, parts: list, alternate: bool = False) -> None:
        """Evaluate; after a refusal, make the next evaluation possible."""
        if self.do("eval", phase, parts, alternate):
            return
        unservable = self.session.unservable(parts)
        if unservable and self.session.fits(parts):
            for seq in unservable:
                self.start_again(seq)
        else:
            longest = max(self.book.of, key=lambda seq: len(self.book.of[seq]))
            self.do("rm", longest, -1, -1)

    def start_again(self, seq: int) -> None:
        """A caller's reaction to a refusal: remove the sequence and evaluate its text again, which must work."""
        n = min(len(self.book.of[seq]), 60)
        assert self.do("rm", seq, -1, -1)
        parts = [[[seq], n, 7]]
        if self.session.fits(parts):
            assert self.do("eval", "prefill", parts, False)

    # Evaluations, often enough that sequences grow.

    @initialize(n=st.sampled_from([1, 40, 100, 200, 300]))
    def begin(self, n):
        self.evaluate("prefill", [[[0], n, 0]])

    @rule(seq=SEQUENCES, n=LENGTHS, phase=PHASES, seed=SEEDS)
    def evaluate_one(self, seq, n, phase, seed):
        self.evaluate(phase, [[[self.seq(seq)], n, seed]])

    @rule(seq=SEQUENCES, n=st.integers(1, 6), seed=SEEDS)
    def generate(self, seq, n, seed):
        for i in range(n):
            self.evaluate("auto", [[[self.seq(seq)], 1, seed + i]])

    @rule(
        counts=st.lists(st.sampled_from([0, 1, 1, 2, 17, 40, 80]), min_size=4, max_size=4),
        phase=st.sampled_from(["auto", "auto", "prefill", "decode"]),
        seed=SEEDS,
        alternate=st.booleans(),
    )
    def evaluate_several(self, counts, phase, seed, alternate):
        parts = [[[seq], n, seed + seq] for seq, n in enumerate(counts[: self.setup.sequences]) if n]
        if parts:
            self.evaluate(phase, parts, alternate)

    @precondition(lambda self: self.setup.unified and self.setup.sequences > 1)
    @rule(one=SEQUENCES, other=SEQUENCES, n=LENGTHS, phase=PHASES, seed=SEEDS)
    def evaluate_shared(self, one, other, n, phase, seed):
        one, other = self.seq(one), self.seq(other)
        if one != other and self.book.of[one] == self.book.of[other]:
            self.evaluate(phase, [[[one, other], n, seed]])

    # Operations on sequences.

    @rule(seq=SEQUENCES, back=BACK)
    def rewind(self, seq, back):
        seq = self.seq(seq)
        self.do("rm", seq, max(self.book.next_position(seq) - back, 0), -1)

    @rule(seq=SEQUENCES, back=BACK, n=LENGTHS)
    def remove_middle(self, seq, back, n):
        seq = self.seq(seq)
        p0 = max(self.book.next_position(seq) - back, 0)
        self.do("rm", seq, p0, p0 + n)

    @rule(seq=SEQUENCES, what=st.sampled_from(["rm", "rm", "rm", "keep", "clear"]))
    def drop(self, seq, what):
        self.do(what, *{"rm": (self.seq(seq), -1, -1), "keep": (self.seq(seq),), "clear": ()}[what])

    @precondition(lambda self: self.setup.sequences > 1)
    @rule(seq=SEQUENCES, to=SEQUENCES, start=st.sampled_from([-1, -1, 0, 3, 40]), back=BACK)
    def copy(self, seq, to, start, back):
        seq, to = self.seq(seq), self.seq(to)
        if seq == to:
            return
        end = max(self.book.next_position(seq) - back, 0) if back > 2 else -1
        if not self.session.partial_copies:
            start = end = -1
        self.do("rm", to, -1, -1)
        self.do("cp", seq, to, start, end)

    @rule(seq=SEQUENCES, keep=st.integers(0, 12), part=st.integers(1, 4), n=LENGTHS)
    def shift(self, seq, keep, part, n):
        seq = self.seq(seq)
        last = self.book.next_position(seq)
        discard = min(n, (last - keep) * part // 4)
        swaa = self.setup.swaa and self.session.engine.abi >= 2
        if discard < 1 or keep + discard >= last or (self.book.shared(seq, keep) and not swaa):
            return
        self.do("shift", seq, keep, discard)

    # States.

    @precondition(lambda self: self.session.can_save())
    @rule(slot=SLOTS, how=WAYS)
    def save(self, slot, how):
        self.do("save", f"whole {slot}", how)

    @precondition(lambda self: self.session.can_save())
    @rule(slot=SLOTS)
    def load(self, slot):
        if f"whole {slot}" in self.session.slots:
            self.do("load", f"whole {slot}")

    @precondition(lambda self: self.session.can_save())
    @rule(slot=SLOTS, seq=SEQUENCES, how=WAYS)
    def seq_save(self, slot, seq, how):
        if self.book.of[self.seq(seq)]:
            self.do("seq_save", slot, self.seq(seq), how)

    @precondition(lambda self: self.session.can_save())
    @rule(slot=SLOTS, seq=SEQUENCES)
    def seq_load(self, slot, seq):
        saved, seq = self.session.slots.get(slot), self.seq(seq)
        if saved is None:
            return
        self.do("rm", seq, -1, -1)
        if self.book.free(self.book.stream(seq)) >= len(saved.book.of[saved.seq]):
            self.do("seq_load", slot, seq)

    @precondition(lambda self: self.session.ring)
    @rule(slot=SLOTS, seq=SEQUENCES)
    def ring_save(self, slot, seq):
        if self.book.of[self.seq(seq)]:
            self.do("ring_save", f"ring {slot}", self.seq(seq))

    @precondition(lambda self: self.session.ring)
    @rule(slot=SLOTS)
    def ring_load(self, slot):
        saved = self.session.slots.get(f"ring {slot}")
        if saved and (seq := self.continues(saved)) is not None:
            self.do("ring_load", f"ring {slot}", seq)

    def continues(self, saved: Slot) -> int | None:
        """A sequence that begins with the tokens of a snapshot."""
        head = [cell[:2] for cell in saved.book.of[saved.seq]]
        found = [seq for seq, cells in self.book.of.items() if [cell[:2] for cell in cells[: len(head)]] == head]
        return found[0] if found else None
