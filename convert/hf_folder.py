"""Reads and checks a Hugging Face model directory before a conversion starts.

A conversion reports a missing or incomplete file only after minutes, in many lines. This module checks the names, sizes
and headers of all files first, without torch.

    read_hf_folder("Qwen3-4B").n_layers
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swaa_edge.errors import ModelFileError
from swaa_edge.files.weights import LFS_POINTER, read_tensors

_INDEX = "model.safetensors.index.json"
# Vocabulary files of the tokenizer classes that the converter supports.
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab*.txt", "rwkv_vocab*.txt")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class HfFolder:
    """A valid model directory.

    architectures: the model classes in config.json. Classes from `text_config` come first.
    n_layers: number of layers, or None if config.json doesn't state the number.
    n_weights: number of values in the safetensors files, or 0 if the weights have another format.
    """

    folder: Path
    architectures: tuple[str, ...]
    n_layers: int | None
    n_weights: int


def read_hf_folder(path: str | os.PathLike[str]) -> HfFolder:
    """Read the model directory at `path`.

    Raises `ModelFileError` if `path` is not a folder, or lacks a configuration, a tokenizer or weights. Also raises
    `ModelFileError` if a safetensors or JSON file is missing or damaged.
    """
    folder = Path(path)
    if folder.is_file():
        raise ModelFileError(f"{folder} is a file; give the folder of a Hugging Face model, or annotate a GGUF instead")
    if not folder.is_dir():
        hub = len(folder.parts) == 2 and not folder.is_absolute()
        advice = f"download it first: hf download {folder.as_posix()} --local-dir DIR" if hub else "check the name"
        raise ModelFileError(f"there is no folder {folder}; {advice}")
    config = _config(folder)
    text = config.get("text_config")
    parts = [part for part in (text, config) if isinstance(part, dict)]
    architectures = tuple(name for part in parts for name in part.get("architectures") or () if isinstance(name, str))
    if not architectures:
        raise ModelFileError(f"{folder / 'config.json'} has no architectures; add the name of the model class")
    counts = (part.get(key) for part in parts for key in _LAYER_COUNTS)
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise ModelFileError(f"{folder} has no tokenizer; put the model's tokenizer.json or tokenizer.model there")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _read_json(folder / name)
    tensors = (tensor for file in _weight_files(folder) for tensor in read_tensors(file).values())
    n_weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return HfFolder(folder, architectures, next((n for n in counts if isinstance(n, int) and n > 0), None), n_weights)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelFileError(f"{folder} is a LoRA adapter; give its base model's folder, and --lora {folder}")
        raise ModelFileError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    config = _read_json(path)
    if not isinstance(config, dict):
        raise ModelFileError(f"{path} must hold a JSON object; download it again")
    return config


def _read_json(path: Path) -> Any:
    content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        raise ModelFileError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull")
    try:
        return json.loads(content)
    except ValueError as error:
        raise ModelFileError(f"{path} can't be read as JSON ({error}); download it again") from None


def _weight_files(folder: Path) -> list[Path]:
    """Return the model's safetensors files, or an empty list if the weights are PyTorch files."""
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(_read_json(index)["weight_map"].values()))
        except (LookupError, TypeError, AttributeError):
            raise ModelFileError(f"{index} is not an index of safetensors files; download it again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelFileError(
                f"{folder / missing[0]} is missing ({len(missing)} of the {len(names)} files in {_INDEX}); download it"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors"))
    if not files and not any(folder.glob("pytorch_model*.bin")):
        raise ModelFileError(f"{folder} has no weights; put the model's safetensors files there")
    return files
