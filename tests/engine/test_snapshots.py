"""Snapshots of the ring: when they are taken, which prompts they allow to be reused, what they cost."""

import pytest

from support.engine.tiny_llm import PROMPT, RING, RING_CELLS, UBATCH, close, last_logits, reused, text, tokens_of
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError

pytestmark = pytest.mark.native

LONG = RING_CELLS  # a response after which the ring holds nothing of the prompt but the sinks


def copied_bytes(llm):
    return sum(len(snapshot.data) for snapshot in llm._kv_cache.snapshots._kept)


@pytest.mark.parametrize("arguments", [{}, {"ring_snapshots": 0, "swa_full": True}])
def test_a_prompt_is_reused_after_a_long_response(load, cold, arguments):
    llm = load(**arguments)
    answer = tokens_of(llm, PROMPT, LONG)
    assert tokens_of(llm, PROMPT, 1) == answer[:1]
    assert reused(llm, PROMPT) == 299
    assert close(last_logits(llm), cold(PROMPT))
    # And once more: the snapshot that was used is replaced.
    assert tokens_of(llm, PROMPT, LONG) == answer
    assert tokens_of(llm, PROMPT, 1) == answer[:1] and reused(llm, PROMPT) == 299


def test_without_snapshots_all_is_evaluated_again(load, cold):
    llm = load(ring_snapshots=0)
    tokens_of(llm, PROMPT, LONG)
    tokens_of(llm, PROMPT, 1)
    assert reused(llm, PROMPT) == 0
    assert close(last_logits(llm), cold(PROMPT))


@pytest.mark.parametrize("snapshots", [0, 1])
@pytest.mark.parametrize("answer", [1, 10, UBATCH])
def test_a_short_response_needs_no_snapshot(load, answer, snapshots):
    llm = load(ring_snapshots=snapshots)
    tokens_of(llm, PROMPT, answer)
    next_prompt = [*PROMPT, *text(2, 20)]
    tokens_of(llm, next_prompt, 1)
    assert reused(llm, next_prompt) in (300, 300 + answer - 1)
    assert reused(llm, next_prompt) == 300 or answer == 1


@pytest.mark.parametrize("same", [300, 299, 290, 300 - UBATCH // 2])
def test_the_next_prompt_differs_near_the_end_of_the_last(load, cold, same):
    # Chat templates do this whose last words ask the model to reason, or that drop its reasoning.
    llm = load()
    tokens_of(llm, PROMPT, LONG)
    prompt = [*PROMPT[:same], *text(3, 40)]
    tokens_of(llm, prompt, 1)
    assert reused(llm, prompt) == same
    assert close(last_logits(llm), cold(prompt))


@pytest.mark.parametrize("same", [0, 1, 100, 200])
def test_what_no_snapshot_reaches_is_evaluated_again(load, cold, same):
    llm = load()
    tokens_of(llm, PROMPT, LONG)
    prompt = [*PROMPT[:same], *text(3, 250)]
    tokens_of(llm, prompt, 1)
    assert reused(llm, prompt) == (same if same <= RING.sink_count else 0)  # sinks are never evicted
    assert close(last_logits(llm), cold(prompt))
    # Nothing of the first prompt is left to be mistaken for a part of it.
    tokens_of(llm, PROMPT, 1)
    assert reused(llm, PROMPT) <= same
    assert close(last_logits(llm), cold(PROMPT))


def test_the_reasoning_of_turn_after_turn_is_dropped(load, cold):
    llm, conversation = load(), PROMPT
    for turn in range(3):
        answer = tokens_of(llm, conversation, LONG // 2)
        before = len(conversation)
        conversation = [*conversation, *answer[-10:], *text(turn, 40)]
        tokens_of(llm, conversation, 1)
        assert reused(llm, conversation) == before
        assert close(last_logits(llm), cold(conversation))


def test_several_snapshots_reach_back_over_several_turns(load, cold):
    first, second = PROMPT, [*PROMPT, *text(2, 100)]
    for snapshots, expected in ((1, 0), (2, 300)):
        llm = load(ring_snapshots=snapshots)
        tokens_of(llm, first, 60)
        tokens_of(llm, second, LONG)
        other = [*PROMPT, *text(5, 10)]
        tokens_of(llm, other, 1)
        assert reused(llm, other) == expected
        assert close(last_logits(llm), cold(other))


def test_snapshots_cost_memory_only_where_they_are_useful(load):
    per_token = 3 * 2 * 2 * 128 * 2  # layers in the ring, K and V, 2 heads of 128 numbers of 2 bytes
    llm = load()
    tokens_of(llm, PROMPT, 10)
    assert copied_bytes(llm) == 0
    tokens_of(llm, PROMPT, LONG)
    held = RING.window_size + RING.sink_count + UBATCH
    assert per_token * held <= copied_bytes(llm) < 1.1 * per_token * held
    llm.reset()
    assert copied_bytes(llm) == 0
    for arguments in ({"ring_snapshots": 0}, {"swa_full": True}, {"swaa": SwaaConfig(24, 2, fa_decode=True)}):
        llm = load(**arguments)
        tokens_of(llm, PROMPT, LONG)
        assert copied_bytes(llm) == 0
    with pytest.raises(ConfigError, match="ring_snapshots"):
        load(ring_snapshots=-1)


def test_a_snapshot_is_dropped_once_its_tokens_are_evaluated_again(load):
    llm = load()
    tokens_of(llm, PROMPT, LONG)
    assert copied_bytes(llm)
    llm.n_tokens = 0
    llm.eval(PROMPT)  # the same tokens, but not the same K and V where phases matter
    assert copied_bytes(llm) == 0


def test_a_failed_restore_leads_to_an_evaluation(load, cold):
    llm = load()
    tokens_of(llm, PROMPT, LONG)
    data = llm._kv_cache.snapshots._kept[0].data
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    data[:64] = bytes(64)
    tokens_of(llm, PROMPT, 1)
    assert reused(llm, PROMPT) == 0
    assert close(last_logits(llm), cold(PROMPT))


def test_a_snapshot_before_a_shift_does_not_serve_after_it(load):
    llm = load()
    tokens_of(llm, PROMPT, LONG)
    assert copied_bytes(llm)
    llm.shift(n_discard=50)
    assert copied_bytes(llm) == 0
