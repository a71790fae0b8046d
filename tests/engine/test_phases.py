"""Phases of tokens and the tail of a prompt: how they are inferred, and their effect on logits.

The native tests run one tiny model whose layers all slide over a window of 8 and decode with full attention, so that a
token in the wrong phase changes the logits.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from support.engine.tiny_llm import SHORT_PROMPT as PROMPT
from support.engine.tiny_llm import SLIDING, VOCAB, close, last_logits, raw_logits
from swaa_edge.engine.phases import Part, Phase, PhaseTracker, Timings, Turn
from swaa_edge.errors import GenerationError
from swaa_edge.native import NEVER


@pytest.fixture
def load(load):
    """load(**arguments): a SwaaLlama of the tiny model whose layers all slide and decode with full attention."""
    return lambda **arguments: load(**{"swaa": SLIDING, "n_ctx": 512} | arguments)


def prompt_parts(phase):
    return [(phase, PROMPT[i : i + 32]) for i in range(0, len(PROMPT), 32)]


# How they are inferred


def prompt(tokens, decode_from):
    return Part(Phase.PREFILL, tokens, decode_from)


def generated(tokens, decode_from):
    return Part(Phase.DECODE, tokens, decode_from)


def test_a_turn_is_a_prompt_and_then_feedback():
    tracker, turn = PhaseTracker(), Turn()
    tracker.sampled = (0, 3)
    with tracker.running(turn):
        assert tracker.split([3], 0) == [prompt([3], 1)]
        assert tracker.split([4, 5], 1) == [generated([4, 5], 1)]
    assert tracker.turn is None
    assert tracker.split([6, 7], 3) == [prompt([6, 7], 5)]
    with tracker.running(turn):  # the same generate resumes
        assert tracker.split([8], 5) == [generated([8], 5)]


def test_a_turn_that_fails_leaves_nothing_behind():
    tracker = PhaseTracker()
    with pytest.raises(KeyError), tracker.running(Turn()):
        raise KeyError
    assert tracker.split([1, 2], 0) == [prompt([1, 2], 2)]


def test_direct_calls():
    tracker = PhaseTracker()
    assert tracker.split([3], 0) == [prompt([3], 1)]  # a first token can't be generated
    assert tracker.split([4], 1) == [generated([4], 1)]
    tracker.sampled = (2, 9)
    assert tracker.split([9, 5], 2) == [generated([9], 2), prompt([5], 4)]
    tracker.sampled = (4, 9)
    assert tracker.split([9], 5) == [prompt([9], 6)]  # the same token elsewhere
    tracker.sampled = (5, 9)
    assert tracker.split([9], 5, decode_from=NEVER) == [prompt([9], NEVER)]
    assert tracker.sampled is None
    assert tracker.split([], 5) == []


def test_the_tail_of_a_prompt():
    tracker = PhaseTracker()
    assert tracker.split([1, 2, 3, 4, 5], 10, tail_count=2) == [prompt([1, 2, 3, 4, 5], 13)]
    # At most all of a turn's new tokens, whatever was evaluated before.
    assert tracker.split([1, 2, 3], 10, tail_count=7) == [prompt([1, 2, 3], 10)]
    tracker.sampled = (20, 9)
    assert tracker.split([9, 1, 2, 3], 20, tail_count=2) == [generated([9], 20), prompt([1, 2, 3], 22)]
    tracker.sampled = (20, 9)
    assert tracker.split([9, 1, 2, 3], 20, tail_count=9) == [generated([9], 20), prompt([1, 2, 3], 21)]
    with tracker.running(Turn()):
        assert tracker.split([1, 2, 3], 0, tail_count=1) == [prompt([1, 2, 3], 2)]
        assert tracker.split([4, 5], 3, tail_count=1) == [generated([4, 5], 3)]


def test_a_boundary_that_is_given():
    tracker = PhaseTracker()
    assert tracker.split([1, 2, 3], 10, 5, decode_from=12) == [prompt([1, 2], 12), generated([3], 12)]
    assert tracker.split([1, 2, 3], 10, 5, decode_from=10) == [generated([1, 2, 3], 10)]
    assert tracker.split([1, 2, 3], 10, 5, decode_from=0) == [generated([1, 2, 3], 0)]
    assert tracker.split([1, 2, 3], 10, 5, decode_from=13) == [prompt([1, 2, 3], 13)]


def test_a_shift_moves_the_sampled_token():
    tracker = PhaseTracker()
    tracker.shift(4)
    tracker.sampled = (10, 3)
    tracker.shift(4)
    assert tracker.split([3], 6) == [generated([3], 6)]


def test_rows_of_logits():
    tracker = PhaseTracker()
    tracker.rows = 3
    for idx in (None, 9, 8, 7):
        tracker.check_row(idx, 10)
    with pytest.raises(GenerationError, match="no logits at idx = 6; set logits_all, or eval with on_logits"):
        tracker.check_row(6, 10)
    for idx in (10, -1):
        with pytest.raises(GenerationError, match=f"^idx = {idx} is out of range: 0 to 9$"):
            tracker.check_row(idx, 10)
    with pytest.raises(GenerationError, match="no logits to sample from; evaluate tokens first"):
        tracker.check_row(None, 0)


def test_timings_add_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("swaa_edge.engine.phases.time.perf_counter", lambda: now[0])
    timings = Timings()
    with timings.generating():
        now[0] = 5.0
        timings.add(Phase.PREFILL, 8, 4.0, with_decode_time=False)
    with timings.generating():
        now[0] = 7.0
        timings.add(Phase.DECODE, 1, 1.5, with_decode_time=False)
    timings.add(Phase.DECODE, 2, 0.5, with_decode_time=True)
    assert timings == Timings(prompt_tokens=8, prefill_seconds=4.0, decode_tokens=3, decode_seconds=3.5)
    assert (timings.prefill_speed, timings.decode_speed) == (2.0, 3 / 3.5)
    assert (Timings().prefill_speed, Timings().decode_speed) == (None, None)


# What they do


@pytest.mark.native
def test_a_prompts_last_chunk_of_one_token_is_prefill(load):
    llm, raw = load(), load()
    next(llm.generate(PROMPT, temp=0))
    found = last_logits(llm)
    assert np.array_equal(found, raw_logits(raw, *prompt_parts("PREFILL")))
    # Left to itself the engine takes a single token for decode, and the difference shows.
    assert not np.array_equal(found, raw_logits(raw, *prompt_parts("AUTO")))


@pytest.mark.native
def test_what_is_generated_and_fed_back_is_decode(load):
    llm, raw = load(), load()
    first, second, _ = itertools.islice(llm.generate(PROMPT, temp=0), 3)
    found = last_logits(llm)
    fed = [[first], [second]]
    parts = prompt_parts("PREFILL")
    assert np.array_equal(found, raw_logits(raw, *parts, *(("DECODE", token) for token in fed)))
    assert not np.array_equal(found, raw_logits(raw, *parts, *(("PREFILL", token) for token in fed)))


@pytest.mark.native
def test_verifying_drafted_tokens_is_decode(load, decoded):
    from llama_cpp.llama_speculative import LlamaDraftModel

    plain = list(itertools.islice(load().generate(PROMPT, temp=0), 12))

    class Oracle(LlamaDraftModel):
        """Drafts three tokens, every second time with a wrong one in the middle."""

        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, /, **kwargs):
            self.calls += 1
            at = len(input_ids) - len(PROMPT)
            draft = plain[at : at + 3]
            if self.calls % 2 and len(draft) == 3:
                draft[1] = (draft[1] + 1) % VOCAB
            return np.array(draft, dtype=np.intc)

    decoded.clear()
    drafting = load(draft_model=Oracle())
    assert list(itertools.islice(drafting.generate(PROMPT, temp=0), 12)) == plain
    assert decoded[:3] == [("PREFILL", 32), ("PREFILL", 32), ("PREFILL", 1)]
    assert {phase for phase, _ in decoded[3:]} == {"DECODE"}
    assert ("DECODE", 4) in decoded[3:]


@pytest.mark.native
def test_the_next_turn_of_a_chat_is_prefill_though_it_repeats_what_was_generated(load, decoded):
    llm = load()
    answer = list(itertools.islice(llm.generate(PROMPT, temp=0), 5))
    decoded.clear()
    # The last token of the answer was never fed back; now it is part of the prompt.
    next(llm.generate([*PROMPT, *answer, 7], temp=0))
    assert decoded == [("PREFILL", 2)]
    assert (llm.last_timings.reused_tokens, llm.last_timings.prompt_tokens) == (len(PROMPT) + 4, 2)


@pytest.mark.native
def test_a_prompt_that_is_cached_whole_is_not_evaluated_again(load, decoded):
    llm = load()
    first = next(llm.generate(PROMPT, temp=0))
    decoded.clear()
    assert next(llm.generate(PROMPT, temp=0)) == first
    assert decoded == []
    llm.eval([first])
    assert decoded == [("DECODE", 1)]


@pytest.mark.native
def test_the_loop_of_eval_and_sample(load, decoded):
    llm = load()
    llm.eval(PROMPT)
    for _ in range(2):
        llm.eval([llm.sample(temp=0)])
    assert decoded == [("PREFILL", 32), ("PREFILL", 32), ("PREFILL", 1), ("DECODE", 1), ("DECODE", 1)]


@pytest.mark.native
def test_other_tokens_than_the_sampled_one_are_prefill(load, decoded):
    llm = load()
    llm.eval(PROMPT)
    token = llm.sample(temp=0)
    decoded.clear()
    llm.eval([(token + 1) % VOCAB])
    assert decoded == [("PREFILL", 1)]
    token = llm.sample(temp=0)
    decoded.clear()
    llm.eval([token, 9, 9])  # a user's turn appended to what the model said
    assert decoded == [("DECODE", 1), ("PREFILL", 2)]


@pytest.mark.native
def test_a_caller_with_its_own_sampler_decodes(load, decoded):
    llm = load()
    llm.eval([3])
    llm.eval([4])
    assert decoded == [("PREFILL", 1), ("DECODE", 1)]


@pytest.mark.native
def test_a_boundary_that_is_given_holds(load, decoded):
    llm = load()
    llm.eval([3, 4], decode_from=0)
    llm.eval([5], decode_from=NEVER)
    llm.eval([6, 7, 8], decode_from=5)
    assert decoded == [("DECODE", 2), ("PREFILL", 1), ("PREFILL", 2), ("DECODE", 1)]


TAIL = dataclasses.replace(SLIDING, tail_count=20)


@pytest.mark.native
def test_the_last_tokens_of_a_prompt_see_everything(load, decoded):
    # 65 tokens in ubatches of 32: the tail begins within the second.
    llm, raw = load(swaa=TAIL), load()
    next(llm.generate(PROMPT, temp=0))
    assert decoded == [("PREFILL", 32), (19, 32), ("DECODE", 1)]
    found = last_logits(llm)
    parts = [("PREFILL", PROMPT[:32]), ("PREFILL", PROMPT[32:45]), ("DECODE", PROMPT[45:64]), ("DECODE", PROMPT[64:])]
    assert close(found, raw_logits(raw, *parts))
    assert not close(found, raw_logits(raw, *prompt_parts("PREFILL")))
    for wrong in (44, 46):
        parts = [("PREFILL", PROMPT[:32]), ("PREFILL", PROMPT[32:wrong]), ("DECODE", PROMPT[wrong:64])]
        assert not np.array_equal(found, raw_logits(raw, *parts, ("DECODE", PROMPT[64:])))


@pytest.mark.native
def test_each_turn_has_a_tail_of_its_own(load, decoded):
    llm = load(swaa=TAIL)
    response = list(itertools.islice(llm.generate(PROMPT, temp=0), 5))
    decoded.clear()
    next(llm.generate([*PROMPT, *response, *range(7, 37)], temp=0))
    # 31 new tokens, since the last of the response was never fed back: 11 of them are before the tail.
    assert decoded == [(20, 31)]
    assert llm.last_timings.prompt_tokens == 31
    decoded.clear()
    next(llm.generate([*PROMPT, *response, *range(7, 30), 6, 6, 6], temp=0))
    assert decoded == [("DECODE", 3)]  # what is reused stays as it was computed, the rest is all tail


@pytest.mark.native
def test_a_direct_call_of_several_tokens_is_a_turn(load, decoded):
    llm = load(swaa=TAIL)
    llm.eval(PROMPT[:30])
    llm.eval(PROMPT[30:40])
    assert decoded == [(20, 30), ("DECODE", 10)]


@pytest.mark.native
def test_a_sampled_token_is_dropped_with_its_sequence(load, decoded):
    llm = load()
    llm.eval(PROMPT)
    state = llm.save_state()
    token = llm.sample(temp=0)
    llm.load_state(state)
    decoded.clear()
    llm.eval([(token + 1) % VOCAB])
    assert decoded == [("DECODE", 1)]


@pytest.mark.native
def test_texts_to_embed_are_prefill(load, decoded):
    llm = load(embedding=True, pooling_type=1)
    llm.embed("x")
    assert [phase for phase, _ in decoded] == ["PREFILL"]


@pytest.mark.native
def test_code_that_uses_the_context_itself_meets_the_automatic_phase(load, decoded):
    llm = load()
    next(llm.generate(PROMPT, temp=0))
    decoded.clear()
    llm._batch.set_batch(batch=[1], n_past=len(PROMPT), logits_all=False)
    llm._ctx.decode(llm._batch)
    assert decoded == [("AUTO", 1)]


@pytest.mark.native
def test_batches_are_cut_at_ubatches(load, decoded):
    load(n_batch=48, n_ubatch=32).eval(PROMPT)
    assert decoded == [("PREFILL", 32), ("PREFILL", 16), ("PREFILL", 17)]
