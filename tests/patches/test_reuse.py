"""Reuse of what a context holds, by random steps: the engine and an oracle with a memory, compared after each step.

Rewinds, removals, copies, shifts, states and ring snapshots in any order, between evaluations of one or several
sequences in any phase. The engine may only refuse what support/reuse/book.py allows it to refuse; its logits must be
correct.

pytest tests/patches/test_reuse.py
SWAA_REUSE_SCALE=10 pytest tests/patches/test_reuse.py -k random       ten times as many steps
SWAA_REUSE='{"setup":...,"steps":[...]}' pytest tests/patches/test_reuse.py -k given      the steps of a failure
"""

import json
import os
from dataclasses import replace

import hypothesis
import numpy as np
import pytest
from hypothesis.stateful import run_state_machine_as_test

from support.engine.calls import PARTIAL_ONLY
from support.oracle import verdict
from support.oracle.grid_models import grid_model
from support.oracle.oracle import oracle_logits
from support.oracle.rule import Rule
from support.oracle.shifted import shifted
from support.reuse.book import Book, Ring
from support.reuse.machine import ReuseMachine
from support.reuse.oracle import EntryPool, Part
from support.reuse.session import Counts, Session
from support.reuse.setup import Setup

SCALE = float(os.environ.get("SWAA_REUSE_SCALE", "1"))
EXAMPLES, STEPS = 25, 60

SETUPS = [
    Setup("0000"),
    Setup("0000", unified=False, sequences=3, n_ctx=1536),
    Setup("1111", window=44, n_ubatch=64),  # a ring without a cell to spare: 4 * (44 + 4) + 64 = 256
    Setup("1111", unified=False, sequences=3, n_ctx=1536, window=48, sinks=0),
    Setup("1111", swa_full=True, window=40, n_ubatch=64),
    Setup("1011", "1011"),
    Setup("1011", "1011", unified=False, sequences=3, n_ctx=1536, sinks=8),
    Setup("1101", "1001", window=24, sinks=8, n_ubatch=16),
    Setup("1101", "1001", unified=False, sequences=3, n_ctx=1536, window=64, n_ubatch=64),
    Setup("0111", "0010", swa_full=True, unified=False, sequences=3, n_ctx=1536),
    Setup("1110", "0010", arch="qwen3", window=24, sinks=1),
    Setup("1111", sequences=1, unified=False, n_ctx=512, window=188, sinks=4, n_ubatch=64),  # likewise
]

RULE = Rule(9, 2, (True, False, True, True), (True, False, False, True))


# The oracle with a memory, compared with the one without. These tests do not need the engine.


def random_tokens(n, seed=0):
    return np.random.default_rng(seed).integers(6, 768, n).tolist()


class Sequence:
    """One sequence of a pool, fed by hand."""

    def __init__(self, pool):
        self.pool, self.cells = pool, []

    def feed(self, tokens, is_decode=False):
        start = self.cells[-1][1] + 1 if self.cells else 0
        [logits], [entries] = self.pool.evaluate([Part(tuple(self.cells), tokens, start, is_decode)])
        self.cells += [(entry, start + i) for i, entry in enumerate(entries)]
        return logits


def near(got, expected):
    return np.abs(got - expected).max() < 1e-4 * expected.std()


@pytest.fixture(params=["llama", "qwen3"])
def pool(request):
    return EntryPool(grid_model(request.param, 4), RULE)


def test_without_reuse_it_is_the_oracle(pool):
    tokens, sequence = random_tokens(70), Sequence(pool)
    parts = [(0, 40, False), (40, 41, True), (41, 60, False), (60, 61, False), (61, 70, True)]
    got = np.concatenate([sequence.feed(tokens[start:end], decode) for start, end, decode in parts])
    is_decode = [decode for start, end, decode in parts for _ in range(start, end)]
    assert near(got, oracle_logits(pool.model, tokens, is_decode, RULE))


def test_parts_of_a_batch_do_not_see_each_other(pool):
    one, two = Sequence(pool), Sequence(pool)
    first, second = random_tokens(40, 1), random_tokens(30, 2)
    one.feed(first[:25]), two.feed(second[:20])
    parts = [Part(tuple(one.cells), first[25:], 25), Part(tuple(two.cells), second[20:], 20)]
    got, _ = pool.evaluate(parts)
    assert near(got[0], oracle_logits(pool.model, first, [False] * 40, RULE)[25:])
    assert near(got[1], oracle_logits(pool.model, second, [False] * 30, RULE)[20:])


def test_a_rewind_keeps_what_decode_tokens_computed(pool):
    tokens, more, sequence = random_tokens(50, 1), random_tokens(20, 2), Sequence(pool)
    sequence.feed(tokens[:30]), sequence.feed(tokens[30:], True)
    del sequence.cells[40:]
    is_decode = [False] * 30 + [True] * 10 + [False] * 20
    assert near(sequence.feed(more), oracle_logits(pool.model, tokens[:40] + more, is_decode, RULE)[40:])


def test_a_shift_is_the_one_written_for_a_single_case(pool):
    tokens, more, sequence = random_tokens(60, 1), random_tokens(12, 2), Sequence(pool)
    sequence.feed(tokens)
    sequence.cells = sequence.cells[:5] + [(entry, position - 20) for entry, position in sequence.cells[25:]]
    got = np.concatenate([sequence.feed(more[:8]), sequence.feed(more[8:], True)])
    assert near(got, shifted(pool.model, tokens, (5, 25), more, n_decode=4, rule=RULE))


def test_positions_are_relative_without_sinks(pool):
    pool.rule = replace(RULE, sinks=0)
    tokens, sequence = random_tokens(60), Sequence(pool)
    sequence.feed(tokens[:40])
    sequence.cells = [(entry, position + 50) for entry, position in sequence.cells]
    assert near(sequence.feed(tokens[40:]), oracle_logits(pool.model, tokens, [False] * 60, pool.rule)[40:])


# The book: what a ring may have lost.


def test_a_ring_loses_its_oldest_and_no_more_than_it_must():
    book = Book(1, unified=False, cells=512, ring=Ring(40, window=10, sinks=2, keep=18))
    book.append([((0,), range(40))])
    assert not book.lost
    book.append([((0,), range(40, 43))])  # tokens 2 to 4 go, so a token sees all of its window from position 14 on
    assert [book.servable(0, p) for p in (0, 2, 3, 13, 14, 43)] == [True, True, False, False, True, True]
    book.remove(0, 30, 512)  # 13 cells are free again, and a lost token stays lost
    book.append([((0,), range(50, 63))])
    assert [book.servable(0, p) for p in (13, 14)] == [False, True]
    book.append([((0,), range(63, 64))])
    assert [book.servable(0, p) for p in (14, 15)] == [False, True]


def test_a_copy_lacks_what_the_ring_had_lost():
    book = Book(2, unified=True, cells=512, ring=Ring(40, window=10, sinks=2, keep=18))
    book.append([((0,), range(60))])
    book.copy(0, 1, 0, 20)
    assert not book.servable(1) and book.servable(0)
    book.remove(1, 0, 512)
    assert book.servable(1)


def test_a_state_of_a_sequence_holds_its_newest_positions():
    book = Book(2, unified=True, cells=512, ring=Ring(80, window=10, sinks=2, keep=18))
    book.append([((0,), range(50))])
    book.put(1, book.state(), 0)
    assert [book.servable(1, p) for p in (40, 41)] == [False, True]
    assert book.servable(0, 20)
    book.rewind_to(0, book.state(), 0)
    assert [book.servable(0, p) for p in (40, 41)] == [False, True]


def test_sharing_is_seen():
    book = Book(3, unified=True, cells=64, ring=None)
    book.append([((0, 1), range(10)), ((2,), range(10, 15))])
    assert book.free(0) == 64 - 15
    assert book.shared(0) and not book.shared(2) and not book.shared(0, 10)
    book.append([((0,), range(15, 20))])
    assert book.free(0) == 64 - 20 and book.shared(0, 9) and not book.shared(0, 10)


# The engine against the oracle.

done: dict[str, Counts] = {}


@pytest.mark.native
@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: str(setup).replace(" ", "_"))
def test_random_steps(engine, zoo, setup):
    total = done.setdefault(str(setup), Counts())

    @hypothesis.seed(SETUPS.index(setup))
    def machine():
        return ReuseMachine(engine, zoo, setup, total)

    settings = hypothesis.settings(
        max_examples=max(1, round(EXAMPLES * SCALE)),
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],  # support/reuse/shrink.py removes steps faster
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(machine, settings=settings)


@pytest.mark.native
@pytest.mark.parametrize("wrong", [{"window": 30}, {"window": 32}, {"sinks": 3}, {"sinks": 5}], ids=str)
def test_another_rule_is_noticed(engine, zoo, wrong):
    """What the random steps compare can tell a window or sinks that are off by one, after an eviction too."""
    setup = Setup("1111")
    steps = [["eval", "prefill", [[[0], 300, 1]], False], ["rm", 0, 280, -1], ["eval", "auto", [[[0], 60, 2]], False]]
    session = Session(engine, zoo, setup)
    session.replay(steps)
    assert session.counts.after
    session.close()
    session = Session(engine, zoo, setup, rule=replace(setup.rule, **wrong))
    with pytest.raises(AssertionError, match="standard deviations off"):
        session.replay(steps)
    session.close()


@pytest.mark.native
def test_a_snapshot_of_more_than_is_left(engine, zoo):
    """What it holds behind the end of a sequence that was cut meanwhile must not come back."""
    session = Session(engine, zoo, Setup("1111"))
    session.replay([["eval", "prefill", [[[0], 200, 1]], False], ["ring_save", "a", 0], ["rm", 0, 190, -1]])
    state = session.slots["a"].state
    assert session.call("state_set", state, 0, PARTIAL_ONLY) == len(state)
    session.replay([["eval", "prefill", [[[0], 20, 2]], False], ["eval", "auto", [[[0], 1, 3]], False]])
    session.close()


GIVEN = '{"setup":{"sliding":"1111"},"steps":[["eval","prefill",[[[0],80,1]],false],["rm",0,60,-1]]}'


@pytest.mark.native
@pytest.mark.skipif("SWAA_REUSE" not in os.environ and "CI" not in os.environ, reason="SWAA_REUSE gives no steps")
def test_given_steps(engine, zoo):
    given = json.loads(os.environ.get("SWAA_REUSE", GIVEN))
    session = Session(engine, zoo, Setup(**given["setup"]))
    session.replay(given["steps"])
    session.close()


@pytest.mark.native
def test_figures(engine, capsys):
    """Print what the random steps did; not a check of its own but of their number."""
    total = Counts()
    for counts in done.values():
        total.add(counts)
    with capsys.disabled():
        for name, counts in [*done.items(), ("all", total)]:
            print(
                f"\n  {name}: {counts.steps} steps, {counts.refused} refused; {counts.rows} rows, {counts.after} of "
                f"them after an eviction, worst {counts.worst:.3f} of {verdict.WORST_F16}",
                end="",
            )
    if len(done) == len(SETUPS) and SCALE >= 1:
        assert total.steps >= len(SETUPS) * EXAMPLES * STEPS / 4  # an example may be shorter than it could be
