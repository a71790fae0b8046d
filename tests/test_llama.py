"""SwaaLlama on the real engine: settings, cancelling, progress, timings, errors. Its phases: engine/test_phases.py.

Most tests run one tiny model whose four layers all slide over a window of 8 and decode with full attention.
"""

import copy
import itertools
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from support.engine.tiny_llm import SHORT_PROMPT as PROMPT
from support.engine.tiny_llm import SLIDING, VOCAB, last_logits, raw_logits, tokens_of
from swaa_edge.config import SwaaConfig
from swaa_edge.engine.preflight import ResolvedSwaa
from swaa_edge.errors import (
    ConfigError,
    GenerationCancelled,
    GenerationError,
    ModelFileError,
    UnsupportedModelError,
)
from swaa_edge.files.model import read_model

pytestmark = pytest.mark.native


@pytest.fixture
def load(load):
    """load(**arguments): a SwaaLlama of the tiny model whose layers all slide and decode with full attention."""
    return lambda *model, **arguments: load(*model, **{"swaa": SLIDING, "n_ctx": 512} | arguments)


# Settings


def test_the_settings_in_force(load):
    llm = load(swaa=SwaaConfig(7, 2, fa_layers="1::2", fa_decode=[0], recipe="mine"))
    assert llm.swaa == SwaaConfig(7, 2, fa_layers=(1, 3), fa_decode=(0,))
    assert (llm.swaa.recipe, llm.swaa_policy) == ("mine", "table")
    for off in (False, None):
        llm = load(swaa=off)
        assert (llm.swaa, llm.swaa_policy) == (None, None)


def test_off_is_full_attention_and_a_window_is_not(load):
    logits = []
    for swaa in (None, False, SwaaConfig(512), SLIDING):
        llm = load(swaa=swaa)
        llm.eval(PROMPT)
        logits.append(last_logits(llm))
    plain, off, wide, narrow = logits
    assert np.array_equal(plain, off) and np.array_equal(plain, wide)
    assert not np.array_equal(plain, narrow)


def test_flash_attention_can_be_off(load):
    on, off = load(), load(flash_attn=False)
    assert off.swaa_policy == "dense"
    for llm in (on, off):
        llm.eval(PROMPT)
    assert np.abs(last_logits(on) - last_logits(off)).max() < 0.15 * last_logits(on).std()


def test_a_context_is_whole_blocks(load):
    llm = load(n_ctx=300)
    assert (llm.n_ctx(), llm.input_ids.size) == (512, 512)
    llm.eval([5] * 512)
    assert llm.n_tokens == 512


def test_the_context_that_the_model_was_trained_for(load):
    assert load(n_ctx=0).n_ctx() == 8192


def test_a_model_that_was_read_already(load, path):
    llm = load(read_model(path))
    assert (llm.model_path, llm.swaa) == (path, SLIDING)
    assert llm.__getstate__()["model_path"] == path


def test_copies_have_the_same_settings(load):
    llm = load(on_prefill=print, kv_overrides={"qwen3.context_length": 1234})
    for other in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))):
        assert (other.swaa, other.n_ctx(), other.n_batch, other.on_prefill) == (SLIDING, 512, 32, None)
        assert other._model.n_ctx_train() == 1234
        other.close()


# Progress, timings, state


def test_progress_counts_what_is_evaluated(load):
    seen = []
    llm = load(on_prefill=lambda done, total: seen.append((done, total)))
    list(itertools.islice(llm.generate(PROMPT, temp=0), 3))
    assert seen == [(0, 65), (32, 65), (64, 65), (65, 65)]
    seen.clear()
    list(itertools.islice(llm.generate(PROMPT[:40], temp=0), 3))
    assert seen == [(0, 1), (1, 1)]


def test_timings_count_tokens(load):
    llm = load()
    list(itertools.islice(llm.generate(PROMPT, temp=0), 3))
    timings = llm.last_timings
    assert (timings.prompt_tokens, timings.reused_tokens) == (65, 0)
    assert (timings.generated_tokens, timings.decode_tokens) == (3, 2)
    assert timings.prefill_seconds > 0 and timings.decode_seconds > 0
    assert timings.prefill_speed == 65 / timings.prefill_seconds
    assert timings.decode_speed == 2 / timings.decode_seconds
    assert type(timings)().prefill_speed is None


def test_a_saved_state_continues_as_before(load):
    llm = load()
    llm.eval(PROMPT)
    state = llm.save_state()
    expected = list(itertools.islice(llm.generate(PROMPT, temp=0), 6))
    other = load()
    other.load_state(state)
    assert list(itertools.islice(other.generate(PROMPT, temp=0), 6)) == expected


def test_logits_of_every_token_are_kept_on_request(load):
    llm = load(logits_all=True)
    llm.eval(PROMPT)
    assert np.array_equal(llm.scores[64], last_logits(llm))
    expected = raw_logits(load(), ("PREFILL", PROMPT[:32]), ("PREFILL", PROMPT[32:40]))
    assert np.abs(llm.scores[39] - expected).max() < 0.15 * expected.std()
    assert llm.create_completion(PROMPT, max_tokens=2, logprobs=1)["choices"][0]["logprobs"]


# Cancelling


def test_cancel_between_ubatches_keeps_what_is_done(load, decoded):
    llm = load()
    expected = tokens_of(load(), PROMPT, 6)
    llm.on_prefill = lambda done, total: llm.cancel() if done == 32 else None
    decoded.clear()
    with pytest.raises(GenerationCancelled, match="cancelled"):
        tokens_of(llm, PROMPT, 6)
    assert (llm.n_tokens, decoded) == (32, [("PREFILL", 32)])
    llm.on_prefill = None
    assert tokens_of(llm, PROMPT, 6) == expected
    assert llm.last_timings.reused_tokens == 32


def test_cancel_within_a_ubatch(load, monkeypatch, capfd):
    from llama_cpp._internals import LlamaContext

    llm = load(n_ctx=4096, n_batch=2048, n_ubatch=2048)
    long = [PROMPT[i % 65] for i in range(2048)]
    started, decode = threading.Event(), LlamaContext.decode

    def announced(self, batch):
        started.set()
        decode(self, batch)

    monkeypatch.setattr(LlamaContext, "decode", announced)
    canceller = threading.Thread(target=lambda: started.wait() and llm.cancel())
    canceller.start()
    with pytest.raises(GenerationCancelled) as caught:
        llm.eval(long)
    canceller.join()
    assert str(caught.value.__cause__) == "llama_decode returned 2"
    assert llm.n_tokens == 0
    assert capfd.readouterr().err == ""
    monkeypatch.undo()
    assert tokens_of(llm, PROMPT, 6) == tokens_of(load(), PROMPT, 6)


def test_cancel_between_tokens(load):
    llm = load()
    stream = llm.generate(PROMPT, temp=0)
    next(stream)
    llm.cancel()
    with pytest.raises(GenerationCancelled):
        next(stream)
    assert tokens_of(llm, PROMPT, 6) == tokens_of(load(), PROMPT, 6)


def test_cancelling_a_completion_while_its_prompt_is_tokenized(load):
    llm = load()
    tokenizer = llm.tokenizer_
    encode = tokenizer.tokenize

    def cancelled_meanwhile(*arguments):
        llm.cancel()
        return encode(*arguments)

    tokenizer.tokenize = cancelled_meanwhile
    with pytest.raises(GenerationCancelled):
        llm.create_completion("some text", max_tokens=3)
    tokenizer.tokenize = encode
    assert llm.create_completion("some text", max_tokens=3, temperature=0)["usage"]["completion_tokens"] > 0


def test_a_cancel_with_nothing_running_does_not_stop_what_comes_later(load):
    llm = load()
    llm.cancel()
    assert len(tokens_of(llm, PROMPT, 6)) == 6
    llm.cancel()
    assert llm.create_completion("some text", max_tokens=3)["choices"]


def test_an_interrupt_keeps_the_model_usable(load):
    llm = load()
    expected = tokens_of(load(), PROMPT, 6)

    def interrupt(done, total):
        if done == 64:
            raise KeyboardInterrupt

    llm.on_prefill = interrupt
    with pytest.raises(KeyboardInterrupt):
        tokens_of(llm, PROMPT, 6)
    llm.on_prefill = None
    assert llm.n_tokens == 64
    assert tokens_of(llm, PROMPT, 6) == expected


def test_logits_of_an_interrupted_evaluation_are_not_sampled_from(load, decoded, monkeypatch):
    from llama_cpp._internals import LlamaContext

    llm = load()
    expected = tokens_of(load(), PROMPT, 1)
    llm.eval(PROMPT)
    decode = LlamaContext.decode

    def interrupted(self, batch):
        decode(self, batch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LlamaContext, "decode", interrupted)
        llm.eval([9])
    decoded.clear()
    assert tokens_of(llm, PROMPT, 1) == expected
    assert decoded == [("PREFILL", 1)]


def test_a_model_whose_state_cannot_be_cut_back_starts_over(load, monkeypatch):
    # As recurrent models answer.
    llm = load(swaa=False)
    expected = tokens_of(load(swaa=False), PROMPT, 6)
    llm.on_prefill = lambda done, total: llm.cancel() if done == 32 else None
    with monkeypatch.context() as patch, pytest.raises(GenerationCancelled):
        patch.setattr(llm._ctx, "kv_cache_seq_rm", lambda *_: False)
        tokens_of(llm, PROMPT, 6)
    assert llm.n_tokens == 0
    llm.on_prefill = None
    assert tokens_of(llm, PROMPT, 6) == expected


# Errors


def test_too_many_tokens(load):
    llm = load()
    llm.eval(PROMPT)
    with pytest.raises(GenerationError) as caught:
        llm.eval([1] * 448)
    assert str(caught.value) == "448 tokens after 65 don't fit the context of 512 tokens; raise n_ctx"
    # Programs recognize this case of llama_cpp's by its type and text.
    with pytest.raises(ValueError, match="exceed context window of 512"):
        llm.create_completion([1] * 600)
    assert tokens_of(llm, PROMPT, 6) == tokens_of(load(), PROMPT, 6)


def test_tokens_that_do_not_exist(load):
    llm = load()
    with pytest.raises(GenerationError) as caught:
        llm.eval([5, VOCAB])
    assert str(caught.value) == f"the engine refused 2 tokens; each must be from 0 to {VOCAB - 1}"
    assert tokens_of(llm, PROMPT, 6) == tokens_of(load(), PROMPT, 6)


def test_logits_that_do_not_exist(load):
    llm = load()
    with pytest.raises(GenerationError, match="no logits to sample from; evaluate tokens first"):
        llm.sample()
    llm.eval(PROMPT)
    for idx, message in ((63, "no logits at idx = 63; set logits_all"), (65, "out of range"), (-1, "out of range")):
        with pytest.raises(GenerationError, match=message):
            llm.sample(idx=idx)
    assert llm.sample(temp=0, idx=64) == llm.sample(temp=0)
    llm.reset()
    with pytest.raises(GenerationError, match="no logits"):
        llm.sample()


def test_an_empty_prompt(load):
    with pytest.raises(GenerationError, match="the prompt is empty"):
        next(load().generate([]))


def test_files_that_are_refused_leave_nothing_behind(load, path, tmp_path, recwarn):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(path).read_bytes()[:-1000])
    for wrong, error, message in [
        (tmp_path / "none.gguf", ModelFileError, "does not exist"),
        (broken, ModelFileError, "truncated"),
        (__file__, ModelFileError, "not a GGUF file"),
    ]:
        with pytest.raises(error, match=message):
            load(str(wrong))
    assert not recwarn.list


def test_an_architecture_that_cannot_slide(load, path, tmp_path):
    data = Path(path).read_bytes()
    fake = tmp_path / "fake.gguf"
    # The same number of letters, so that nothing else in the file moves.
    fake.write_bytes(data.replace(b"qwen3", b"rwkv7"))
    with pytest.raises(UnsupportedModelError, match="SWAA can't be applied to the architecture rwkv7"):
        load(str(fake))


def test_a_broken_chat_template(load, path, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(path).read_bytes().replace(b"{% for message", b"{% f0r message"))
    with pytest.raises(ModelFileError, match="chat template that is not valid Jinja: Encountered unknown tag 'f0r'"):
        load(str(broken))


def test_the_engines_own_reason_is_reported(load, monkeypatch):
    import swaa_edge.llama

    # As if Python had let a wrong override through.
    overrides = {"swaa.version": 1, "swaa.window_size": 0, "swaa.sink_count": 0} | {
        f"swaa.{name}_layers": "1111" for name in ("sliding", "fa_decode")
    }
    monkeypatch.setattr(swaa_edge.llama, "resolve_swaa", lambda *_: ResolvedSwaa(overrides, None))
    with pytest.raises(ModelFileError, match="window_size"):
        load(swaa=None)


def test_contexts_that_are_refused(load):
    with pytest.raises(ConfigError, match="n_batch = 0 is out of range"):
        load(n_batch=0)
    with pytest.raises(ConfigError, match="quantized V cache"):
        load(flash_attn=False, type_v=8)
