"""Going back in a cache with a ring, and context shifts: never a wrong answer."""

from dataclasses import replace

import numpy as np
import pytest

from support.engine.tiny_llm import PROMPT, RING_CELLS, UBATCH, close, last_logits, reused, text, tokens_of
from swaa_edge.config import RECIPES, SwaaConfig
from swaa_edge.engine.cache import shift_range
from swaa_edge.errors import GenerationCancelled, GenerationError

LONG = RING_CELLS  # a response after which the ring holds nothing of the prompt but the sinks


# Going back


@pytest.mark.native
def test_long_drafts_are_taken_back(load):
    from llama_cpp.llama_speculative import LlamaDraftModel

    class Wild(LlamaDraftModel):
        """Drafts more than a ring could take back, all incorrect from the third token on."""

        def __call__(self, input_ids, /, **kwargs):
            at = len(input_ids) - len(PROMPT)
            return np.array([*plain[at : at + 2], *text(at, 5 * UBATCH)], dtype=np.intc)

    plain = tokens_of(load(), PROMPT, 40)
    llm = load(draft_model=Wild())
    assert tokens_of(llm, PROMPT, 40) == plain
    assert tokens_of(llm, PROMPT, 40) == plain


@pytest.mark.native
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("answer", [20, LONG])
def test_a_second_turn_evaluates_what_is_new(load, recipe, answer):
    swaa = replace(SwaaConfig.from_recipe(recipe), window_size=24, sink_count=2)
    llm = load(swaa=swaa)
    spoken = tokens_of(llm, PROMPT, answer)
    for kept in (spoken, spoken[-10:]):  # the whole response, or without its reasoning
        prompt = [*PROMPT, *kept, *text(3, 100)]
        tokens_of(llm, prompt, 1)
        assert reused(llm, prompt) >= 300
        tokens_of(llm, PROMPT, answer)
    assert llm.last_timings.reused_tokens == 299


@pytest.mark.native
def test_generate_without_a_reset_continues(load, cold):
    llm = load()
    answer = tokens_of(llm, PROMPT, LONG)
    more = text(4, 20)
    next(llm.generate(more, temp=0, reset=False))
    assert llm.last_timings.reused_tokens == 300 + LONG - 1
    assert close(last_logits(llm), cold([*PROMPT, *answer[:-1], *more]))


@pytest.mark.native
def test_going_back_by_hand(load, cold):
    llm = load()
    llm.eval(PROMPT)
    llm.n_tokens = 300 - UBATCH
    llm.eval([7, 8, 9])
    assert close(last_logits(llm), cold([*PROMPT[: 300 - UBATCH], 7, 8, 9]))


@pytest.mark.native
def test_going_back_further_than_the_ring_holds(load, cold):
    llm = load()
    llm.eval(PROMPT)
    llm.eval(text(2, LONG))
    llm.n_tokens = 100
    with pytest.raises(GenerationError) as caught:
        llm.eval([7])
    assert str(caught.value) == (
        "the cache can't go back to 100 tokens: the ring no longer holds all tokens that the next token must see; "
        "call reset() and evaluate all tokens again, or load the model with swa_full=True"
    )
    # Nothing is changed: both ways out work.
    llm.n_tokens = 300 + LONG
    llm.eval([7])
    assert close(last_logits(llm), cold([*PROMPT, *text(2, LONG), 7]))
    llm.n_tokens = 100
    prompt = [*PROMPT[:100], 7]
    next(llm.generate(prompt, temp=0))
    assert reused(llm, prompt) == 0
    assert close(last_logits(llm), cold(prompt))


@pytest.mark.native
def test_a_cancelled_prompt_resumes(load, cold):
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


@pytest.mark.native
def test_usage_counts_the_cached_tokens(load):
    llm = load()
    for cached in (0, 299, 299):
        usage = llm.create_completion(PROMPT, max_tokens=LONG, temperature=0)["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": cached}
        assert usage["prompt_tokens"] == 300
    usage = llm.create_chat_completion([{"role": "user", "content": "Hello"}], max_tokens=2)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


# Context shift


@pytest.mark.native
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


@pytest.mark.native
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


@pytest.mark.native
def test_a_prompt_that_ends_where_the_caller_went_back_to_has_logits_of_its_own(load, cold):
    llm = load()
    llm.eval(PROMPT[:60])
    llm.n_tokens = 40
    tokens_of(llm, PROMPT[:40], 1)
    assert close(last_logits(llm), cold(PROMPT[:40]))
    assert not close(last_logits(llm), cold(PROMPT[:60]))


@pytest.mark.native
def test_what_a_shift_does_by_default(load):
    llm = load()
    llm.eval(PROMPT[:102])
    llm.shift()
    assert llm._input_ids.tolist() == [*PROMPT[:2], *PROMPT[52:102]]
    llm = load(swaa=False)
    llm.eval(PROMPT[:100])
    llm.shift()
    assert llm._input_ids.tolist() == [PROMPT[0], *PROMPT[50:100]]


@pytest.mark.native
def test_a_token_that_was_sampled_before_a_shift_is_decoded_after_it(load, decoded):
    llm = load()
    llm.eval(PROMPT)
    token = llm.sample(temp=0)
    llm.shift()
    decoded.clear()
    llm.eval([token, 9])
    assert decoded == [("DECODE", 1), ("PREFILL", 1)]


@pytest.mark.native
def test_logits_are_moved_along(load):
    llm = load(logits_all=True)
    llm.eval(PROMPT[:50])
    row = llm.scores[40].copy()
    llm.shift(n_discard=10, n_keep=4)
    assert np.array_equal(llm.scores[30], row)


@pytest.mark.native
def test_prompts_are_reused_after_a_shift(load):
    llm = load()
    llm.eval(PROMPT)
    llm.shift(n_discard=100)
    prompt = [*llm._input_ids.tolist(), *text(2, 30)]
    next(llm.generate(prompt, temp=0))
    assert reused(llm, prompt) == 200


@pytest.mark.native
def test_shifts_that_are_refused(load, cold):
    llm = load()
    llm.eval(PROMPT)
    for arguments, message in [
        (
            {"n_keep": 299},
            "n_keep = 299 must be at least 0, and at least 2 of the 300 tokens must follow the kept ones",
        ),
        ({"n_keep": -1}, "n_keep = -1 must be at least 0"),
        ({"n_discard": 0}, "n_discard = 0 must be from 1 to 297: 298 of the 300 tokens follow the first n_keep"),
        ({"n_discard": 298}, "n_discard = 298 must be"),
        ({"n_keep": 30, "n_discard": 265}, "the ring no longer holds all tokens that are visible after"),
        ({"n_keep": 0, "n_discard": 5}, "the ring no longer holds all tokens that are visible after"),
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
    with pytest.raises(GenerationError, match="at least 2 of the 0 tokens"):
        load().shift()


@pytest.mark.native
def test_all_shifts_that_a_ring_allows_can_continue(load):
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


def test_the_numbers_of_a_shift():
    assert shift_range(100, None, None, sinks=0) == (49, 1)
    assert shift_range(100, None, None, sinks=4) == (48, 4)
    assert shift_range(100, 10, 4, sinks=0) == (10, 4)
    assert shift_range(3, None, None, sinks=0) == (1, 1)
    with pytest.raises(GenerationError) as caught:
        shift_range(2, None, None, sinks=0)
    assert (
        str(caught.value) == "n_keep = 1 must be at least 0, and at least 2 of the 2 tokens must follow the kept ones"
    )
    with pytest.raises(GenerationError) as caught:
        shift_range(100, 99, 1, sinks=0)
    assert str(caught.value) == "n_discard = 99 must be from 1 to 98: 99 of the 100 tokens follow the first n_keep"
