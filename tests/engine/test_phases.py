"""Phases of tokens: how they are inferred, and their effect on logits.

The native tests run one tiny model whose layers all slide over a window of 8 and decode with full attention, so that a
token in the wrong phase changes the logits.
"""

import itertools

import numpy as np
import pytest

from support.engine.tiny_llm import SHORT_PROMPT as PROMPT
from support.engine.tiny_llm import SLIDING, VOCAB, last_logits, raw_logits
from swaa_edge.engine.phases import PhaseTracker, Timings, Turn
from swaa_edge.errors import GenerationError
from swaa_edge.native import Phase


@pytest.fixture
def load(load):
    """load(**arguments): a SwaaLlama of the tiny model whose layers all slide and decode with full attention."""
    return lambda **arguments: load(**{"swaa": SLIDING, "n_ctx": 512} | arguments)


def prompt_parts(phase, prompt=PROMPT):
    return [(phase, prompt[i : i + 32]) for i in range(0, len(prompt), 32)]


# How they are inferred


def test_a_turn_is_a_prompt_and_then_feedback():
    tracker, turn = PhaseTracker(), Turn()
    tracker.sampled = (0, 3)
    with tracker.running(turn):
        assert tracker.split([3], 0) == [(Phase.PREFILL, [3])]
        assert tracker.split([4, 5], 1) == [(Phase.DECODE, [4, 5])]
    assert tracker.turn is None
    assert tracker.split([6, 7], 3) == [(Phase.PREFILL, [6, 7])]
    with tracker.running(turn):  # the same generate resumes
        assert tracker.split([8], 5) == [(Phase.DECODE, [8])]


def test_a_turn_that_fails_leaves_nothing_behind():
    tracker = PhaseTracker()
    with pytest.raises(KeyError), tracker.running(Turn()):
        raise KeyError
    assert tracker.split([1, 2], 0) == [(Phase.PREFILL, [1, 2])]


def test_direct_calls():
    tracker = PhaseTracker()
    assert tracker.split([3], 0) == [(Phase.PREFILL, [3])]  # a first token can't be generated
    assert tracker.split([4], 1) == [(Phase.DECODE, [4])]
    tracker.sampled = (2, 9)
    assert tracker.split([9, 5], 2) == [(Phase.DECODE, [9]), (Phase.PREFILL, [5])]
    tracker.sampled = (4, 9)
    assert tracker.split([9], 5) == [(Phase.DECODE, []), (Phase.PREFILL, [9])]  # the same token elsewhere
    tracker.sampled = (5, 9)
    assert tracker.split([9], 5, Phase.PREFILL) == [(Phase.PREFILL, [9])]
    assert tracker.sampled is None


def test_a_shift_moves_the_sampled_token():
    tracker = PhaseTracker()
    tracker.shift(4)
    tracker.sampled = (10, 3)
    tracker.shift(4)
    assert tracker.split([3], 6) == [(Phase.DECODE, [3]), (Phase.PREFILL, [])]


def test_rows_of_logits():
    tracker = PhaseTracker()
    tracker.rows = 3
    for idx in (None, 9, 8, 7):
        tracker.check_row(idx, 10)
    for idx in (6, 10, -1):
        with pytest.raises(GenerationError) as caught:
            tracker.check_row(idx, 10)
        assert str(caught.value) == f"there are no logits to sample from at idx = {idx}; evaluate tokens first"
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
    prompt = prompt_parts("PREFILL")
    assert np.array_equal(found, raw_logits(raw, *prompt, *(("DECODE", token) for token in fed)))
    assert not np.array_equal(found, raw_logits(raw, *prompt, *(("PREFILL", token) for token in fed)))


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
def test_a_phase_that_is_given_holds(load, decoded):
    llm = load()
    llm.eval([3, 4], phase=Phase.DECODE)
    llm.eval([5], phase=Phase.PREFILL)
    assert decoded == [("DECODE", 2), ("PREFILL", 1)]


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
