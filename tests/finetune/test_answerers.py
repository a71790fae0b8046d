"""The models that distill asks: our engine on a GGUF, and transformers on a Hugging Face model directory."""

import json
import shutil

import pytest

from support.fakes.distill_files import lines, read, run
from swaa_edge.errors import ModelFileError
from swaa_edge.finetune.answerers import LlamaAnswerer, reusable

SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 40}


def test_the_reusable_part_of_a_prompt():
    before = list(range(100))
    assert reusable(None, before, 8) == 0
    assert reusable(before, before, 8) == 96
    assert reusable(before, before[:97], 8) == 96
    assert reusable(before, before[:96], 8) == 88, "its last token is computed in a batch of its own"
    assert reusable(before[:96], before, 8) == 88, "so was the last token of the prompt before"
    assert reusable(before, [*before[:41], -1, *before[42:]], 8) == 40
    assert reusable(before, [-1, *before[1:]], 8) == 0


# The engine


@pytest.fixture(scope="module")
def demo():
    from swaa_edge.demo import MODEL

    return str(MODEL)


@pytest.mark.native
def test_a_response_does_not_depend_on_earlier_prompts(demo):
    from swaa_edge import SwaaLlama
    from swaa_edge.generate.prompts import Prompts
    from swaa_edge.support.sample_text import real_text

    with Prompts(demo) as prompts:
        text = real_text()
        asked = [prompts.ask(text[: 1500 + more], "what is the code of otter?") for more in (0, 400, 37)]
        asked.append(prompts.ask(text[700:1800], "what is the code of otter?"))

    def answerer():
        threads = {"n_threads": 1, "n_threads_batch": 1}
        llm = SwaaLlama(demo, swaa=False, n_ctx=1024, n_batch=64, n_ubatch=64, verbose=False, **threads)
        return LlamaAnswerer(llm, max_tokens=12, sampling=SAMPLING | {"temperature": 3.0})

    def alone(prompt, seed):
        fresh = answerer()
        try:
            return fresh.answer(prompt, seed)
        finally:
            fresh.close()

    shared = answerer()
    order = [(0, 1), (0, 2), (1, 1), (2, 7), (3, 1), (3, 2), (1, 2), (0, 1)]
    found = [shared.answer(asked[at], seed) for at, seed in order]
    reused = shared._llm.last_timings.reused_tokens
    shared.close()
    assert reused == len(asked[0]) - 1
    assert found == [alone(asked[at], seed) for at, seed in order]
    assert len({response.text for response in found}) > 3 and found[0] == found[-1]
    assert all(response.tokens <= 12 for response in found)


# Transformers


@pytest.fixture(scope="module")
def folder(model_dir):
    return model_dir("qwen3", layers=2)


def questions(count):
    return [(f"The fox number {n} lives in house {n * 7}. " * 9, f"Where does number {n} live?") for n in range(count)]


@pytest.mark.native
@pytest.mark.parametrize("chat", [True, False])
def test_both_kinds_of_model_get_the_same_prompt(folder, gguf_model, chat):
    from swaa_edge.finetune.hf_answerer import HfPrompts
    from swaa_edge.generate.prompts import Prompts

    with Prompts(gguf_model("qwen3"), chat=chat) as ours, HfPrompts(folder, chat=chat) as theirs:
        assert ours.chat == theirs.chat == chat
        for document, question in (*questions(2), ("Text.\n", "Who?"), ("Ann\u00e9 \U0001f98a<|im_end|> here", "")):
            assert theirs.ask(document, question) == ours.ask(document, question), (document, question)


@pytest.mark.native
def test_transformers_responds_as_the_engine(folder, gguf_model):
    from swaa_edge import SwaaLlama
    from swaa_edge.finetune.hf_answerer import HfAnswerer, HfPrompts

    sampling = SAMPLING | {"temperature": 0.0}
    with HfPrompts(folder) as prompts:
        asked = [prompts.ask(*question) for question in questions(3)]
    settings = {"n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "verbose": False}
    llm = SwaaLlama(str(gguf_model("qwen3")), swaa=False, n_ctx=1024, **settings)
    ours, theirs = (
        LlamaAnswerer(llm, max_tokens=10, sampling=sampling),
        HfAnswerer(folder, max_tokens=10, sampling=sampling, threads=1),
    )
    found = [theirs.answer(prompt, 0) for prompt in asked]
    # A random model often generates half a character, which one side drops and the other replaces by a mark.
    got = [(response.text.replace("\ufffd", ""), response.ended, response.tokens) for response in found]
    expected = [ours.answer(prompt, 0) for prompt in asked]
    assert got == [(response.text, response.ended, response.tokens) for response in expected]
    assert len(set(got)) == 3 and all(response.tokens == 10 for response in found)
    ours.close()
    theirs.close()


def test_transformers_responds_by_the_seed_alone(folder, monkeypatch):
    import torch

    from swaa_edge.finetune import hf_answerer

    monkeypatch.setattr(hf_answerer, "_STEP", 16)
    with hf_answerer.HfPrompts(folder) as prompts:
        asked = [prompts.ask(*question) for question in questions(2)]
    asked.append(asked[0][:-20] + asked[1][-20:])

    def answerer():
        return hf_answerer.HfAnswerer(folder, max_tokens=8, sampling=SAMPLING | {"temperature": 2.0}, threads=1)

    shared = answerer()
    order = [(0, 1), (0, 2), (1, 1), (2, 1), (0, 1)]
    found = [shared.answer(asked[at], seed) for at, seed in order]
    assert found == [answerer().answer(asked[at], seed) for at, seed in order]
    assert len({response.text for response in found}) > 2 and found[0] != found[1] and found[0] == found[-1]
    # The output of a random model hardly depends on distant tokens, so K and V are compared.
    counts, tensor = [], shared._tensor
    monkeypatch.setattr(shared, "_tensor", lambda tokens: counts.append(len(tokens)) or tensor(tokens))
    read = []
    for prompt in (asked[2], asked[1], asked[2]):
        fresh = answerer()
        counts.clear()
        for one in (shared, fresh):
            one._prefill(prompt)
        for ours, theirs in zip(shared._cache.layers, fresh._cache.layers, strict=True):
            assert ours.keys.shape[2] == len(prompt) - 1
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        read.append(sum(counts))
    assert read[0] < 16 + 20 < read[1], "the beginning was in the cache, since asked[0] shares it"


@pytest.fixture
def ending(folder, tmp_path):
    """A model directory whose greedy response to the first question ends, with a token that it generates early."""
    from swaa_edge.finetune.hf_answerer import HfAnswerer, HfPrompts

    with HfPrompts(folder) as prompts:
        prompt = prompts.ask(*questions(1)[0])
    answerer = HfAnswerer(folder, max_tokens=10, sampling=SAMPLING | {"temperature": 0.0}, threads=1)
    answerer._prefill(prompt)
    tokens = answerer._generate(prompt, 0)
    end = max(at for at, token in enumerate(tokens) if token not in tokens[:at])
    assert end > 0
    copied = shutil.copytree(folder, tmp_path / "ending")
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[end]], "temperature": 0.1}))
    return copied, answerer._text(tokens[:end])


def test_a_folder_from_end_to_end(ending, tmp_path, monkeypatch):
    import transformers

    from swaa_edge.finetune.data import read_examples
    from swaa_edge.finetune.hf_answerer import HfPrompts

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, text = ending
    document, question = questions(1)[0]
    data = lines(tmp_path / "own.jsonl", {"prompt": document, "question": question, "answer": ".", "id": "fox"})
    out = tmp_path / "out.jsonl"
    more = ["--temp", 0, "--max-tokens", 12, "--scorer", "regex", "--threads", 1]
    result = run(folder, "--data", data, "-o", out, *more)
    assert (result.exit_code, result.stderr) == (0, "")
    assert read(out) == [
        {"id": "fox", "sample": 0, "prompt": document, "question": question, "answer": text, "reference": ["."]}
    ]
    # finetune learns it after exactly the prompt that it responded to.
    (example,), _ = read_examples(out, transformers.AutoTokenizer.from_pretrained(folder), max_length=10_000)
    prompt = HfPrompts(folder).ask(document, question).tolist()
    assert example.tokens[: len(prompt)] == prompt and example.generated.index(True) == len(prompt)
    result = run(folder, "--data", data, "-o", out, "--force", "--ctx", 50)
    assert result.exit_code == 1 and f"Error: {data}:1: a prompt of" in result.stderr


def test_a_folder_that_transformers_can_t_load(folder, tmp_path):
    from swaa_edge.finetune.hf_answerer import HfAnswerer, HfPrompts

    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    with pytest.raises(ModelFileError, match=r"transformers can't load .*broken"):
        HfAnswerer(broken, max_tokens=4, sampling=SAMPLING)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(ModelFileError, match=r"chat template fails \(.*no such role.*--no-chat"):
        HfPrompts(broken).ask("a", "b")
