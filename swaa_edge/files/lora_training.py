"""Stores the recipe and the base model of a LoRA adapter in the adapter's folder, beside PEFT's files.

    save_training("adapter", Training(config, base=BaseModel.of("Qwen3-4B")))
    read_training("adapter").check_recipe(config, "adapter")

Under a mask that differs from training, an adapter silently gives worse answers. So merging, converting and loading
compare the recipe and the base model with the stored ones.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, ModelFileError, UnsupportedModelError
from swaa_edge.files.weights import fingerprint, read_tensors

#: Names of two files: the recipe, which `--config` can read, and the facts about the training.
RECIPE_FILE, TRAINING_FILE = "swaa.json", "swaa_training.json"
_VERSION = 1
#: Default end of the error message about a different recipe.
ADVICE = "leave the settings out to use its own, or train an adapter under yours"


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The base model of an adapter.

    name: the name of the model's folder.
    fingerprint: the result of `weights.fingerprint` for the model's files.
    """

    name: str
    n_layers: int
    fingerprint: str

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> BaseModel:
        """Identify the model in a Hugging Face model directory.

        Raises `ModelFileError` if the model's configuration or safetensors files are missing or damaged.
        """
        path = Path(folder)
        files = sorted(path.glob("model*.safetensors"))
        if not files:
            raise ModelFileError(f"{path} has no safetensors files; give the folder of a Hugging Face model")
        try:
            identity = fingerprint(_weights(file) for file in files)
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            layers = config.get("num_hidden_layers") or config["text_config"]["num_hidden_layers"]
        except ModelFileError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{path} is not a readable Hugging Face model ({error}); download it again") from error
        return cls(os.path.basename(os.path.abspath(path)), layers, identity)


def _weights(file: Path) -> tuple[Path, range, list[range]]:
    tensors = read_tensors(file)
    start = min((tensor.data.start for tensor in tensors.values()), default=file.stat().st_size)
    # The first eight bytes hold the length of the header.
    return file, range(8, start), [tensors[name].data for name in sorted(tensors)]


@dataclasses.dataclass(frozen=True)
class Training:
    """The facts about an adapter's training.

    swaa: the recipe during training.
    base: the base model.
    more: further facts.
    """

    swaa: SwaaConfig
    base: BaseModel
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check_recipe(self, requested: SwaaConfig | None, adapter: str) -> None:
        """Raise `ConfigError` unless `requested` (None: full attention) equals `swaa` in every layer."""
        check_recipe(self.swaa, requested, self.base.n_layers, adapter)

    def check_base(self, folder: str | os.PathLike[str], adapter: str) -> None:
        """Raise `UnsupportedModelError` if the model directory `folder` is not the base model."""
        other = BaseModel.of(folder)
        if other.n_layers != self.base.n_layers:
            what = f"it has {other.n_layers} layers instead of {self.base.n_layers}"
        elif other.fingerprint != self.base.fingerprint:
            what = "its weights differ"
        else:
            return
        raise UnsupportedModelError(
            f"{os.fspath(folder)} is not {self.base.name}, the base model of {adapter}: {what}; give that model"
        )


def check_recipe(
    trained: SwaaConfig, requested: SwaaConfig | None, n_layers: int, adapter: str, advice: str = ADVICE
) -> None:
    """Raise `ConfigError` unless `trained` and `requested` are equal in each of `n_layers` layers.

    requested: settings, or None for full attention.
    adapter: name of the adapter in the error message.
    advice: end of the error message.
    """
    ours, theirs = _by_layer(trained, n_layers), None if requested is None else _by_layer(requested, n_layers)
    if ours == theirs:
        return
    if theirs is None:
        difference = "full attention was requested"
    else:
        name = next(name for name in ours if ours[name] != theirs[name])
        difference = f"its {name} is {ours[name]}, but {theirs[name]} was requested"
    raise ConfigError(f"the adapter {adapter} was trained under another recipe: {difference}; {advice}")


def _by_layer(config: SwaaConfig, n_layers: int) -> dict[str, Any]:
    sliding, decode = config.sliding_layers(n_layers), config.fa_decode_layers(n_layers)
    return {
        "window_size": config.window_size,
        "sink_count": config.sink_count,
        "list of FA layers": [layer for layer, slides in enumerate(sliding) if not slides],
        "list of FA-decode layers": [layer for layer, full in enumerate(decode) if full],
        "tail_count": config.tail_count if any(decode) else 0,
    }


def save_training(folder: str | os.PathLike[str], training: Training) -> None:
    """Write `swaa.json` and `swaa_training.json` into the adapter's folder."""
    path = Path(folder)
    (path / RECIPE_FILE).write_text(json.dumps(training.swaa.to_dict(), indent=2) + "\n", encoding="utf-8")
    facts = {"version": _VERSION, "base": dataclasses.asdict(training.base), **training.more}
    (path / TRAINING_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_training(folder: str | os.PathLike[str]) -> Training | None:
    """Read the two files that `save_training` writes.

    Return None if both files are missing. The adapter is then from another tool.

    Raises `ModelFileError` if only one of the files exists, or if a file is damaged. Raises `ConfigError` if the recipe
    is invalid.
    """
    recipe, facts = (Path(folder) / name for name in (RECIPE_FILE, TRAINING_FILE))
    missing = [file.name for file in (recipe, facts) if not file.is_file()]
    if len(missing) == 2:
        return None
    if missing:
        raise ModelFileError(f"{recipe.parent} lacks {missing[0]}; copy the adapter's whole folder")
    try:
        document = json.loads(facts.read_text(encoding="utf-8"))
        version = document.pop("version")
        base = BaseModel(**document.pop("base"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ModelFileError(f"{facts} is damaged; copy the adapter's whole folder again") from None
    if version != _VERSION:
        raise ModelFileError(f"{facts} has version {version}; this swaa-edge reads version {_VERSION}")
    return Training(SwaaConfig.from_json(recipe), base, document)
