"""Merges a LoRA adapter, as PEFT saves it, into its base model before conversion.

llama.cpp can apply an adapter while it runs, at a cost on every token; a fine-tune that belongs to a
model is better in its weights: W + scale * B A. The merge itself is PEFT's.

    check_adapter("adapter"); merge("Qwen3-4B", "adapter", "merged")
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from swaa_edge.convert.checkpoint import count_weights
from swaa_edge.errors import ModelFileError, SwaaError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

_WEIGHTS = "adapter_model.safetensors"
# What a checkpoint's folder holds beside configuration and tokenizer, in the forms people host.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt", ".index.json")


def check_adapter(path: str | os.PathLike[str]) -> None:
    """See, without torch, that the folder `path` holds a LoRA adapter of PEFT, and that PEFT is installed.

    Raises `ModelFileError` if a file is missing or broken, `UnsupportedModelError` for another kind of
    adapter, `SwaaError` without PEFT.
    """
    folder = Path(path)
    config_file, weights = folder / "adapter_config.json", folder / _WEIGHTS
    for file in (config_file, weights):
        if not file.is_file():
            raise ModelFileError(
                f"{folder} has no {file.name}; --lora takes the folder of a LoRA adapter saved by PEFT"
            )
    try:
        kind = json.loads(config_file.read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ModelFileError(f"{config_file} is no PEFT configuration; download it again") from None
    if kind != "LORA":
        raise UnsupportedModelError(f"{folder} is an adapter of type {kind}; only LORA can be merged")
    count_weights(weights)
    if importlib.util.find_spec("peft") is None:
        raise SwaaError("merging an adapter needs PEFT; pip install 'swaa-edge[finetune]'")


def merge(base: str, adapter: str, output: str) -> None:
    """Write the checkpoint `base` with the weights of `adapter` added to its own into the new folder `output`.

    Needs memory for the whole model, in the number format of its files. Raises `UnsupportedModelError`
    if the adapter does not fit the model.
    """
    import peft
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"transformers can't load {base}: {' '.join(str(error).split())}") from error
    used_with = f"the adapter {adapter} does not fit the model in {base}"
    advice = f"give the model that it was trained on{_trained_on(adapter)}"
    if misfit := _misfit(model, Path(adapter) / _WEIGHTS):
        raise UnsupportedModelError(f"{used_with}: {misfit}; {advice}")
    try:
        adapted = peft.PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError) as error:
        raise UnsupportedModelError(f"{used_with}: {' '.join(str(error).split())}; {advice}") from error
    # PEFT passes over weights that it finds no place for.
    unused = _tensors(Path(adapter) / _WEIGHTS).keys() - peft.get_peft_model_state_dict(adapted).keys()
    if unused:
        raise UnsupportedModelError(f"{used_with}: no place for {min(unused)}; {advice}")
    adapted.merge_and_unload(safe_merge=True).save_pretrained(output)
    for file in Path(base).iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file, Path(output) / file.name)


def _tensors(path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a safetensors file: name and shape."""
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping


def _misfit(model: "torch.nn.Module", weights: Path) -> str | None:
    """What in the adapter does not fit the model, as half a sentence; None if every pair of matrices does.

    A is [rank, in], B [out, rank], for a layer whose weight is [out, in].
    """
    import torch

    for name, shape in sorted(_tensors(weights).items()):
        for matrix, axis in ((".lora_A.weight", 1), (".lora_B.weight", 0)):
            if not name.endswith(matrix):
                continue
            layer = name.removeprefix("base_model.model.").removesuffix(matrix)
            try:
                module = model.get_submodule(layer)
            except AttributeError:
                return f"the model has no {layer}"
            if isinstance(module, torch.nn.Linear) and shape[axis] != module.weight.shape[axis]:
                return f"{matrix[1:7]} of {layer} is {list(shape)}, but its weight is {list(module.weight.shape)}"
    return None


def _trained_on(adapter: str) -> str:
    config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    return f" ({name})" if name else ""
