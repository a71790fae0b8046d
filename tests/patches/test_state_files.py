"""States of the C functions identify their model and context; one that does not fit is refused with a reason."""

import random

import numpy as np
import pytest

from support.engine.process import EngineDied
from support.reuse.setup import Setup

pytestmark = pytest.mark.native

RING = Setup("1101", "1001", window=24, sinks=8, n_ubatch=16, sequences=2)
MODEL = ("llama", 4)
TOKENS = np.random.default_rng(3).integers(6, 768, 400).tolist()


def opened(engine, zoo, setup, model=MODEL, **changed):
    return engine.open(zoo.gguf(*model), setup.overrides, **setup.settings | changed)


def fill(context, seq=0, count=400):
    code, logits = context.call("decode", [(t, i, (seq,), i == count - 1) for i, t in enumerate(TOKENS[:count])]).value
    assert code == 0
    return logits


def next_logits(context, seq=0, count=400):
    code, logits = context.call("decode", [(7, count, (seq,), True)], "prefill").value
    assert code == 0
    return logits


WAYS = ["memory", "sequence", "file", "sequence file"]


def saved(context, way, tmp_path):
    if "file" in way:
        path = tmp_path / "state"
        assert context.call("file_save", str(path), 0 if "sequence" in way else None, TOKENS).value
        return path
    return context.call("state_get", 0 if "sequence" in way else None).value


def loaded(context, way, state):
    """Load a state: bytes read, or tokens; 0 is a refusal."""
    seq = 0 if "sequence" in way else None
    if "file" in way:
        return context.call("file_load", str(state), seq)
    return context.call("state_set", state, seq)


def refused(answer):
    return not (answer.value[0] if isinstance(answer.value, tuple) else answer.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("changed", "model", "reason"),
    [
        ({"window": 25}, MODEL, "under other SWAA settings"),
        ({"sinks": 9}, MODEL, "under other SWAA settings"),
        ({"sliding": "1011"}, MODEL, "under other SWAA settings"),
        ({"fa_decode": "1000"}, MODEL, "under other SWAA settings"),
        ({}, ("mistral", 4), "with another model"),
        ({"swa_full": True}, MODEL, "in a context with a ring"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else None,
)
def test_a_state_of_something_else(engine, zoo, tmp_path, way, changed, model, reason):
    context = opened(engine, zoo, RING)
    fill(context)
    state = saved(context, way, tmp_path)
    context.close()
    other = opened(engine, zoo, Setup(**RING.changed() | changed), model)
    answer = loaded(other, way, state)
    assert refused(answer)
    assert f"the state was saved {reason}" in answer.reason and "evaluate the prompt again" in answer.reason
    assert other.call("ranges", 2).value == [(-1, -1), (-1, -1)]
    fill(other)
    other.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_state_of_the_same(engine, zoo, tmp_path, way):
    context = opened(engine, zoo, RING)
    fill(context)
    state = saved(context, way, tmp_path)
    expected = next_logits(context)
    context.close()
    other = opened(engine, zoo, RING)
    fill(other, seq=1, count=100)
    assert not refused(loaded(other, way, state))
    assert np.abs(next_logits(other) - expected).max() < 0.02 * expected.std()
    other.close()


def test_a_state_without_swaa(engine, zoo):
    context = opened(engine, zoo, Setup("0000", sequences=2))
    fill(context)
    states = context.call("state_get", None).value, context.call("state_get", 0).value
    context.close()
    other = opened(engine, zoo, RING)
    for state, seq in zip(states, (None, 0), strict=True):
        answer = other.call("state_set", state, seq)
        assert answer.value == 0 and "the state was saved without SWAA" in answer.reason
    other.close()


@pytest.mark.parametrize("seq", [None, 0])
@pytest.mark.parametrize("unified", [True, False])
def test_damage_anywhere(engine, zoo, seq, unified):
    """Cuts and flipped bits: the process survives, a refusal leaves no half state, and everything works afterwards."""
    setup = Setup(**RING.changed() | {"unified": unified})
    context = opened(engine, zoo, setup)
    fill(context)
    state, generator, refusals = context.call("state_get", seq).value, random.Random(7), 0
    wrongs = [state[:n] for n in (0, 3, 8, 27, 100, len(state) // 3, len(state) - 1)]
    for position in [*range(120), *(generator.randrange(len(state)) for _ in range(60))]:
        flipped = state[position] ^ (1 << generator.randrange(8))
        wrongs.append(state[:position] + bytes([flipped]) + state[position + 1 :])
    try:
        for wrong in wrongs:
            if not context.call("state_set", wrong, seq).value:
                refusals += 1
                first, last = context.call("range_of", 0).value
                assert (first, last) in ((-1, -1), (0, 399))
        for cell in range(2):
            context.call("seq_rm", cell, -1, -1)
        context.call("clear")
        fill(context)
    except EngineDied as error:
        raise AssertionError(f"a damaged state killed the process: {error}") from None
    assert refusals > 30
    context.close()


# Requests that can't be served


def test_requests_about_sequences_that_there_are_not(engine, zoo):
    context = opened(engine, zoo, RING)
    fill(context)
    for seq in (2, 255, 256, 10**6, -2):
        for request in (
            ("seq_rm", seq, 0, -1),
            ("seq_keep", seq),
            ("seq_cp", 0, seq, -1, -1),
            ("seq_cp", seq, 0, -1, -1),
            ("seq_add", seq, 0, -1, 5),
            ("seq_div", seq, 0, -1, 2),
            ("can_continue", seq, 0),
            ("state_get", seq),
        ):
            assert not context.call(*request).value, request
        assert context.call("range_of", seq).value == (-1, -1)
    assert context.call("ranges", 2).value == [(0, 399), (-1, -1)]
    next_logits(context)
    context.close()


@pytest.mark.parametrize(
    ("request_made", "reason"),
    [
        (("seq_rm", 7, 0, -1), "sequence 7 does not exist; this context has 0 to 1"),
        (("seq_div", 0, 0, -1, 0), "positions can't be divided by 0; give a number from 1"),
        (("seq_add", 0, 0, -1, 2**31 - 100), "end past the largest position"),
        (("seq_rm", 0, 100, -1), "sequence 0 can't be cut back to position 100: its sliding layers no longer hold"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_refused_request_names_the_reason(engine, zoo, request_made, reason):
    context = opened(engine, zoo, RING)
    fill(context)
    answer = context.call(*request_made)
    assert not answer.value and reason in answer.reason
    assert context.call("ranges", 2).value == [(0, 399), (-1, -1)]
    next_logits(context)
    context.close()


def test_shared_cells_are_not_moved(engine, zoo):
    context = opened(engine, zoo, RING)
    fill(context)
    context.call("seq_cp", 0, 1, -1, -1)
    for request in (("seq_add", 0, 200, -1, 5), ("seq_div", 1, 0, -1, 2)):
        assert "shares cells with another one, which would be moved too" in context.call(*request).reason
    assert context.call("ranges", 2).value == [(0, 399), (0, 399)]
    context.close()
