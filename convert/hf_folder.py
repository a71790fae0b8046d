"""A Hugging Face checkpoint on disk, checked before any work is done on it.

A conversion takes minutes, and the libraries below it report a missing shard or half a download late and
in many lines. Everything that can be seen from file names, sizes and headers is seen here, without torch.

    checkpoint = read_checkpoint("Qwen3-4B"); checkpoint.n_layers
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swaa_edge.errors import ModelFileError

_INDEX = "model.safetensors.index.json"
# Any of these holds a vocabulary for some tokenizer class that the converter knows.
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab*.txt", "rwkv_vocab*.txt")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# What git leaves in place of a large file that was not downloaded.
_LFS_POINTER = b"version "
# safetensors' own limit on its header.
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class Checkpoint:
    """architectures: the model class names of config.json, the text part's first; n_layers: None if it doesn't say;
    n_weights: how many numbers the safetensors files hold, 0 if the weights are in another form."""

    folder: Path
    architectures: tuple[str, ...]
    n_layers: int | None
    n_weights: int


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in the folder `path`.

    Raises `ModelFileError` if it is no folder, lacks its configuration, tokenizer or weights, or if a
    safetensors file is missing, cut short or not one.
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
        raise ModelFileError(
            f"{folder / 'config.json'} names no architectures; add its model class, as Hugging Face does"
        )
    counts = (part.get(key) for part in parts for key in _LAYER_COUNTS)
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise ModelFileError(f"{folder} has no tokenizer; put the model's tokenizer.json or tokenizer.model there")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _read_json(folder / name)
    weights = sum(count_weights(file) for file in _weight_files(folder))
    return Checkpoint(folder, architectures, next((n for n in counts if isinstance(n, int) and n > 0), None), weights)


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
    if content.startswith(_LFS_POINTER):
        raise ModelFileError(f"{path} is a Git LFS pointer in place of the file; run git lfs pull")
    try:
        return json.loads(content)
    except ValueError as error:
        raise ModelFileError(f"{path} can't be read as JSON ({error}); download it again") from None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model; none if its weights come as PyTorch files, which are not looked into."""
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(_read_json(index)["weight_map"].values()))
        except (LookupError, TypeError, AttributeError):
            raise ModelFileError(f"{index} is no index of safetensors files; download it again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelFileError(
                f"{folder / missing[0]} is missing ({len(missing)} of {len(names)} files that {_INDEX} names are); "
                "download it"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors"))
    if not files and not any(folder.glob("pytorch_model*.bin")):
        raise ModelFileError(f"{folder} has no weights; put the model's safetensors files there")
    return files


def count_weights(path: Path) -> int:
    """How many numbers a safetensors file holds. Raises `ModelFileError` if it is cut short, or none."""
    return sum(math.prod(shape) for _, shape in weight_table(path).values())


def weight_table(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a safetensors file by name: type, such as "BF16", and shape.

    Raises `ModelFileError` if it is cut short, or none.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == _LFS_POINTER:
            raise ModelFileError(f"{path} is a Git LFS pointer in place of the file; run git lfs pull")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= _HEADER_LIMIT:
            raise ModelFileError(f"{path} is no safetensors file; download it again")
        header = file.read(length)
    if len(header) < length:
        raise ModelFileError(f"{path} is cut short: {size} bytes of at least {8 + length}; download it again")
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        needed = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        table = {name: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in tensors.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ModelFileError(f"{path} is no safetensors file; download it again") from None
    if size < needed:
        raise ModelFileError(f"{path} is cut short: {size} bytes of {needed}; download it again")
    return table
