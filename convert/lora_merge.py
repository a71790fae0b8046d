"""A LoRA adapter, as PEFT saves it: what it says of itself, and merging it into its base model before conversion.

llama.cpp can apply an adapter while it runs, at a cost on every token (loragguf.py makes its file); a fine-tune that
belongs to a model is better in its weights: W + scale * B A. The merge itself is PEFT's.

    adapter = read_adapter("adapter"); adapter.check_base("Qwen3-4B"); merge("Qwen3-4B", "adapter", "merged")
"""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swaa_edge.config import LABEL_LIMIT, SwaaConfig
from swaa_edge.convert.hf_folder import weight_table
from swaa_edge.errors import ModelFileError, SwaaError, UnsupportedModelError
from swaa_edge.files.lora_training import Training, read_training

if TYPE_CHECKING:
    import torch

_WEIGHTS = "adapter_model.safetensors"
# What a checkpoint's folder holds beside configuration and tokenizer, in the forms people host.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt", ".index.json")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The folder of an adapter. config: what PEFT says of it. training: None if it was trained elsewhere."""

    folder: Path
    config: Mapping[str, Any]
    training: Training | None

    @property
    def weights(self) -> Path:
        """Its safetensors file."""
        return self.folder / _WEIGHTS

    @property
    def name(self) -> str:
        """The last part of the path as it was given, which for a link says more than what it points to."""
        return os.path.basename(os.path.abspath(self.folder))

    def check_base(self, folder: str | os.PathLike[str]) -> None:
        """Raise `UnsupportedModelError` if it says what it was trained on, and that is not the model in `folder`."""
        if self.training is not None:
            self.training.check_base(folder, self.name)

    def recipe(self, given: SwaaConfig | None) -> SwaaConfig | None:
        """The settings to write, with the adapter's label: `given`, or what it was trained under; None for neither.

        Raises `ConfigError` if both are there and differ.
        """
        if self.training is not None and given is not None:
            self.training.check_recipe(given, self.name)
        chosen = self.training.swaa if self.training is not None and given is None else given
        return None if chosen is None else dataclasses.replace(chosen, adapter=self.label(given))

    def label(self, given: SwaaConfig | None) -> str:
        """What the fine-tune is called: as the settings say, `given` or its own, else as its folder."""
        for config in (given, self.training and self.training.swaa):
            if config is not None and config.adapter is not None:
                return config.adapter
        return self.name[:LABEL_LIMIT]

    def provenance(self, label: str, base: str | os.PathLike[str]) -> dict[str, Any]:
        """Keys for upstream's metadata override: the fine-tune and its base model; base: the folder at hand."""
        told = self.training.base.name if self.training else self.config.get("base_model_name_or_path")
        path = told if isinstance(told, str) and told.strip("/\\") else os.path.abspath(base)
        # Paths on the machine where it was trained are nobody's business; an owner and a name are no path.
        *_, name = re.split(r"[/\\]", path.rstrip("/\\"))
        owner = re.fullmatch(r"(\w[\w.-]*)/[^/\\]+", path)
        entry = {"name": name, "organization": owner[1]} if owner and not os.path.isdir(path) else {"name": name}
        return {"general.finetune": label, "general.base_models": [entry]}


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The LoRA adapter of PEFT in the folder `path`, read without torch.

    Raises `ModelFileError` if a file is missing or broken, `UnsupportedModelError` for another kind of adapter.
    """
    folder = Path(path)
    config_file, weights = folder / "adapter_config.json", folder / _WEIGHTS
    for file in (config_file, weights):
        if not file.is_file():
            raise ModelFileError(
                f"{folder} has no {file.name}; --lora takes the folder of a LoRA adapter saved by PEFT"
            )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ModelFileError(f"{config_file} is no PEFT configuration; download it again") from None
    if kind != "LORA":
        raise UnsupportedModelError(f"{folder} is an adapter of type {kind}; only LORA can be converted")
    weight_table(weights)
    return Adapter(folder, config, read_training(folder))


def check_merging() -> None:
    """Raise `SwaaError` if PEFT, which merges, is not installed."""
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
    unused = weight_table(Path(adapter) / _WEIGHTS).keys() - peft.get_peft_model_state_dict(adapted).keys()
    if unused:
        raise UnsupportedModelError(f"{used_with}: no place for {min(unused)}; {advice}")
    adapted.merge_and_unload(safe_merge=True).save_pretrained(output)
    for file in Path(base).iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file, Path(output) / file.name)


def _misfit(model: "torch.nn.Module", weights: Path) -> str | None:
    """What in the adapter does not fit the model, as half a sentence; None if every pair of matrices does.

    A is [rank, in], B [out, rank], for a layer whose weight is [out, in].
    """
    import torch

    for name, (_, shape) in sorted(weight_table(weights).items()):
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
