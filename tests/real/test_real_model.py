"""The real model through the whole chain: fetched, converted, inspected, run, and compared with transformers.

scripts/real/fetch.py && pytest tests/real
"""

import json
import unicodedata

import numpy as np
import pytest
from click.testing import CliRunner
from real import demo
from real.fetch import real_model

from support import ROOT
from support.oracle.rule import Rule
from swaa_edge import SwaaConfig, SwaaLlama, native
from swaa_edge.cli import cli
from swaa_edge.engine.tokenizer import open_vocabulary
from swaa_edge.files.model import read_model
from swaa_edge.metadata import read_swaa

pytestmark = [pytest.mark.native, pytest.mark.real]

SWAA = SwaaConfig(64, 16, fa_layers="1::4", fa_decode=True, tail_count=24)
CHAT = [
    {"role": "user", "content": "What do bees make?"},
    {"role": "assistant", "content": "Honey."},
    {"role": "user", "content": "Thanks!"},
]
RENDERED = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat do bees make?<|im_end|>\n<|im_start|>assistant\nHoney.<|im_end|>\n"
    "<|im_start|>user\nThanks!<|im_end|>\n<|im_start|>assistant\n"
)


def run(*arguments):
    done = CliRunner().invoke(cli, list(map(str, arguments)), prog_name="swaa-edge")
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_model().hf)


@pytest.fixture(scope="module")
def f16(tmp_path_factory):
    """The folder converted by the command to f16, which holds its weights exactly, with the keys of `SWAA`."""
    output = tmp_path_factory.mktemp("real") / "f16.gguf"
    settings = ["--window", 64, "--sinks", 16, "--fa-layers", "1::4", "--fa-decode", "--tail", 24]
    run("convert", real_model().hf, "-o", output, "--outtype", "f16", *settings)
    return output


@pytest.fixture(scope="module")
def reference(tokenizer):
    """(tokens of the story, their logits under full attention, their logits under `SWAA`), by transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from support.oracle.oracle import oracle_logits

    model = AutoModelForCausalLM.from_pretrained(real_model().hf, dtype=torch.float32).eval()
    tokens, n_layers = tokenizer.encode(demo.STORY)[:200], model.config.num_hidden_layers
    in_tail = [at >= len(tokens) - SWAA.tail_count for at in range(len(tokens))]
    rule = Rule(64, 16, *(tuple(flags(n_layers)) for flags in (SWAA.sliding_layers, SWAA.fa_decode_layers)))
    assert rule.sliding.count(False) == 8 and rule.fa_decode.count(True) == 22
    full = oracle_logits(model, tokens, [False] * len(tokens), Rule.full(n_layers))
    return tokens, full, oracle_logits(model, tokens, in_tail, rule)


def load(path, **arguments):
    return SwaaLlama(path, **{"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False} | arguments)


def logits(path, tokens, **arguments):
    """Logits after each of `tokens`, evaluated as one turn. float32 [tokens, vocabulary]"""
    rows, decode_from = [], arguments.pop("decode_from", None)
    llm = load(path, **arguments)
    llm.eval(tokens, decode_from=decode_from, on_logits=lambda found: rows.append(found.copy()))
    llm.close()
    return np.concatenate(rows)


def divergence(expected, found):
    """Mean KL divergence of `found` from `expected`, in nats per token."""

    def log_softmax(rows):
        rows = rows - rows.max(axis=1, keepdims=True)
        return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))

    expected, found = log_softmax(expected), log_softmax(found)
    return (np.exp(expected) * (expected - found)).sum(axis=1).mean()


def broad_text():
    """Prose, code, tables and every kind of character; text that holds tokenizer traps: numbers after spaces."""
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    code = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "convert").glob("*.py"))]
    characters = "".join(chr(at) for at in range(32, 0x3100, 7) if unicodedata.category(chr(at))[0] not in "C")
    traps = "  1 22   333\t4\n\n 5  don't I'LL we've 3.14e-10 ٣٤ Ⅷ ½ x²  \r\n"
    traps += "\u3000全角 漢字かな 한국어 עברית 👩‍👩‍👧 e\u0301 \ufffd"
    return [*pages, *code, characters, traps, " ", "\n" * 5, "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>"]


def test_all_files_tokenize_as_the_original(tokenizer):
    model, texts = real_model(), broad_text()
    tokens = {}
    for path in (model.original, model.q8_0, model.q4_k_m):
        with open_vocabulary(path) as vocabulary:
            tokens[path] = [vocabulary.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    assert sum(map(len, tokens[model.original])) > 40_000
    assert tokens[model.q8_0] == tokens[model.q4_k_m] == tokens[model.original]
    assert [tokenizer.encode(text) for text in texts] == tokens[model.original]


def test_all_files_keep_the_originals_facts(tokenizer):
    model = real_model()
    original = read_model(model.original)
    keys = [key for key in original.header.fields if key.startswith(("llama.", "tokenizer."))]
    assert len(keys) > 20 and original.context_length == 8192
    for path in (model.q8_0, model.q4_k_m):
        found = read_model(path)
        for key in keys:
            if key != "tokenizer.ggml.add_space_prefix":  # False, as for every model of this kind
                assert found.header.value(key) == original.header.value(key), key
        assert found.header.value("general.license") == "apache-2.0"
        assert found.n_parameters == original.n_parameters and read_swaa(path) is None
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")]
    assert ids == [original.header.value(name) for name in names] == [1, 2, 2]


def test_the_chat_template_renders(tokenizer):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == RENDERED
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = read_model(real_model().q8_0).header.value("tokenizer.chat_template")
    formatter = Jinja2ChatFormatter(template=template, eos_token="<|im_end|>", bos_token="<|im_start|>")
    assert formatter(messages=CHAT).prompt == RENDERED


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["full attention", "window, sinks, FA decode, tail 32"])
def test_golden_text(name, threads):
    """Full attention and a window of 256 tokens with a tail write the same; the window alone loses the beginning."""
    answer, copied = demo.texts(real_model().q8_0, demo.CONFIGURATIONS[name], threads)
    assert answer == "The lighthouse at Cape Merrin was built by an engineer named Tobias Hale, who was a sailor."
    assert copied == " forty blankets, on the back of a patient mule called Duchess.\nIn"


def test_a_window_alone_loses_the_beginning():
    answer, copied = demo.texts(real_model().q8_0, demo.CONFIGURATIONS["window"], 1)
    assert "Hale" not in answer and "blankets" not in copied


def test_logits_are_those_of_transformers(f16, reference):
    tokens, full, swaa = reference
    for expected, settings in ((full, False), (swaa, None)):
        found = logits(f16, tokens, swaa=settings)
        assert np.abs(found - expected).max() < 0.02 * expected.std()
        assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.99
    # Without the settings, the bound would be exceeded.
    assert np.abs(full - swaa).max() > 0.5 * full.std()


@pytest.mark.parametrize(("name", "limit"), [("q8_0", 0.008), ("q4_k_m", 0.12)])
def test_quantized_logits_are_near(name, limit, reference):
    tokens, full, swaa = reference
    for expected, settings in ((full, False), (swaa, SWAA)):
        assert 0 < divergence(expected, logits(getattr(real_model(), name), tokens, swaa=settings)) < limit


def test_a_tail_is_what_decodes_by_hand(reference):
    tokens = reference[0]
    path, plain = real_model().q8_0, SwaaConfig(64, 16, "1::4", True)
    tail = logits(path, tokens, swaa=SWAA)
    by_hand = logits(path, tokens, swaa=plain, decode_from=len(tokens) - SWAA.tail_count)
    assert np.abs(tail - by_hand).max() < 0.01 * tail.std()
    without = logits(path, tokens, swaa=plain, decode_from=native.NEVER)
    assert np.abs(tail - without)[-SWAA.tail_count :].max() > 0.3 * tail.std()
    assert np.abs(tail - without)[: -SWAA.tail_count].max() < 0.01 * tail.std()


def test_the_commands_work_on_it(f16, tmp_path):
    found = json.loads(run("inspect", f16, "--json"))
    assert found["swaa"]["window_size"] == 64 and found["swaa"]["tail_count"] == 24
    annotated = tmp_path / "fast.gguf"
    run("annotate", real_model().q4_k_m, "-o", annotated, "--recipe", "fast", "--window", 256, "--sinks", 16)
    assert "\n  window      256 tokens\n  sinks       16 tokens\n" in run("inspect", annotated)
    (tmp_path / "prompt.txt").write_text(f"{demo.STORY}\n{demo.REPEATED}", encoding="utf-8")
    printed = run("run", annotated, "-f", tmp_path / "prompt.txt", "-n", 8, "--temp", 0, "--json")
    report = json.loads(printed)
    assert report["text"].startswith(" forty blankets, on the back") and report["swaa"]["window_size"] == 256
