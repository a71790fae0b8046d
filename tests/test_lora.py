"""Merging an adapter is W + scale * B A, nothing else changes, and one that doesn't fit is refused."""

import json
import shutil

import gguf
import models
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from swaa_edge import SwaaConfig
from swaa_edge.convert import hf
from swaa_edge.convert.lora import check_adapter, merge
from swaa_edge.errors import ModelFileError, SwaaError, UnsupportedModelError
from swaa_edge.metadata import read_swaa

RANK, ALPHA = 4, 10
# Name in the GGUF: name in the adapter.
CHANGED = {
    f"blk.{i}.{ours}.weight": f"base_model.model.model.layers.{i}.{theirs}"
    for i in (0, 1)
    for ours, theirs in {"attn_q": "self_attn.q_proj", "ffn_down": "mlp.down_proj"}.items()
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter for the tiny qwen3, with both matrices random: PEFT starts with B = 0, which changes nothing."""
    folder = tmp_path_factory.mktemp("adapter") / "my-fine-tune"
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        peft.get_peft_model(models.tiny_model("qwen3"), config).save_pretrained(folder)
        weights = {
            name: 0.05 * torch.randn_like(w) for name, w in load_file(folder / "adapter_model.safetensors").items()
        }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_weights_carry_the_adapter(checkpoint, gguf_model, adapter, tmp_path):
    output = tmp_path / "tuned.gguf"
    hf.convert(
        checkpoint("qwen3"),
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
    assert gguf.GGUFReader(output).fields["tokenizer.ggml.pre"].contents() == models.PRE_TOKENIZER
    assert [file.name for file in tmp_path.iterdir()] == ["tuned.gguf"]


def test_an_adapter_of_another_shape_is_refused(checkpoint, adapter, tmp_path):
    wider = checkpoint("qwen3", num_attention_heads=6)
    with pytest.raises(
        UnsupportedModelError, match=r"does not fit .* lora_B of model\.layers\.0\.self_attn\.q_proj is \[512, 4\], but"
    ):
        merge(str(wider), str(adapter), str(tmp_path / "merged"))


def test_an_adapter_of_a_deeper_model_is_refused(checkpoint, adapter, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"the model has no model\.layers\.1\."):
        merge(str(checkpoint("qwen3", layers=1)), str(adapter), str(tmp_path / "merged"))


def test_weights_that_peft_would_pass_over_are_refused(checkpoint, adapter, tmp_path):
    odd = shutil.copytree(adapter, tmp_path / "odd")
    weights = load_file(odd / "adapter_model.safetensors")
    weights["base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector.weight"] = torch.ones(256)
    save_file(weights, odd / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"no place for .*lora_magnitude_vector"):
        merge(str(checkpoint("qwen3")), str(odd), str(tmp_path / "merged"))


def test_folders_that_are_no_lora_adapter(adapter, tmp_path, monkeypatch):
    with pytest.raises(ModelFileError, match=r"has no adapter_config\.json"):
        check_adapter(tmp_path)
    odd = shutil.copytree(adapter, tmp_path / "odd")
    config = odd / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(UnsupportedModelError, match="type PROMPT_TUNING; only LORA"):
        check_adapter(odd)
    config.write_text("{}")
    with pytest.raises(ModelFileError, match="no PEFT configuration"):
        check_adapter(odd)
    (odd / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"has no adapter_model\.safetensors"):
        check_adapter(odd)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(SwaaError, match=r"pip install 'swaa-edge\[finetune\]'"):
        check_adapter(adapter)
