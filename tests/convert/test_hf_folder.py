"""A model directory is validated by its files, before torch is imported."""

import json
import re
import shutil

import pytest

from swaa_edge.convert.hf_folder import read_hf_folder
from swaa_edge.errors import ModelFileError


@pytest.fixture
def folder(model_dir, tmp_path):
    """A model directory that a test may damage."""
    return shutil.copytree(model_dir("qwen3"), tmp_path / "tiny")


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))


def test_facts(folder):
    found = read_hf_folder(folder)
    assert (found.folder, found.architectures, found.n_layers) == (folder, ("Qwen3ForCausalLM",), 2)
    assert found.n_weights * 4 == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.01)


def test_the_text_part_of_a_multimodal_model_counts(folder):
    edit_json(
        folder / "config.json",
        architectures=["SomeForConditionalGeneration"],
        num_hidden_layers=None,
        text_config={"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 7},
    )
    found = read_hf_folder(folder)
    assert found.architectures == ("Qwen3ForCausalLM", "SomeForConditionalGeneration")
    assert found.n_layers == 7


def test_pytorch_files_are_left_to_the_converter(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert read_hf_folder(folder).n_weights == 0


def damage_weights(change):
    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def name_missing_shard(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "an adapter": (make_adapter, "is a LoRA adapter; give its base model's folder, and --lora"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json can't be read as JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "no architectures": (lambda f: edit_json(f / "config.json", architectures=None), "has no architectures"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "missing shard": (name_missing_shard, r"00002-of-00002.safetensors is missing \(1 of the 2 files"),
    "index no JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("x"),
        "index.json can't be read as JSON",
    ),
    "index without map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "not an index of safetensors",
    ),
    "tokenizer no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json can't be read as JSON"),
    "tokenizer in LFS": (lambda f: (f / "tokenizer.json").write_text("version https://git-lfs"), "Git LFS pointer"),
    "empty weights": (damage_weights(lambda _: b""), "is not a safetensors file"),
    "half the data": (
        damage_weights(lambda data: data[: len(data) // 2]),
        r"is truncated: its header does not fit its \d+ bytes",
    ),
    "one byte short": (damage_weights(lambda data: data[:-1]), r"is truncated: its header does not fit its \d+ bytes"),
    "half the header": (damage_weights(lambda data: data[:100]), "is truncated: its header does not fit its 100 bytes"),
    "other bytes": (damage_weights(lambda data: b"\xff" * len(data)), "is not a safetensors file"),
    "header no JSON": (damage_weights(lambda data: data[:8] + b"?" + data[9:]), "is not a safetensors file"),
    "header a list": (damage_weights(lambda data: (2).to_bytes(8, "little") + b"[]"), "is not a safetensors file"),
    "LFS pointer": (damage_weights(lambda _: b"version https://git-lfs.github.com/spec/v1\n"), "run git lfs pull"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(case, folder):
    damage, message = BAD[case]
    damage(folder)
    with pytest.raises(ModelFileError, match=f"^{re.escape(str(folder))}.*{message}") as caught:
        read_hf_folder(folder)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path, message in {
        "model.gguf": "is a file; .* annotate",
        "owner/model": "hf download owner/model",
        "/no/such/folder": "check the name",
    }.items():
        with pytest.raises(ModelFileError, match=message):
            read_hf_folder(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match=r"^empty has no config\.json"):
        read_hf_folder("empty")
