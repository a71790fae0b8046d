"""Going back in a cache with a ring: reuse of prefixes, checkpoints, shifts; and never a wrong answer."""

from dataclasses import replace

import numpy as np
import pytest

from support.engine.tiny_llm import RING, RING_CELLS, UBATCH, close, last_logits, text, tokens_of
from swaa_edge.config import RECIPES, SwaaConfig
from swaa_edge.engine.contextshift import plan_shift
from swaa_edge.errors import ConfigError, GenerationCancelled, GenerationError

pytestmark = pytest.mark.native

PROMPT = text(1, 300)
LONG = RING_CELLS  # an answer after which the ring holds nothing of the prompt but the sinks


def reused(llm, prompt):
    """Tokens of `prompt` that were not evaluated again, by what the timings say."""
    timings = llm.last_timings
    assert timings.reused_tokens + timings.prompt_tokens == len(prompt)
    return timings.reused_tokens


# Reuse of prefixes


@pytest.mark.parametrize("arguments", [{}, {"checkpoints": 0, "swa_full": True}])
def test_a_prompt_is_reused_after_a_long_answer(load, cold, arguments):
    llm = load(**arguments)
    answer = tokens_of(llm, PROMPT, LONG)
    assert tokens_of(llm, PROMPT, 1) == answer[:1]
    assert reused(llm, PROMPT) == 299
    assert close(last_logits(llm), cold(PROMPT))
    # And once more: the checkpoint that was used is replaced.
    assert tokens_of(llm, PROMPT, LONG) == answer
    assert tokens_of(llm, PROMPT, 1) == answer[:1] and reused(llm, PROMPT) == 299


def test_without_checkpoints_all_is_evaluated_again(load, cold):
    llm = load(checkpoints=0)
    tokens_of(llm, PROMPT, LONG)
    tokens_of(llm, PROMPT, 1)
    assert reused(llm, PROMPT) == 0
    assert close(last_logits(llm), cold(PROMPT))


@pytest.mark.parametrize("checkpoints", [0, 1])
@pytest.mark.parametrize("answer", [1, 10, UBATCH])
def test_a_short_answer_needs_no_checkpoint(load, answer, checkpoints):
    llm = load(checkpoints=checkpoints)
    tokens_of(llm, PROMPT, answer)
    next_prompt = [*PROMPT, *text(2, 20)]
    tokens_of(llm, next_prompt, 1)
    assert reused(llm, next_prompt) in (300, 300 + answer - 1)
    assert reused(llm, next_prompt) == 300 or answer == 1


@pytest.mark.parametrize("same", [300, 299, 290, 300 - UBATCH // 2])
def test_the_next_prompt_differs_near_the_end_of_the_last(load, cold, same):
    # What a chat template does whose last words ask the model to think, or that drops its thoughts.
    llm = load()
    tokens_of(llm, PROMPT, LONG)
    prompt = [*PROMPT[:same], *text(3, 40)]
    tokens_of(llm, prompt, 1)
    assert reused(llm, prompt) == same
    assert close(last_logits(llm), cold(prompt))


@pytest.mark.parametrize("same", [0, 1, 100, 200])
def test_what_no_checkpoint_reaches_is_evaluated_again(load, cold, same):
    llm = load()
    tokens_of(llm, PROMPT, LONG)
    prompt = [*PROMPT[:same], *text(3, 250)]
    tokens_of(llm, prompt, 1)
    assert reused(llm, prompt) == (same if same <= RING.sink_count else 0)  # sinks are never forgotten
    assert close(last_logits(llm), cold(prompt))
    # Nothing of the first prompt is left to be mistaken for a part of it.
    tokens_of(llm, PROMPT, 1)
    assert reused(llm, PROMPT) <= same
    assert close(last_logits(llm), cold(PROMPT))


def test_the_thoughts_of_turn_after_turn_are_dropped(load, cold):
    llm, conversation = load(), PROMPT
    for turn in range(3):
        answer = tokens_of(llm, conversation, LONG // 2)
        before = len(conversation)
        conversation = [*conversation, *answer[-10:], *text(turn, 40)]
        tokens_of(llm, conversation, 1)
        assert reused(llm, conversation) == before
        assert close(last_logits(llm), cold(conversation))


def test_several_checkpoints_reach_back_over_several_turns(load, cold):
    first, second = PROMPT, [*PROMPT, *text(2, 100)]
    for checkpoints, expected in ((1, 0), (2, 300)):
        llm = load(checkpoints=checkpoints)
        tokens_of(llm, first, 60)
        tokens_of(llm, second, LONG)
        other = [*PROMPT, *text(5, 10)]
        tokens_of(llm, other, 1)
        assert reused(llm, other) == expected
        assert close(last_logits(llm), cold(other))


def test_checkpoints_cost_memory_only_where_they_are_of_use(load):
    per_token = 3 * 2 * 2 * 128 * 2  # layers in the ring, K and V, 2 heads of 128 numbers of 2 bytes
    llm = load()
    tokens_of(llm, PROMPT, 10)
    assert llm._checkpoints.nbytes == 0
    tokens_of(llm, PROMPT, LONG)
    held = RING.window_size + RING.sink_count + UBATCH
    assert per_token * held <= llm._checkpoints.nbytes < 1.1 * per_token * held
    llm.reset()
    assert llm._checkpoints.nbytes == 0
    for arguments in ({"checkpoints": 0}, {"swa_full": True}, {"swaa": SwaaConfig(24, 2, fa_decode=True)}):
        llm = load(**arguments)
        tokens_of(llm, PROMPT, LONG)
        assert llm._checkpoints.nbytes == 0
    with pytest.raises(ConfigError, match="checkpoints"):
        load(checkpoints=-1)


def test_a_checkpoint_is_of_no_use_once_what_it_builds_on_is_evaluated_anew(load):
    llm = load()
    tokens_of(llm, PROMPT, LONG)
    assert llm._checkpoints.nbytes
    llm.n_tokens = 0
    llm.eval(PROMPT)  # the same tokens, but not the same K and V where phases matter
    assert llm._checkpoints.nbytes == 0


def test_a_failed_restore_leads_to_an_evaluation(load, cold):
    llm = load()
    tokens_of(llm, PROMPT, LONG)
    data = llm._checkpoints._kept[0].data
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    data[:64] = bytes(64)
    tokens_of(llm, PROMPT, 1)
    assert reused(llm, PROMPT) == 0
    assert close(last_logits(llm), cold(PROMPT))


def test_long_drafts_are_taken_back(load):
    from llama_cpp.llama_speculative import LlamaDraftModel

    class Wild(LlamaDraftModel):
        """Drafts more than a ring could take back, all wrong from the third token on."""

        def __call__(self, input_ids, /, **kwargs):
            at = len(input_ids) - len(PROMPT)
            return np.array([*plain[at : at + 2], *text(at, 5 * UBATCH)], dtype=np.intc)

    plain = tokens_of(load(), PROMPT, 40)
    llm = load(draft_model=Wild())
    assert tokens_of(llm, PROMPT, 40) == plain
    assert tokens_of(llm, PROMPT, 40) == plain


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("answer", [20, LONG])
def test_a_second_turn_evaluates_what_is_new(load, recipe, answer):
    swaa = replace(SwaaConfig.from_recipe(recipe), window_size=24, sink_count=2)
    llm = load(swaa=swaa)
    spoken = tokens_of(llm, PROMPT, answer)
    for kept in (spoken, spoken[-10:]):  # the whole answer, or without its thoughts
        prompt = [*PROMPT, *kept, *text(3, 100)]
        tokens_of(llm, prompt, 1)
        assert reused(llm, prompt) >= 300
        tokens_of(llm, PROMPT, answer)
    assert llm.last_timings.reused_tokens == 299


def test_generate_that_goes_on_without_a_reset(load, cold):
    llm = load()
    answer = tokens_of(llm, PROMPT, LONG)
    more = text(4, 20)
    next(llm.generate(more, temp=0, reset=False))
    assert llm.last_timings.reused_tokens == 300 + LONG - 1
    assert close(last_logits(llm), cold([*PROMPT, *answer[:-1], *more]))


def test_going_back_by_hand(load, cold):
    llm = load()
    llm.eval(PROMPT)
    llm.n_tokens = 300 - UBATCH
    llm.eval([7, 8, 9])
    assert close(last_logits(llm), cold([*PROMPT[: 300 - UBATCH], 7, 8, 9]))


def test_going_back_further_than_the_ring_holds(load, cold):
    llm = load()
    llm.eval(PROMPT)
    llm.eval(text(2, LONG))
    llm.n_tokens = 100
    with pytest.raises(GenerationError) as caught:
        llm.eval([7])
    assert str(caught.value) == (
        "the cache can't go back to 100 tokens: its ring has forgotten what they need; "
        "call reset() and evaluate all tokens again, or load the model with swa_full=True"
    )
    # Nothing is changed: both ways out are open.
    llm.n_tokens = 300 + LONG
    llm.eval([7])
    assert close(last_logits(llm), cold([*PROMPT, *text(2, LONG), 7]))
    llm.n_tokens = 100
    prompt = [*PROMPT[:100], 7]
    next(llm.generate(prompt, temp=0))
    assert reused(llm, prompt) == 0
    assert close(last_logits(llm), cold(prompt))


def test_a_cancelled_prompt_goes_on(load, cold):
    llm = load()
    tokens_of(llm, PROMPT, LONG)
    prompt = [*PROMPT, *text(2, 200)]
    llm.on_prefill = lambda done, total: llm.cancel() if done == 64 else None
    with pytest.raises(GenerationCancelled):
        tokens_of(llm, prompt, 1)
    llm.on_prefill = None
    tokens_of(llm, prompt, 1)
    assert reused(llm, prompt) == 364
    assert close(last_logits(llm), cold(prompt))


def test_usage_tells_what_was_in_the_cache(load):
    llm = load()
    for cached in (0, 299, 299):
        usage = llm.create_completion(PROMPT, max_tokens=LONG, temperature=0)["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": cached}
        assert usage["prompt_tokens"] == 300
    usage = llm.create_chat_completion([{"role": "user", "content": "Hello"}], max_tokens=2)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


# Context shift


@pytest.mark.parametrize("n_keep", [2, 5, 20])
def test_a_shift_on_a_ring_is_one_on_a_full_cache(load, n_keep):
    results = []
    for arguments in ({}, {"swa_full": True}):
        llm = load(**arguments)
        llm.eval(PROMPT)
        llm.shift(n_discard=150, n_keep=n_keep)
        kept = [*PROMPT[:n_keep], *PROMPT[n_keep + 150 :]]
        assert (llm.n_tokens, llm._input_ids.tolist()) == (150, kept)
        llm.eval(text(2, 60))
        results.append(last_logits(llm))
        # What was computed before the shift stays, so this is not what the rest alone would give.
        other = load(**arguments)
        other.eval([*kept, *text(2, 60)])
        assert not close(results[-1], last_logits(other))
    assert close(*results)


def test_an_endless_text(load):
    llm = load(n_ctx=512)
    llm.eval(PROMPT)
    for _ in range(700):
        token = llm.sample(temp=0)
        if llm.n_tokens == 512:
            llm.shift()
            assert llm.n_tokens == 512 - 255
        llm.eval([token])
    assert llm.input_ids[:2].tolist() == PROMPT[:2]


def test_what_a_shift_does_by_default(load):
    llm = load()
    llm.eval(PROMPT[:102])
    llm.shift()
    assert llm._input_ids.tolist() == [*PROMPT[:2], *PROMPT[52:102]]
    llm = load(swaa=False)
    llm.eval(PROMPT[:100])
    llm.shift()
    assert llm._input_ids.tolist() == [PROMPT[0], *PROMPT[50:100]]


def test_a_token_that_was_sampled_before_a_shift_is_decoded_after_it(load, monkeypatch):
    from swaa_edge import native

    llm = load()
    llm.eval(PROMPT)
    token = llm.sample(temp=0)
    llm.shift()
    phases, set_phase = [], native.set_phase
    monkeypatch.setattr(native, "set_phase", lambda context, phase: phases.append(phase) or set_phase(context, phase))
    llm.eval([token, 9])
    assert phases[::2] == [native.Phase.DECODE, native.Phase.PREFILL]


def test_logits_are_moved_along(load):
    llm = load(logits_all=True)
    llm.eval(PROMPT[:50])
    row = llm.scores[40].copy()
    llm.shift(n_discard=10, n_keep=4)
    assert np.array_equal(llm.scores[30], row)


def test_prompts_are_reused_after_a_shift(load):
    llm = load()
    llm.eval(PROMPT)
    llm.shift(n_discard=100)
    prompt = [*llm._input_ids.tolist(), *text(2, 30)]
    next(llm.generate(prompt, temp=0))
    assert reused(llm, prompt) == 200


def test_a_checkpoint_before_a_shift_does_not_serve_after_it(load):
    llm = load()
    tokens_of(llm, PROMPT, LONG)
    assert llm._checkpoints.nbytes
    llm.shift(n_discard=50)
    assert llm._checkpoints.nbytes == 0


def test_shifts_that_are_refused(load, cold):
    llm = load()
    llm.eval(PROMPT)
    for arguments, message in [
        ({"n_keep": 299}, "n_keep = 299 leaves nothing to forget of 300 tokens; at least 2 must follow"),
        ({"n_keep": -1}, "n_keep = -1 leaves nothing"),
        ({"n_discard": 0}, "n_discard = 0 must be from 1 to 297: 298 of 300 tokens follow"),
        ({"n_discard": 298}, "n_discard = 298 must be"),
        ({"n_keep": 30, "n_discard": 265}, "the ring has forgotten what would come into view"),
        ({"n_keep": 0, "n_discard": 5}, "the ring has forgotten what would come into view"),
    ]:
        with pytest.raises(GenerationError, match=message):
            llm.shift(**arguments)
    llm.eval([7])
    assert close(last_logits(llm), cold([*PROMPT, 7]))
    full = load(swa_full=True)
    full.eval(PROMPT)
    full.shift(n_keep=30, n_discard=265)
    full.shift(n_keep=0, n_discard=5)
    assert full.n_tokens == 30
    with pytest.raises(GenerationError, match="leaves nothing to forget of 0 tokens"):
        load().shift()


def test_all_shifts_that_a_ring_allows_can_go_on(load):
    """Every n_keep and n_discard: allowed ones are served by the engine afterwards, others would be refused by it."""
    llm = load()
    llm.eval(PROMPT)
    state, seen = llm.save_state(), set()
    for n_keep in (0, 1, 2, 3, 20, 60):
        for n_discard in (1, 5, 100, 200, 230, 238, 260, 277, 295):
            if n_discard >= 300 - n_keep:
                continue
            llm.load_state(state)
            try:
                llm.shift(n_discard, n_keep)
                allowed = True
            except GenerationError:
                allowed = False
                llm._ctx.kv_cache_seq_rm(0, n_keep, n_keep + n_discard)
                llm._ctx.kv_cache_seq_shift(0, n_keep + n_discard, -1, -n_discard)
                llm.n_tokens = 300 - n_discard
            try:
                llm.eval([7])
                served = True
            except GenerationError:
                served = False
            assert allowed == served, (n_keep, n_discard)
            seen.add(allowed)
    assert seen == {True, False}


def test_a_shift_without_a_ring_is_planned_from_numbers_alone():
    assert plan_shift(None, None, 100, None, None) == (1, 49)
    assert plan_shift(None, None, 100, 4, 10) == (4, 10)
