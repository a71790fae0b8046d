"""Tiny LoRA adapters in the form in which PEFT saves them.

folder = make_adapter(tmp_path / "adapter", layers=2)
"""

import json

import peft
import torch
from safetensors.torch import load_file, save_file

from support import models

RANK, ALPHA = 4, 10


def make_adapter(folder, layers=2, rank=RANK, targets=("q_proj", "down_proj"), **options):
    """A LoRA adapter for the tiny qwen3, with both matrices random: PEFT starts with B = 0, which changes nothing."""
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(targets), **options)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        peft.get_peft_model(models.tiny_model("qwen3", layers=layers), config).save_pretrained(folder)
        weights = {
            name: 0.05 * torch.randn_like(w) for name, w in load_file(folder / "adapter_model.safetensors").items()
        }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_config(folder, base_model_name_or_path="Owner/Tiny-1B")
    return folder


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
