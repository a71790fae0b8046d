"""Conversion of whole checkpoints: what comes out is the model that went in, and what goes wrong is one line."""

import os
import resource
import signal
import subprocess
import sys
import types

import gguf
import numpy as np
import pytest

from support import ROOT, models
from swaa_edge import SwaaConfig
from swaa_edge.convert import child, hf
from swaa_edge.convert.upstream import PATH_VARIABLE, architectures, pre_tokenizers, upstream_scripts
from swaa_edge.convert.upstream_run import check_fit
from swaa_edge.errors import ConfigError, ModelFileError, NativeLibraryError, OutputError, UnsupportedModelError
from swaa_edge.files.model import read_model
from swaa_edge.metadata import read_swaa

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3moe"}


def run_cli(*arguments, **options):
    """The command in a process of its own, from the repository's root."""
    command = [sys.executable, "-m", "swaa_edge", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensors_and_metadata_are_the_models(arch, gguf_model):
    model = models.tiny_model(arch)
    weights, config = model.state_dict(), model.config
    reader = gguf.GGUFReader(gguf_model(arch))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    facts = read_model(gguf_model(arch))

    assert facts.architecture == ARCHITECTURES[arch]
    assert facts.n_layers == config.num_hidden_layers == 2
    assert facts.n_heads == (config.num_attention_heads,) * 2
    assert facts.n_kv_heads == (config.num_key_value_heads,) * 2
    assert facts.key_length == getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert facts.context_length == config.max_position_embeddings
    assert facts.n_vocab == models.VOCAB_SIZE
    assert reader.fields["tokenizer.ggml.pre"].contents() == models.PRE_TOKENIZER
    assert "<|im_start|>" in reader.fields["tokenizer.chat_template"].contents()
    assert not any(key.startswith("swaa.") for key in reader.fields)
    # A tied output matrix is stored once.
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    assert facts.n_parameters == n_weights
    for ours, theirs in {"token_embd": "embed_tokens", "blk.1.attn_v": "layers.1.self_attn.v_proj"}.items():
        assert np.array_equal(tensors[f"{ours}.weight"].data, weights[f"model.{theirs}.weight"].numpy())


@pytest.mark.native
def test_the_vocabulary_works_in_llama_cpp(gguf_model):
    from swaa_edge import native

    llm = native.load().Llama(str(gguf_model("qwen3")), vocab_only=True, verbose=False)
    text = models.sample_text(3000) + " I'd say: Größe 12345 \N{ROCKET}"
    assert llm.tokenize(text.encode(), add_bos=False, special=False) == models.tiny_tokenizer().encode(text)


def test_pipeline_from_shards_to_annotated_f16(tmp_path, gguf_model):
    """Shards, a 16-bit type, SWAA keys and the logs of --verbose, in one run of the command."""
    folder = models.save_model(
        models.tiny_model("qwen3"), models.tiny_tokenizer(), tmp_path / "tiny", max_shard_size="2MB"
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    output = tmp_path / "out" / "{odd} name.gguf"
    output.parent.mkdir()
    settings = ["--window", "31", "--sinks", "3", "--fa-layers", "1", "--fa-decode"]
    done = run_cli(folder, "-o", output, "--outtype", "f16", "--pre", models.PRE_TOKENIZER, "-v", *settings)

    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)\n"
    assert "Model architecture: Qwen3ForCausalLM" in done.stderr
    assert os.listdir(output.parent) == [output.name]
    assert read_swaa(output) == SwaaConfig(window_size=31, sink_count=3, fa_layers="1", fa_decode=True)
    halves, singles = gguf.GGUFReader(output).tensors, gguf.GGUFReader(gguf_model("qwen3")).tensors
    # Tiny models have float16 weights, so nothing is lost.
    assert {t.name: t.data.astype(np.float32).sum() for t in halves} == {t.name: t.data.sum() for t in singles}
    assert {t.tensor_type.name for t in halves} == {"F16", "F32"}


def test_an_unknown_tokenizer_asks_for_pre(model_dir, tmp_path):
    with pytest.raises(ModelFileError, match=r"does not recognise the tokenizer .* --pre NAME: .*gpt-2, .*qwen2"):
        hf.convert(model_dir("llama"), tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == []


def test_an_architecture_that_swaa_cannot_attach_to_is_refused_by_its_keys():
    plain, windowed = gguf.GGUFWriter(None, "qwen3"), gguf.GGUFWriter(None, "gemma3")
    for writer in (plain, windowed):
        writer.add_block_count(2)
        writer.add_sliding_window(512)
    check_fit(plain, "tiny")
    with pytest.raises(UnsupportedModelError, match=r"^tiny: SWAA can't be applied to the architecture gemma3"):
        check_fit(windowed, "tiny")


def test_pre_is_refused_where_it_means_nothing(model_dir, tmp_path):
    with pytest.raises(ConfigError, match="leave --pre out"):
        hf.convert(model_dir("gemma"), tmp_path / "m.gguf", pre="gpt-2", swaa=SwaaConfig(window_size=8))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_earlier_output(model_dir, tmp_path):
    output = tmp_path / "m.gguf"
    output.write_bytes(b"earlier")

    def full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    done = run_cli(model_dir("qwen3"), "-o", output, "--force", "--pre", models.PRE_TOKENIZER, preexec_fn=full_disk)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: cannot write {output}: ")
    assert done.stderr.count("\n") == 1
    assert output.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == [output.name]


def test_an_interrupt_leaves_nothing(model_dir, tmp_path):
    command = [sys.executable, "-m", "swaa_edge", "convert", model_dir("qwen3"), "-o", tmp_path / "m.gguf", "-v"]
    process = subprocess.Popen(
        [*map(str, command), "--pre", models.PRE_TOKENIZER],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr.readline() == "converting ...\n"
    # As a terminal does it: to the child, too.
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1].endswith("Interrupted\n")
    assert process.returncode == 130
    assert os.listdir(tmp_path) == []


def test_missing_packages_are_one_line(model_dir, tmp_path):
    hide = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from swaa_edge.cli import main; main()"
    )

    def run(*arguments):
        command = [sys.executable, "-c", hide, "convert", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    assert "--quantize TYPE" in run("--help").stdout
    done = run(str(model_dir("llama")), "-o", str(tmp_path / "m.gguf"))
    assert done.returncode == 1
    assert done.stderr == "Error: converting needs torch, transformers; pip install 'swaa-edge[convert]'\n"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"outtype": "f17"}, ConfigError, "outtype 'f17' must be one of auto, f16, bf16, f32, q8_0"),
        ({"quantize": "Q4_K_X"}, ConfigError, "'Q4_K_X' is not a quantization type; did you mean Q4_K_[MS]"),
        ({"pre": "gpt2"}, ConfigError, "'gpt2' is not a pre-tokenizer; did you mean gpt-2"),
        ({"swaa": SwaaConfig(window_size=8, fa_layers=[2])}, ConfigError, "2"),
        ({"lora": "no-such-adapter"}, ModelFileError, "no-such-adapter has no adapter_config.json"),
        ({"output": "absent/m.gguf"}, OutputError, "absent does not exist"),
        ({"output": "."}, OutputError, "is a folder"),
    ],
)
def test_wrong_options_are_found_before_any_work(options, error, message, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "run", lambda *_, **__: pytest.fail("work began"))
    output = tmp_path / options.pop("output", "m.gguf")
    with pytest.raises(error, match=message):
        hf.convert(model_dir("llama"), output, **options)
    assert os.listdir(tmp_path) == []


def test_an_existing_output_is_refused_before_any_work(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "run", lambda *_, **__: pytest.fail("work began"))
    output = tmp_path / "m.gguf"
    output.write_bytes(b"earlier")
    with pytest.raises(OutputError, match="--force"):
        hf.convert(model_dir("llama"), output)
    assert output.read_bytes() == b"earlier"


def test_too_small_a_disk_is_refused_before_any_work(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "run", lambda *_, **__: pytest.fail("work began"))
    # The tiny model has 1.6 million weights of two bytes, and SWAA keys take a second copy.
    free = 6_000_000
    monkeypatch.setattr(hf.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    with pytest.raises(OutputError, match=r"the conversion needs 6\.3 MB of disk space, but only 6\.0 MB are free"):
        hf.convert(model_dir("llama"), tmp_path / "m.gguf", swaa=SwaaConfig(window_size=8))


def test_an_unknown_architecture_is_named(model_dir, tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in model_dir("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = (folder / "config.json").read_text().replace("LlamaForCausalLM", "LamaForCausalLM")
    (folder / "config.json").write_text(config)
    with pytest.raises(UnsupportedModelError, match=r"architecture LamaForCausalLM; .*LlamaForCausalLM"):
        hf.convert(folder, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == ["tiny"]


def test_facts_about_upstream():
    scripts = upstream_scripts()
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "MistralForCausalLM"} <= architectures(scripts)
    assert {"gpt-2", "llama-bpe", "qwen2", "tekken"} <= set(pre_tokenizers(scripts))


def test_a_wrong_upstream_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    with pytest.raises(NativeLibraryError, match=f"{PATH_VARIABLE} = {tmp_path} lacks convert_hf_to_gguf.py"):
        upstream_scripts()


def test_a_child_returns_and_fails_as_a_call_would():
    assert child.run("json:dumps", {"obj": [1, "é"]}) == '[1, "\\u00e9"]'
    with pytest.raises(child.ChildError, match=r"^JSONDecodeError: Expecting"):
        child.run("json:loads", {"s": "{"})
    with pytest.raises(child.ChildError, match=r"^it needs the Python package nonesuch"):
        child.run("nonesuch:run", {})
    with pytest.raises(ConfigError, match="'Q' is not a quantization type"):
        child.run("swaa_edge.convert.quantize:check_type", {"name": "Q"})


def test_a_child_that_dies_does_not_take_the_caller_along():
    with pytest.raises(child.ChildError, match=r"^it died of SIGABRT"):
        child.run("os:abort", {})
    with pytest.raises(child.ChildError, match=r"^it ended with code 3$"):
        child.run("os:_exit", {"status": 3})
