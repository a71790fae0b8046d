"""Reads a LoRA adapter in PEFT's format, and merges the adapter into the base model.

llama.cpp can also apply an adapter at run time (see lora_to_gguf.py), but then every token is slower. So merge a
permanent fine-tune. PEFT computes each merged weight as W + scale * B A.

    read_adapter("adapter").settings(None); merge("Qwen3-4B", "adapter", "merged")
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
from swaa_edge.errors import ModelFileError, SwaaError, UnsupportedModelError
from swaa_edge.files.lora_training import Training, read_training
from swaa_edge.files.weights import read_tensors

if TYPE_CHECKING:
    import torch

_WEIGHTS = "adapter_model.safetensors"
# Weight files and their indexes, in all published formats.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt", ".index.json")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A folder with a LoRA adapter in PEFT's format.

    config: PEFT's settings.
    training: recipe and base model of the training, or None if another program trained the adapter.
    """

    folder: Path
    config: Mapping[str, Any]
    training: Training | None

    @property
    def weights(self) -> Path:
        return self.folder / _WEIGHTS

    @property
    def name(self) -> str:
        """The folder's name. Symbolic links are not resolved."""
        return os.path.basename(os.path.abspath(self.folder))

    def settings(self, given: SwaaConfig | None) -> SwaaConfig | None:
        """Return the SWAA settings to write, with the adapter's label, or None if there are no settings.

        given: the caller's settings. None selects the settings of the training, if any.

        Raises `ConfigError` if `given` differs from the settings of the training.
        """
        if self.training is not None and given is not None:
            self.training.check_recipe(given, self.name)
        chosen = self.training.swaa if self.training is not None and given is None else given
        return None if chosen is None else dataclasses.replace(chosen, adapter=self.label(given))

    def label(self, given: SwaaConfig | None) -> str:
        """Return the name of the fine-tune.

        The label in `given` comes first, then the label in the training's settings, then the folder's name.
        """
        for config in (given, self.training and self.training.swaa):
            if config is not None and config.adapter is not None:
                return config.adapter
        return self.name[:LABEL_LIMIT]

    def provenance(self, label: str, base: str | os.PathLike[str]) -> dict[str, Any]:
        """Return metadata keys that name the fine-tune and the base model.

        base: folder of the base model. Used if the adapter doesn't name a base model.
        """
        stated = self.training.base.name if self.training else self.config.get("base_model_name_or_path")
        path = stated if isinstance(stated, str) and stated.strip("/\\") else os.path.abspath(base)
        # A path on the training machine stays private. "owner/name" is not a path.
        *_, name = re.split(r"[/\\]", path.rstrip("/\\"))
        owner = re.fullmatch(r"(\w[\w.-]*)/[^/\\]+", path)
        entry = {"name": name, "organization": owner[1]} if owner and not os.path.isdir(path) else {"name": name}
        return {"general.finetune": label, "general.base_models": [entry]}


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read the PEFT LoRA adapter in the folder `path`, without torch.

    Raises `ModelFileError` if a file is missing or damaged, and `UnsupportedModelError` if the adapter isn't a LoRA.
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
        raise ModelFileError(f"{config_file} is not a PEFT configuration; download it again") from None
    if kind != "LORA":
        raise UnsupportedModelError(f"{folder} is an adapter of type {kind}; only LORA can be converted")
    read_tensors(weights)
    return Adapter(folder, config, read_training(folder))


def check_merging() -> None:
    """Raise `SwaaError` if PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise SwaaError("merging an adapter needs PEFT; pip install 'swaa-edge[finetune]'")


def merge(base: str, adapter: str, output: str) -> None:
    """Merge the adapter in the folder `adapter` into the model in `base`. Write the result to the folder `output`.

    Memory holds the whole model in the data type of the model's files. Raises `UnsupportedModelError` if the adapter
    does not fit the model.
    """
    import peft
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"transformers can't load {base}: {' '.join(str(error).split())}") from error
    misfit_of = f"the adapter {adapter} does not fit the model in {base}"
    name = json.loads((Path(adapter) / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
    advice = f"give its base model{f' ({name})' if name else ''}"
    if misfit := _misfit(model, Path(adapter) / _WEIGHTS):
        raise UnsupportedModelError(f"{misfit_of}: {misfit}; {advice}")
    try:
        adapted = peft.PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError) as error:
        raise UnsupportedModelError(f"{misfit_of}: {' '.join(str(error).split())}; {advice}") from error
    # PEFT ignores a weight if the model lacks the layer.
    unused = read_tensors(Path(adapter) / _WEIGHTS).keys() - peft.get_peft_model_state_dict(adapted).keys()
    if unused:
        raise UnsupportedModelError(f"{misfit_of}: the model has no layer for {min(unused)}; {advice}")
    adapted.merge_and_unload(safe_merge=True).save_pretrained(output)
    for file in Path(base).iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file, Path(output) / file.name)


def _misfit(model: "torch.nn.Module", weights: Path) -> str | None:
    """Describe the adapter's first matrix that doesn't fit the model. Return None if all matrices fit.

    For a weight [out, in], A is [rank, in] and B is [out, rank].
    """
    import torch

    for name, tensor in sorted(read_tensors(weights).items()):
        for matrix, axis in ((".lora_A.weight", 1), (".lora_B.weight", 0)):
            if not name.endswith(matrix):
                continue
            layer = name.removeprefix("base_model.model.").removesuffix(matrix)
            try:
                module = model.get_submodule(layer)
            except AttributeError:
                return f"the model has no {layer}"
            if isinstance(module, torch.nn.Linear) and tensor.shape[axis] != module.weight.shape[axis]:
                shapes = f"{list(tensor.shape)}, but its weight is {list(module.weight.shape)}"
                return f"{matrix[1:7]} of {layer} is {shapes}"
    return None
