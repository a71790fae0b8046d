"""Merging an adapter is W + scale * B A, nothing else changes, and one that doesn't fit is refused.

The recipe and base model of its training go into the file; others are refused before any work.
"""

import dataclasses
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support import models
from support.adapters import ALPHA, RANK, edit_config, make_adapter
from swaa_edge import SwaaConfig
from swaa_edge.convert import child, hf
from swaa_edge.convert.lora_merge import check_merging, merge, read_adapter
from swaa_edge.errors import ConfigError, ModelFileError, SwaaError, UnsupportedModelError
from swaa_edge.files.header import read_header
from swaa_edge.files.lora_training import BaseModel, Training, save_training
from swaa_edge.metadata import read_swaa

# Name in the GGUF: name in the adapter.
CHANGED = {
    f"blk.{i}.{ours}.weight": f"base_model.model.model.layers.{i}.{theirs}"
    for i in (0, 1)
    for ours, theirs in {"attn_q": "self_attn.q_proj", "ffn_down": "mlp.down_proj"}.items()
}


# A recipe for two layers, and what spells the same for each of them.
RECIPE = SwaaConfig(window_size=9, sink_count=2, fa_layers=[1], fa_decode=True, recipe="mine")
SAME = SwaaConfig(window_size=9, sink_count=2, fa_layers="1::2", fa_decode=[0])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapter") / "my-fine-tune")


@pytest.fixture(scope="module")
def trained(adapter, model_dir, tmp_path_factory):
    """The same adapter with the files that our own training writes."""
    folder = shutil.copytree(adapter, tmp_path_factory.mktemp("trained") / "trained-here")
    save_training(folder, Training(RECIPE, BaseModel.of(model_dir("qwen3"))))
    return folder


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(child, "run", lambda *_, **__: pytest.fail("work began"))


def test_the_weights_carry_the_adapter(model_dir, gguf_model, adapter, tmp_path):
    output = tmp_path / "tuned.gguf"
    hf.convert(
        model_dir("qwen3"),
        output,
        outtype="f32",
        lora=adapter,
        pre=models.PRE_TOKENIZER,
        swaa=SwaaConfig(window_size=9),
    )
    lora = load_file(adapter / "adapter_model.safetensors")
    plain = {t.name: t.data for t in gguf.GGUFReader(gguf_model("qwen3")).tensors}
    tuned = {t.name: t.data for t in gguf.GGUFReader(output).tensors}
    assert tuned.keys() == plain.keys()
    assert CHANGED.keys() <= plain.keys()
    for name, weight in plain.items():
        if name not in CHANGED:
            assert np.array_equal(tuned[name], weight), name
            continue
        a, b = (lora[f"{CHANGED[name]}.lora_{matrix}.weight"] for matrix in "AB")
        expected = torch.from_numpy(weight.copy()) + ALPHA / RANK * b @ a
        assert np.abs(tuned[name] - weight).max() > 0.01
        np.testing.assert_allclose(tuned[name], expected.numpy(), rtol=0, atol=1e-6)
    assert read_swaa(output).adapter == "my-fine-tune"
    header = read_header(output)
    assert header.value("general.finetune") == "my-fine-tune"
    assert header.value("general.base_model.count") == 1
    assert header.value("general.base_model.0.name") == "Tiny-1B"
    assert header.value("general.base_model.0.organization") == "Owner"
    assert gguf.GGUFReader(output).fields["tokenizer.ggml.pre"].contents() == models.PRE_TOKENIZER
    assert [file.name for file in tmp_path.iterdir()] == ["tuned.gguf"]


def test_an_adapter_of_another_shape_is_refused(model_dir, adapter, tmp_path):
    wider = model_dir("qwen3", num_attention_heads=6)
    with pytest.raises(
        UnsupportedModelError, match=r"does not fit .* lora_B of model\.layers\.0\.self_attn\.q_proj is \[512, 4\], but"
    ):
        merge(str(wider), str(adapter), str(tmp_path / "merged"))


def test_an_adapter_of_a_deeper_model_is_refused(model_dir, adapter, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"the model has no model\.layers\.1\."):
        merge(str(model_dir("qwen3", layers=1)), str(adapter), str(tmp_path / "merged"))


def test_weights_that_peft_would_pass_over_are_refused(model_dir, adapter, tmp_path):
    odd = shutil.copytree(adapter, tmp_path / "odd")
    edit_config(odd, base_model_name_or_path=None)  # PEFT would look a name up on the network
    weights = load_file(odd / "adapter_model.safetensors")
    weights["base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector.weight"] = torch.ones(256)
    save_file(weights, odd / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"the model has no layer for .*lora_magnitude_vector"):
        merge(str(model_dir("qwen3")), str(odd), str(tmp_path / "merged"))


def test_folders_that_are_no_lora_adapter(adapter, tmp_path, monkeypatch):
    with pytest.raises(ModelFileError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path)
    odd = shutil.copytree(adapter, tmp_path / "odd")
    edit_config(odd, peft_type="PROMPT_TUNING")
    with pytest.raises(UnsupportedModelError, match="type PROMPT_TUNING; only LORA"):
        read_adapter(odd)
    (odd / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFileError, match="not a PEFT configuration"):
        read_adapter(odd)
    (odd / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"has no adapter_model\.safetensors"):
        read_adapter(odd)
    check_merging()
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(SwaaError, match=r"pip install 'swaa-edge\[finetune\]'"):
        check_merging()


def test_what_it_was_trained_under_goes_into_the_merged_file(model_dir, trained, tmp_path):
    output = tmp_path / "tuned.gguf"
    hf.convert(model_dir("qwen3"), output, lora=trained, pre=models.PRE_TOKENIZER)
    found, header = read_swaa(output), read_header(output)
    assert (found, found.recipe, found.adapter) == (RECIPE, "mine", "trained-here")
    assert header.value("general.finetune") == "trained-here"
    # The base model is the one of the training, whatever PEFT recorded.
    assert header.value("general.base_model.0.name") == model_dir("qwen3").name
    assert header.value("general.base_model.0.organization") is None


def test_another_recipe_or_base_is_refused_before_any_work(model_dir, trained, tmp_path, no_work):
    def convert(base, swaa=None):
        hf.convert(base, tmp_path / "tuned.gguf", lora=trained, pre=models.PRE_TOKENIZER, swaa=swaa)

    other = SwaaConfig(window_size=9, sink_count=3, fa_layers=[1], fa_decode=True)
    with pytest.raises(ConfigError, match="trained-here was trained under another recipe: its sink_count is 2, but 3"):
        convert(model_dir("qwen3"), other)
    with pytest.raises(UnsupportedModelError, match=r"is not .*, the base model of trained-here: its weights differ"):
        convert(model_dir("qwen3", seed=1))
    with pytest.raises(UnsupportedModelError, match="it has 1 layers instead of 2"):
        convert(model_dir("qwen3", layers=1))
    assert not list(tmp_path.iterdir())


def test_the_recipe_to_write(adapter, trained):
    ours, theirs = read_adapter(trained), read_adapter(adapter)
    assert (ours.settings(None), ours.settings(None).recipe) == (RECIPE, "mine")
    given = ours.settings(SAME)
    assert (given, given.recipe, given.adapter) == (SAME, "custom", "trained-here")
    assert theirs.settings(None) is None
    assert (theirs.settings(SAME), theirs.settings(SAME).adapter) == (SAME, "my-fine-tune")


def test_its_label_is_that_of_the_settings_or_of_the_folder(adapter, model_dir, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "copied")
    labelled = dataclasses.replace(RECIPE, adapter="version 2")
    save_training(folder, Training(labelled, BaseModel.of(model_dir("qwen3"))))
    found = read_adapter(folder)
    assert found.settings(None).adapter == found.label(None) == found.settings(SAME).adapter == "version 2"
    assert found.label(dataclasses.replace(SAME, adapter="version 3")) == "version 3"
    assert read_adapter(adapter).label(None) == "my-fine-tune"


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("Owner/Tiny-1B", {"name": "Tiny-1B", "organization": "Owner"}),
        ("Tiny-1B", {"name": "Tiny-1B"}),
        ("/home/somebody/models/Tiny-1B/", {"name": "Tiny-1B"}),
        ("../Tiny-1B", {"name": "Tiny-1B"}),
        ("C:\\models\\Tiny-1B", {"name": "Tiny-1B"}),
        ("models/Tiny-1B", {"name": "Tiny-1B"}),  # a folder that is there
        ("", {"name": "base"}),
        (None, {"name": "base"}),
    ],
)
def test_the_base_models_name_holds_no_path_of_a_machine(adapter, stated, expected, tmp_path, monkeypatch):
    folder = shutil.copytree(adapter, tmp_path / "copied")
    edit_config(folder, base_model_name_or_path=stated)
    (tmp_path / "models" / "Tiny-1B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert read_adapter(folder).provenance("label", "some/base") == {
        "general.finetune": "label",
        "general.base_models": [expected],
    }
