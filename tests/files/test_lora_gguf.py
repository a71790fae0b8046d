"""A GGUF adapter gives the logits of the merged model, under its recipe only, and what doesn't fit is refused."""

import contextlib
import dataclasses
import math
import shutil

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from support import models
from support.adapters import ALPHA, RANK, edit_config, make_adapter
from swaa_edge import SwaaConfig
from swaa_edge.cli import cli
from swaa_edge.convert import child, hf
from swaa_edge.convert.annotate import annotate
from swaa_edge.convert.lora_merge import read_adapter
from swaa_edge.convert.lora_to_gguf import convert_adapter, scaled_alpha
from swaa_edge.engine.preflight import check_tokenizer, resolve_swaa
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError, ModelFileError, UnsupportedModelError
from swaa_edge.evaluate import comparison
from swaa_edge.files.header import read_header
from swaa_edge.files.lora_gguf import read_lora
from swaa_edge.files.lora_training import BaseModel, Training, save_training
from swaa_edge.metadata import read_swaa

LAYERS = 4
# Layer 0 slides and decodes with full attention, 1 keeps it, 2 and 3 slide always.
RECIPE = SwaaConfig(24, 2, fa_layers=[1], fa_decode=[0], tail_count=9, recipe="mine")
KINDS = {"plain": {}, "rslora": {"use_rslora": True}}
TARGETS = ("q_proj", "k_proj", "v_proj", "down_proj")
PROMPT = [(37 * n * n + 11 * n) % 700 + 6 for n in range(90)]
ANSWER = [(53 * n * n + 5) % 700 + 6 for n in range(6)]


@pytest.fixture(scope="module")
def folders(model_dir, tmp_path_factory):
    """Adapters of each kind, with what our own training writes down."""
    made = {}
    for kind, options in KINDS.items():
        made[kind] = make_adapter(tmp_path_factory.mktemp(kind) / f"tuned-{kind}", LAYERS, 8, TARGETS, **options)
        save_training(made[kind], Training(RECIPE, BaseModel.of(model_dir("qwen3", layers=LAYERS))))
    return made


@pytest.fixture(scope="module")
def adapters(folders, model_dir, tmp_path_factory):
    """The same as GGUF adapters."""
    output = tmp_path_factory.mktemp("adapters")
    base = model_dir("qwen3", layers=LAYERS)
    return {kind: convert_adapter(base, folder, output / f"{kind}.gguf") for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def base(gguf_model):
    return gguf_model("qwen3", layers=LAYERS)


def logits(path, **arguments):
    """Logits of each token of a prompt and of a generated answer, [tokens, n_vocab], and the settings in force."""
    from swaa_edge import SwaaLlama

    settings = {"n_ctx": 256, "n_batch": 32, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    # K and V in float32, so that two ways to the same numbers do not differ by rounding.
    rows, llm = [], SwaaLlama(str(path), type_k=0, type_v=0, **settings | arguments)
    with contextlib.closing(llm):
        llm.eval(PROMPT, len(PROMPT), lambda found: rows.append(found.copy()))
        for token in ANSWER:
            llm.eval([token], len(PROMPT), lambda found: rows.append(found.copy()))
        return np.concatenate(rows), llm.swaa


def apart(found, expected):
    """The largest difference of two rows, as a share of the largest logit."""
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.native
@pytest.mark.parametrize("kind", KINDS)
def test_base_and_adapter_are_the_merged_model(kind, base, adapters, folders, model_dir, tmp_path):
    merged = tmp_path / "merged.gguf"
    folder = model_dir("qwen3", layers=LAYERS)
    hf.convert(folder, merged, outtype="f32", lora=folders[kind], pre=models.PRE_TOKENIZER)
    expected, settings = logits(merged)
    found, applied = logits(base, lora_path=adapters[kind])
    assert settings == applied == RECIPE
    assert (applied.recipe, applied.adapter) == ("mine", f"tuned-{kind}")
    assert len(found) == len(PROMPT) + len(ANSWER)
    for name, rows in {"prefill": slice(len(PROMPT)), "decode": slice(len(PROMPT), None)}.items():
        assert apart(found[rows], expected[rows]) < 1e-3, name
    # The adapter and the recipe are seen in the logits at all.
    assert apart(logits(base, swaa=RECIPE)[0], expected) > 0.05
    assert apart(logits(merged, swaa=False)[0], expected) > 0.05
    assert apart(logits(base, lora_path=adapters[kind], lora_scale=0.0)[0], logits(base, swaa=RECIPE)[0]) < 1e-6
    half = logits(base, lora_path=adapters[kind], lora_scale=0.5)[0]
    assert apart(half, expected) > 0.01


@pytest.mark.native
def test_an_adapter_on_a_quantized_model(base, adapters, tmp_path):
    from swaa_edge.convert.quantize import quantize

    quantized = quantize(base, tmp_path / "q8.gguf", "Q8_0")
    found, expected = (logits(path, lora_path=adapters["rslora"])[0] for path in (quantized, base))
    without = logits(quantized, swaa=RECIPE)[0]
    assert apart(found, expected) < 0.15 < 0.4 < apart(without, expected)


@pytest.mark.native
def test_another_recipe_is_refused_when_it_is_loaded(base, adapters, tmp_path):
    other = dataclasses.replace(RECIPE, window_size=25)
    with pytest.raises(ConfigError, match=r"tuned-plain was trained under another recipe: full attention was"):
        logits(base, lora_path=adapters["plain"], swaa=False)
    with pytest.raises(ConfigError, match=r"its window_size is 24, but 25 was requested; leave the settings out"):
        logits(base, lora_path=adapters["plain"], swaa=other)
    annotate(base, tmp_path / "other.gguf", other)
    with pytest.raises(ConfigError, match=r"25 was requested; give its recipe as settings, instead of those of"):
        logits(tmp_path / "other.gguf", lora_path=adapters["plain"])
    assert logits(tmp_path / "other.gguf", lora_path=adapters["plain"], swaa=RECIPE)[1] == RECIPE


@pytest.mark.native
def test_what_llama_cpp_alone_refuses_is_one_line(base, adapters, monkeypatch):
    from swaa_edge import llama

    monkeypatch.setattr(llama.llama_cpp.llama_cpp, "llama_adapter_lora_init", lambda *_: None)
    with pytest.raises(ModelFileError, match=r"^llama\.cpp can't load the LoRA adapter .*plain\.gguf; load it with"):
        logits(base, lora_path=adapters["plain"])


# The file


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_says_what_it_is(kind, adapters, model_dir):
    header = read_header(adapters[kind])
    values = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": "qwen3",
        "qwen3.block_count": LAYERS,
        "general.finetune": f"tuned-{kind}",
        "general.base_model.count": 1,
        "general.base_model.0.name": model_dir("qwen3", layers=LAYERS).name,
        "swaa.adapter": f"tuned-{kind}",
        "swaa.recipe": "mine",
    }
    assert {key: header.value(key) for key in values} == values
    assert read_swaa(adapters[kind]) == RECIPE
    # llama.cpp's scale is alpha / rank, PEFT's under rsLoRA alpha / sqrt(rank).
    alpha = ALPHA * (math.sqrt(8) if kind == "rslora" else 1)
    assert header.value("adapter.lora.alpha") == pytest.approx(alpha, rel=1e-6)
    # "auto" keeps the numbers as PEFT saved them.
    assert {tensor.type for tensor in header.tensors} == {0}
    assert len(header.tensors) == 2 * len(TARGETS) * LAYERS


@pytest.mark.parametrize(("outtype", "types"), [("f16", {"F16"}), ("q8_0", {"Q8_0", "F16"})])
def test_an_ordinary_adapter_in_other_types(outtype, types, model_dir, tmp_path):
    folder = make_adapter(tmp_path / "ordinary", LAYERS)
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- lora\n- base_model:adapter:/home/somebody/x\n---\n")
    output = tmp_path / "adapter.gguf"
    written = convert_adapter(model_dir("qwen3", layers=LAYERS), folder, output, outtype=outtype, swaa=RECIPE)
    assert written == output
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(output).tensors} <= types
    fields = gguf.GGUFReader(output).fields
    assert fields["general.license"].contents() == "mit"
    assert fields["general.tags"].contents() == ["lora"]
    assert fields["general.base_model.0.name"].contents() == "Tiny-1B"
    assert b"somebody" not in output.read_bytes()
    found = read_swaa(output)
    assert (found, found.adapter) == (RECIPE, "ordinary")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.gguf", "ordinary"]


def test_the_command_writes_an_adapter_without_settings(model_dir, tmp_path):
    folder, output = make_adapter(tmp_path / "ordinary", LAYERS), tmp_path / "adapter.gguf"
    arguments = ["convert", model_dir("qwen3", layers=LAYERS), "-o", output, "--lora", folder, "--adapter-only"]
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert (done.exit_code, done.stdout) == (0, f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)\n"), done.output
    header = read_header(output)
    assert not any(key.startswith("swaa.") for key in header.fields)
    assert header.value("general.finetune") == "ordinary"


def test_another_recipe_or_base_is_refused_before_any_work(folders, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "run", lambda *_, **__: pytest.fail("work began"))
    output, right = tmp_path / "adapter.gguf", model_dir("qwen3", layers=LAYERS)
    with pytest.raises(ConfigError, match="tuned-plain was trained under another recipe"):
        convert_adapter(right, folders["plain"], output, swaa=SwaaConfig(24))
    with pytest.raises(UnsupportedModelError, match="the base model of tuned-plain: it has 2 layers instead of 4;"):
        convert_adapter(model_dir("qwen3"), folders["plain"], output)
    with pytest.raises(ConfigError, match="outtype 'q4' must be one of"):
        convert_adapter(right, folders["plain"], output, outtype="q4")
    with pytest.raises(ModelFileError, match="is a file; give the folder of a Hugging Face model"):
        convert_adapter(folders["plain"] / "adapter_config.json", folders["plain"], output)
    assert not list(tmp_path.iterdir())


# What llama.cpp can't compute


@pytest.fixture
def ordinary(tmp_path):
    """ordinary(**changes): an adapter whose configuration was changed."""

    def make(**changes):
        edit_config(folder, **changes)
        return read_adapter(folder)

    folder = make_adapter(tmp_path / "odd")
    return make


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_dora": True}, "it is a DoRA"),
        ({"lora_bias": True}, "it has biases"),
        ({"bias": "lora_only"}, r"it has biases \(bias = lora_only\)"),
        ({"modules_to_save": ["lm_head"]}, "it holds whole layers"),
        ({"alpha_pattern": {"q_proj": 20}}, r"its layers are scaled differently \(alpha_pattern\)"),
        ({"fan_in_fan_out": True}, "its weights are stored transposed"),
        ({"alora_invocation_tokens": [1, 2]}, "it is an aLoRA"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "it changes parameters outside linear layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "its training changed the base model too"),
    ],
)
def test_what_is_no_plain_lora_is_refused(changes, why, ordinary):
    with pytest.raises(UnsupportedModelError, match=f"can't apply the adapter .*odd: {why}.*; merge it instead"):
        scaled_alpha(ordinary(**changes))


@pytest.mark.parametrize("alpha", [0, None, "16", True, float("nan")])
def test_an_alpha_that_is_none(alpha, ordinary):
    with pytest.raises(ModelFileError, match=f"lora_alpha is {alpha}; it must be a number other than 0"):
        scaled_alpha(ordinary(lora_alpha=alpha))


def test_alphas(ordinary):
    assert scaled_alpha(ordinary()) == ALPHA
    assert scaled_alpha(ordinary(alpha_pattern={"q_proj": ALPHA}, init_lora_weights="gaussian")) == ALPHA
    assert scaled_alpha(ordinary(use_rslora=True)) == ALPHA * math.sqrt(RANK)


def test_ranks_are_those_of_the_matrices(ordinary):
    adapter = ordinary()
    weights = load_file(adapter.weights)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(weights | {name: torch.zeros(RANK + 1, 256)}, adapter.weights)
    assert scaled_alpha(adapter) == ALPHA
    with pytest.raises(UnsupportedModelError, match=r"its ranks differ \(4 to 5\) under rsLoRA"):
        scaled_alpha(ordinary(use_rslora=True))
    save_file(weights | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, adapter.weights)
    with pytest.raises(UnsupportedModelError, match=r"holds base_model\.model\.lm_head\.weight, which is not a LoRA"):
        scaled_alpha(adapter)
    save_file({}, adapter.weights)
    with pytest.raises(ModelFileError, match="is empty"):
        scaled_alpha(adapter)


# What is refused before C sees it. The model: 2 layers; weights as ggml has them, [in, out].

WEIGHTS = {"token_embd.weight": (8, 20), "blk.0.attn_q.weight": (8, 6), "blk.1.ffn_up_exps.weight": (8, 6, 3)}
RIGHT = {"blk.0.attn_q.weight": ((8, 2), (2, 6))}


def write(path, tensors, *, arch="qwen3", kind=np.float32, **keys):
    """A file with tensors of these shapes, fastest dimension first."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](key, value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape[::-1], kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path):
    def make(weights=WEIGHTS, **keys):
        return write(tmp_path / "model.gguf", weights, **{"qwen3.block_count": 2} | keys)

    return make


@pytest.fixture
def adapter(tmp_path):
    """adapter(pairs, **keys): a file of matrices A and B, by the weight's name."""

    def make(pairs=RIGHT, **keys):
        kind = keys.pop("kind", np.float32)
        flat = {f"{name}.lora_{m}": shape for name, pair in pairs.items() for m, shape in zip("ab", pair, strict=False)}
        held = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0} | keys
        arch = held.pop("arch", "qwen3")
        return write(tmp_path / "lora.gguf", flat | held.pop("more", {}), arch=arch, kind=kind, **held)

    return make


def test_an_adapter_that_fits(model, adapter):
    found = read_lora(adapter(), model())
    assert (found.label, found.swaa, found.n_layers) == ("lora.gguf", None, 2)
    experts = {"blk.1.ffn_up_exps.weight": ((8, 2, 3), (2, 6, 3)), "token_embd.weight": ((2, 20), (2, 8))}
    norms = {"blk.0.attn_norm.weight": (8,)}
    assert read_lora(adapter(RIGHT | experts, more=norms), model(WEIGHTS | {"output.weight": (8, 20)})).swaa is None


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        ({"blk.0.attn_q.weight": ((7, 2), (2, 6))}, "are 7x2, 2x6, the weight is 8x6"),
        ({"blk.0.attn_q.weight": ((8, 2), (2, 5))}, "are 8x2, 2x5, the weight is 8x6"),
        ({"blk.0.attn_q.weight": ((8, 2), (3, 6))}, "are 8x2, 3x6, the weight is 8x6"),
        ({"blk.0.attn_q.weight": ((8, 2, 2), (2, 6, 2))}, "are 8x2x2, 2x6x2, the weight is 8x6"),
        ({"blk.1.ffn_up_exps.weight": ((8, 2, 2), (2, 6, 2))}, "are 8x2x2, 2x6x2, the weight is 8x6x3"),
        ({"token_embd.weight": ((8, 2), (2, 20))}, "are 8x2, 2x20, the weight is 8x20"),
        ({"blk.2.attn_q.weight": ((8, 2), (2, 6))}, r"the model has no blk\.2\.attn_q\.weight"),
    ],
)
def test_matrices_that_do_not_fit(pairs, why, model, adapter):
    with pytest.raises(UnsupportedModelError, match=f"LoRA adapter .*lora.gguf doesn't fit .*model.gguf: .*{why};"):
        read_lora(adapter(RIGHT | pairs), model())


@pytest.mark.parametrize(
    ("made", "error", "why"),
    [
        ({"arch": "llama"}, UnsupportedModelError, "it is for the architecture llama, not qwen3"),
        ({"qwen3.block_count": 3}, UnsupportedModelError, "it is for 3 layers, but the model has 2"),
        ({"general.type": "model"}, ModelFileError, "is not a LoRA adapter; make one with: swaa-edge convert"),
        ({"adapter.type": "other"}, ModelFileError, "is not a LoRA adapter"),
        ({"general.type": 7}, ModelFileError, r"general\.type has the type uint32; it must be string"),
        ({"adapter.lora.alpha": 4}, ModelFileError, r"adapter\.lora\.alpha has the type uint32; it must be float32"),
        ({"adapter.alora.invocation_tokens": [1]}, UnsupportedModelError, "is an aLoRA"),
        ({"pairs": {}}, ModelFileError, "holds no LoRA matrices"),
        ({"pairs": {"blk.0.attn_q.weight": ((8, 2),)}}, ModelFileError, r"lacks blk\.0\.attn_q\.weight\.lora_b"),
        (
            {"more": {"blk.0.attn_q.bias": (6,)}},
            ModelFileError,
            r"holds blk\.0\.attn_q\.bias, which is not a LoRA",
        ),
        ({"kind": np.int32}, ModelFileError, r"lora_a has the ggml type 26; convert the adapter as f16"),
        ({"swaa.version": 1}, ModelFileError, r"qwen3\.block_count is missing"),
        ({"swaa.version": 1, "qwen3.block_count": 2}, ModelFileError, r"swaa\.window_size is missing"),
    ],
)
def test_files_that_are_no_adapter_for_the_model(made, error, why, model, adapter):
    with pytest.raises(error, match=why):
        read_lora(adapter(**made), model())


def test_embeddings_that_are_the_output_too(model, adapter):
    # llama.cpp would take the matrices, which lie the other way round, for the output too, and die.
    with pytest.raises(
        UnsupportedModelError, match=r"changes the embeddings, which .*model\.gguf also uses as its out"
    ):
        read_lora(adapter({"token_embd.weight": ((2, 20), (2, 8))}), model())


def test_files_that_can_not_be_read(model, tmp_path):
    with pytest.raises(ModelFileError, match="does not exist"):
        read_lora(tmp_path / "absent.gguf", model())
    (tmp_path / "text.gguf").write_text("no adapter")
    with pytest.raises(ModelFileError, match="is not a GGUF file"):
        read_lora(tmp_path / "text.gguf", model())


def test_an_adapter_is_not_applied_twice(base, adapters, tmp_path):
    annotate(base, tmp_path / "merged.gguf", dataclasses.replace(RECIPE, adapter="tuned-plain"))
    with pytest.raises(
        UnsupportedModelError, match=r"already has the adapter tuned-plain in its weights; leave .* out"
    ):
        resolve_swaa(str(tmp_path / "merged.gguf"), None, None, adapters["plain"])


def test_an_adapter_given_as_the_model(adapters):
    with pytest.raises(ModelFileError, match=r"plain\.gguf is a LoRA adapter, not a model; give its base model"):
        check_tokenizer(adapters["plain"])


# Its recipe


def test_the_recipe_in_force(base, adapters, tmp_path):
    resolved = resolve_swaa(str(base), None, None, adapters["plain"])
    config, overrides = resolved.config, resolved.kv_overrides
    assert (config, config.recipe, config.adapter) == (RECIPE, "mine", "tuned-plain")
    assert (overrides["swaa.window_size"], overrides["swaa.sliding_layers"]) == (24, "1011")
    same = SwaaConfig(24, 2, "1:2", [0, 1], 9, recipe="spelled otherwise")
    config = resolve_swaa(str(base), same, None, adapters["plain"]).config
    assert (config, config.recipe, config.adapter) == (RECIPE, "spelled otherwise", "tuned-plain")
    annotate(base, tmp_path / "same.gguf", same)
    assert resolve_swaa(str(tmp_path / "same.gguf"), None, None, adapters["plain"]).kv_overrides is None
    with pytest.raises(ConfigError, match="its tail_count is 9, but 0 was requested"):
        resolve_swaa(str(base), dataclasses.replace(RECIPE, tail_count=0), None, adapters["plain"])
    with pytest.raises(ConfigError, match="full attention was requested"):
        resolve_swaa(str(tmp_path / "same.gguf"), None, {"swaa.enabled": False}, adapters["plain"])


def test_an_adapter_without_a_recipe_goes_with_any(base, adapters, tmp_path):
    annotate(adapters["plain"], tmp_path / "plain.gguf")
    for settings, expected in ((None, None), (False, None), (RECIPE, RECIPE)):
        assert resolve_swaa(str(base), settings, None, tmp_path / "plain.gguf").config == expected


# The commands


def test_every_command_that_runs_a_model_takes_it():
    for name in ("run", "chat", "serve", "eval", "calibrate"):
        assert "--lora FILE.gguf" in CliRunner().invoke(cli, [name, "--help"]).stdout, name
    assert "--lora" not in CliRunner().invoke(cli, ["bench", "--help"]).stdout  # it measures speed alone


@pytest.mark.native  # importing SwaaLlama loads the library
def test_the_engine_hands_it_on():
    class Fake:
        def __init__(self, path, **arguments):
            self.arguments = arguments

    for lora in (None, "a.gguf"):
        loaded = EngineSettings(lora_path=lora).load("m.gguf", swaa=None, n_ctx=256, kind=Fake)
        assert loaded.arguments["lora_path"] == lora


def test_the_fingerprint_is_of_the_content(base, adapters, tmp_path):
    copy = shutil.copyfile(adapters["plain"], tmp_path / "renamed.gguf")
    plain, other, same = (read_lora(path, base).fingerprint for path in (adapters["plain"], adapters["rslora"], copy))
    assert plain == same != other


def test_eval_compares_an_adapter_under_its_recipe_with_the_bare_model(base, adapters, monkeypatch):
    class Reached(Exception):
        pass

    def check(loader, configs):
        for config in configs:
            seen.append((config, loader._settings(config).lora_path))
        raise Reached

    seen, lora = [], str(adapters["plain"])
    with monkeypatch.context() as patched:
        patched.setattr(comparison._Loader, "check", check)
        with pytest.raises(Reached):
            comparison.compare(base, engine=EngineSettings(lora_path=lora))
    assert seen == [(False, None), (RECIPE, lora)]
    done = CliRunner().invoke(cli, ["eval", str(base), "--lora", lora, "--configs", "naive", "--window", "24"])
    assert done.exit_code == 1 and "tuned-plain was trained under another recipe" in done.stderr


def test_calibrate_chooses_no_layers_for_an_adapter_that_has_them(base, adapters):
    done = CliRunner().invoke(cli, ["calibrate", str(base), "--lora", str(adapters["plain"])])
    assert done.exit_code == 1
    advice = "calibrate without this adapter"
    assert done.stderr == f"Error: {adapters['plain']} was trained under a recipe with fixed FA layers; {advice}\n"


def test_an_adapter_is_no_model_to_inspect(adapters):
    done = CliRunner().invoke(cli, ["inspect", str(adapters["plain"])])
    assert done.exit_code == 1
    advice = "give its base model, and the adapter with --lora (lora_path in Python)"
    assert done.stderr == f"Error: {adapters['plain']} is a LoRA adapter, not a model; {advice}\n"
