"""Saved states of SwaaLlama, pickled and in upstream's caches too: they continue exactly, or are refused by name."""

import copy
import pickle
import random

import numpy as np
import pytest

from support.engine.tiny_llm import PROMPT, RING, RING_CELLS, UBATCH, close, last_logits, text, tokens_of
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import GenerationError, StateError

pytestmark = pytest.mark.native

PER_TOKEN = 2 * 2 * 128 * 2  # bytes of a layer: K and V, 2 heads of 128 numbers of 2 bytes

SETTINGS = [
    {},
    {"swa_full": True},
    {"swaa": SwaaConfig(24, 2, fa_layers=[1], fa_decode=[0, 2])},
    {"swaa": False},
    {"type_k": 8, "type_v": 8},
    {"logits_all": True},
]


def same_bits(found, expected):
    return found.tobytes() == expected.tobytes()


# States that continue


@pytest.mark.parametrize("arguments", SETTINGS, ids=lambda arguments: "-".join(arguments) or "ring")
def test_a_state_continues_elsewhere(load, arguments):
    llm, other = load(**arguments), load(**arguments)
    llm.eval(PROMPT)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    llm.eval(text(2, UBATCH + 1))  # the last batch has one row of logits
    after = last_logits(llm)
    other.eval(text(9, 50))
    for _ in range(2):  # a state can be loaded again, over what was evaluated in between
        other.load_state(state)
        assert other.n_tokens == 300 and other._input_ids.tolist() == PROMPT
        if arguments.get("logits_all"):
            assert same_bits(other.scores[:300], llm.scores[:300])
        other.eval(text(2, UBATCH + 1))
        assert same_bits(last_logits(other), after)


def test_a_state_is_what_it_was_whatever_comes_after(load):
    llm = load()
    llm.eval(PROMPT)
    state = llm.save_state()
    llm.eval(text(2, RING_CELLS))
    llm.load_state(state)
    llm.eval(text(3, 20))
    other = load()
    other.eval([*PROMPT, *text(3, 20)])
    assert close(last_logits(llm), last_logits(other))


def test_a_prompt_continues_from_a_state(load, cold):
    llm, other = load(), load()
    llm.eval(PROMPT)
    other.load_state(llm.save_state())
    prompt = [*PROMPT, *text(2, 30)]
    tokens_of(other, prompt, 1)
    assert other.last_timings.reused_tokens == 300
    assert close(last_logits(other), cold(prompt))


def test_a_state_is_small(load):
    llm = load()
    llm.eval(PROMPT)
    state = llm.save_state()
    held = PER_TOKEN * (300 + 3 * min(300, RING_CELLS))
    assert held <= len(state.llama_state) < 1.1 * held
    assert state.llama_state_size == len(state.llama_state)
    assert state.scores.size == 0 and state.input_ids.shape == (300,)
    assert len(pickle.dumps(state)) < 1.1 * held + 4096


def test_a_state_has_no_logits_to_sample_from(load):
    llm = load()
    llm.eval(PROMPT)
    llm.load_state(llm.save_state())
    with pytest.raises(GenerationError, match="no logits to sample from; evaluate tokens first"):
        llm.sample()
    assert len(tokens_of(llm, PROMPT, 2)) == 2


def test_an_empty_state(load):
    llm = load()
    state = llm.save_state()
    llm.eval(PROMPT)
    llm.load_state(state)
    assert llm.n_tokens == 0
    llm.eval(PROMPT[:5])
    assert llm.n_tokens == 5


def test_a_larger_context_takes_the_state_of_a_smaller_one(load, cold):
    small, large = load(), load(n_ctx=2048)
    small.eval(PROMPT)
    large.load_state(small.save_state())
    large.eval(text(2, 20))
    assert close(last_logits(large), cold([*PROMPT, *text(2, 20)]))


# States that are refused


@pytest.fixture
def state(load):
    llm = load()
    llm.eval(PROMPT)
    made = llm.save_state()
    llm.close()
    return made


def still_works(llm, cold):
    """That a refusal changed nothing: the object continues from the 40 tokens it held."""
    assert llm.n_tokens == 40
    llm.eval([7])
    assert close(last_logits(llm), cold([*PROMPT[:40], 7]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"swaa": SwaaConfig(25, 2, fa_layers=[1])}, "other SWAA settings"),
        ({"swaa": SwaaConfig(24, 3, fa_layers=[1])}, "other SWAA settings"),
        ({"swaa": SwaaConfig(24, 2, fa_layers=[2])}, "other SWAA settings"),
        ({"swaa": SwaaConfig(24, 2, fa_layers=[1], fa_decode=True)}, "other SWAA settings"),
        ({"swaa": False}, "other SWAA settings: .*, here off"),
        ({"type_k": 8}, "other types of K and V: 1 and 1, here 8 and 1"),
        ({"flash_attn": False}, "other flash_attn: on, here off"),
        ({"swa_full": True}, "other swa_full, or n_ctx: a ring, here no ring"),
        ({"n_ctx": 256}, "other swa_full, or n_ctx: a ring, here no ring"),
        ({"rope_freq_base": 5000.0}, "other model or RoPE settings"),
        ({"kv_overrides": {"qwen3.attention.layer_norm_rms_epsilon": 0.5}}, "other kv_overrides"),
    ],
)
def test_other_settings(load, state, arguments, message):
    llm = load(**arguments)
    llm.eval(PROMPT[:40])
    with pytest.raises(StateError, match=f"the state was saved under {message}") as caught:
        llm.load_state(state)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("evaluate the prompt again")
    assert llm.n_tokens == 40


def test_another_model_of_the_same_shape(load, state, gguf_model):
    llm = load(gguf_model("qwen3", seed=1, layers=4))
    with pytest.raises(StateError, match="saved under other model or RoPE settings"):
        llm.load_state(state)


def test_an_annotated_file_is_the_same_model(load, state, path, tmp_path):
    from swaa_edge.convert.annotate import annotate

    annotate(path, tmp_path / "annotated.gguf", RING)
    llm = load(tmp_path / "annotated.gguf", swaa=None)
    llm.load_state(state)
    assert llm.n_tokens == 300


def test_a_context_that_is_too_small(load):
    llm = load()
    llm.eval(text(3, 700))
    with pytest.raises(StateError, match="the state holds 700 tokens, but the context has room for 512; raise n_ctx"):
        load(n_ctx=512).load_state(llm.save_state())


def test_a_ring_that_is_too_small(load):
    llm = load(n_batch=256, n_ubatch=256)
    llm.eval(text(3, 700))
    with pytest.raises(
        StateError, match="the state's ring has 512 cells, but this context's ring has 256; raise n_ubatch"
    ):
        load().load_state(llm.save_state())


def test_a_state_of_upstream(load, path):
    import llama_cpp

    llm = load()
    llm.eval(PROMPT[:40])
    theirs = llama_cpp.Llama(path, n_ctx=512, verbose=False)
    theirs.eval(PROMPT[:40])
    with pytest.raises(StateError, match="doesn't record which model and settings"):
        llm.load_state(theirs.save_state())
    theirs.close()


@pytest.mark.parametrize(
    "damage",
    [
        {"n_tokens": 301},
        {"n_tokens": -1},
        {"n_tokens": "many"},
        {"input_ids": np.array([], np.intc)},
        {"input_ids": np.full(300, 768, np.intc)},
        {"input_ids": np.full(300, -1, np.intc)},
        {"scores": np.zeros((3, 7), np.single)},
        {"llama_state": b""},
        {"llama_state_size": 7},
        {"ring_cells": None},
        {"seed": None},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_a_state_that_is_damaged_outside(load, state, cold, damage):
    llm = load()
    llm.eval(PROMPT[:40])
    wrong = copy.copy(state)
    for name, value in damage.items():
        setattr(wrong, name, value)
    with pytest.raises(StateError, match="the state is damaged; evaluate the prompt again"):
        llm.load_state(wrong)
    still_works(llm, cold)


def test_a_state_that_is_damaged_inside(load, state, cold):
    """Cuts and flipped bytes anywhere: refused with the object reset, or loaded; it works afterwards."""
    llm, generator = load(), random.Random(5)
    data, refused = bytes(state.llama_state), 0
    wrongs = [data[:length] for length in (1, 3, 4, 20, 100, 1000, len(data) // 2, len(data) - 1)]
    for position in [*range(0, 200, 3), *(generator.randrange(len(data)) for _ in range(100))]:
        wrongs.append(data[:position] + bytes([data[position] ^ (1 << generator.randrange(8))]) + data[position + 1 :])
    for wrong in wrongs:
        damaged = copy.copy(state)
        damaged.llama_state, damaged.llama_state_size = bytearray(wrong), len(wrong)
        try:
            llm.load_state(damaged)
        except StateError as error:
            refused += 1
            assert "\n" not in str(error) and "evaluate the prompt again" in str(error)
            assert llm.n_tokens == 0
    assert refused > 20
    prompt = text(4, 60)
    llm.reset()
    llm.eval(prompt)
    assert close(last_logits(llm), cold(prompt))


# Upstream's caches


def caches(kind, folder):
    import llama_cpp

    return llama_cpp.LlamaRAMCache() if kind == "RAM" else llama_cpp.LlamaDiskCache(str(folder))


def completed(llm, prompt, count=4):
    answer = llm.create_completion(prompt, max_tokens=count, temperature=0)
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("kind", ["RAM", "disk"])
def test_conversations_take_turns_through_a_cache(load, cold, kind, tmp_path):
    llm, cache = load(), caches(kind, tmp_path)
    llm.set_cache(cache)
    talks = {"a": text(1, 300), "b": text(2, 200)}
    for turn in range(2):
        for name, tokens in talks.items():
            text_out, cached = completed(llm, tokens)
            assert cached == 0 if turn == 0 else cached >= len(tokens) - 30
            # What is in the context is what the answer was made of; the last token was sampled and not evaluated.
            held = llm._input_ids.tolist()
            assert held[: len(tokens)] == tokens
            plain = load()
            assert completed(plain, tokens)[0] == text_out
            talks[name] = [*held, *text(turn + 5, 20)]
    assert cache.cache_size > 0
    llm.set_cache(None)
    assert completed(llm, talks["a"])[1] == 0


@pytest.mark.parametrize("kind", ["RAM", "disk"])
def test_a_cache_survives_the_object(load, kind, tmp_path):
    cache, llm = caches(kind, tmp_path), load()
    llm.set_cache(cache)
    completed(llm, PROMPT)
    held = llm._input_ids.tolist()
    llm.close()
    other = load()
    other.set_cache(cache if kind == "RAM" else caches(kind, tmp_path))
    assert completed(other, [*held, *text(3, 10)])[1] == len(held)


def test_models_and_settings_share_a_cache(load, cold, tmp_path):
    """One cache for all: everybody finds what is of its own kind, and nobody meets an error."""
    cache = caches("RAM", tmp_path)
    kinds = [{}, {"swa_full": True}, {"swaa": False}, {"type_k": 8, "type_v": 8}]
    answers = []
    for arguments in kinds:
        llm = load(**arguments)
        llm.set_cache(cache)
        assert completed(llm, PROMPT)[1] == 0
        answers.append(llm._input_ids.tolist())
    for arguments, answer in zip(kinds, answers, strict=True):
        llm = load(**arguments)
        llm.set_cache(cache)
        assert completed(llm, [*answer, *text(3, 10)])[1] == len(answer)


def test_a_ring_that_cannot_go_back_evaluates_again(load, cold):
    llm, cache = load(), caches("RAM", None)
    llm.set_cache(cache)
    tokens_of(llm, PROMPT, RING_CELLS)
    llm.cache[llm._input_ids.tolist()] = llm.save_state()
    llm.reset()
    # What the cache has begins with this prompt, but its ring has moved on.
    prompt = [*PROMPT, *text(3, 10)]
    assert completed(llm, prompt, 1)[1] == 0
    assert close(last_logits(llm), cold(prompt))
