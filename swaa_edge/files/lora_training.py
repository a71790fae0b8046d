"""What a LoRA adapter was trained under and on, kept in its folder beside PEFT's own files.

An adapter is right under the mask it was trained with and wrong, without a word, under another one. So whoever saves
one writes down the recipe and the base model, and whoever applies one compares.

    save_training("adapter", Training(config, base=BaseModel.of("Qwen3-4B")))
    read_training("adapter").check_recipe(config, "adapter")
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, ModelFileError, UnsupportedModelError

#: The recipe, in the form that `--config` takes; and what else is known of the training.
RECIPE_FILE, TRAINING_FILE = "swaa.json", "swaa_training.json"
_VERSION = 1
# Of each tensor's bytes, so many from its middle make the fingerprint: all gigabytes take minutes, and a fine-tune may
# differ in the attention's matrices alone.
_READ = 4096
#: What to do about another recipe than the adapter's.
ADVICE = "leave the settings out to use its own, or train an adapter under yours"


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """name: as people know it. n_layers: its layers. fingerprint: what `BaseModel.of` found in its weights."""

    name: str
    n_layers: int
    fingerprint: str

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> BaseModel:
        """The model in the folder of a Hugging Face checkpoint, told from others by a part of each tensor.

        Raises `ModelFileError` if the folder holds no checkpoint in safetensors.
        """
        path = Path(folder)
        files = sorted(path.glob("model*.safetensors"))
        if not files:
            raise ModelFileError(f"{path} has no safetensors files; give the folder of a Hugging Face model")
        digest = hashlib.sha256()
        try:
            for file in files:
                with file.open("rb") as data:
                    header = data.read(int.from_bytes(data.read(8), "little"))
                    digest.update(header)
                    start = data.tell()
                    for name, tensor in sorted(json.loads(header).items()):
                        if name != "__metadata__":
                            first, last = tensor["data_offsets"]
                            data.seek(start + first + max(0, last - first - _READ) // 2)
                            digest.update(data.read(min(_READ, last - first)))
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            layers = config.get("num_hidden_layers") or config["text_config"]["num_hidden_layers"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{path} is no Hugging Face model that can be read ({error})") from error
        return cls(os.path.basename(os.path.abspath(path)), layers, digest.hexdigest()[:32])


@dataclasses.dataclass(frozen=True)
class Training:
    """swaa: the recipe that the weights were trained under. base: the model they belong to. more: for people."""

    swaa: SwaaConfig
    base: BaseModel
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check_recipe(self, wanted: SwaaConfig | None, adapter: str) -> None:
        """Raise `ConfigError` unless `wanted` (None: full attention) is the same for each layer as `swaa`."""
        check_recipe(self.swaa, wanted, self.base.n_layers, adapter)

    def check_base(self, folder: str | os.PathLike[str], adapter: str) -> None:
        """Raise `UnsupportedModelError` if the checkpoint in `folder` is not the one that was trained on."""
        other = BaseModel.of(folder)
        if other.n_layers != self.base.n_layers:
            what = f"it has {other.n_layers} layers, the adapter's has {self.base.n_layers}"
        elif other.fingerprint != self.base.fingerprint:
            what = "its weights are others"
        else:
            return
        raise UnsupportedModelError(
            f"{os.fspath(folder)} is not {self.base.name}, which {adapter} was trained on: {what}; give that model"
        )


def check_recipe(
    trained: SwaaConfig, wanted: SwaaConfig | None, n_layers: int, adapter: str, advice: str = ADVICE
) -> None:
    """Raise `ConfigError` unless both mean the same for each of `n_layers` layers.

    wanted: None for full attention. adapter: what to call it in the error. advice: how the error ends.
    """
    ours, theirs = _told(trained, n_layers), None if wanted is None else _told(wanted, n_layers)
    if ours == theirs:
        return
    if theirs is None:
        apart = "full attention was asked for"
    else:
        name = next(name for name in ours if ours[name] != theirs[name])
        apart = f"it has {name} = {ours[name]}, {theirs[name]} was asked for"
    raise ConfigError(f"the adapter {adapter} was trained under another recipe: {apart}; {advice}")


def _told(config: SwaaConfig, n_layers: int) -> dict[str, Any]:
    sliding, decode = config.sliding_layers(n_layers), config.fa_decode_layers(n_layers)
    return {
        "window_size": config.window_size,
        "sink_count": config.sink_count,
        "FA layers": [layer for layer, slides in enumerate(sliding) if not slides],
        "FA decode in layers": [layer for layer, full in enumerate(decode) if full],
    }


def save_training(folder: str | os.PathLike[str], training: Training) -> None:
    """Write both files into the adapter's folder."""
    path = Path(folder)
    (path / RECIPE_FILE).write_text(json.dumps(training.swaa.to_dict(), indent=2) + "\n", encoding="utf-8")
    told = {"version": _VERSION, "base": dataclasses.asdict(training.base), **training.more}
    (path / TRAINING_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def read_training(folder: str | os.PathLike[str]) -> Training | None:
    """What `save_training` wrote; None for an adapter that was trained elsewhere and says nothing of SWAA.

    Raises `ModelFileError` if one of the two files is missing or damaged, `ConfigError` for a wrong recipe.
    """
    path = Path(folder)
    recipe, told = path / RECIPE_FILE, path / TRAINING_FILE
    there = [file.is_file() for file in (recipe, told)]
    if not any(there):
        return None
    if not all(there):
        raise ModelFileError(f"{path} lacks {(recipe, told)[there.index(False)].name}; copy the adapter's whole folder")
    try:
        document = json.loads(told.read_text(encoding="utf-8"))
        version = document.pop("version")
        base = BaseModel(**document.pop("base"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ModelFileError(f"{told} can't be read; copy the adapter's whole folder again") from None
    if version != _VERSION:
        raise ModelFileError(f"{told} is of version {version}; this swaa-edge reads version {_VERSION}")
    return Training(SwaaConfig.from_json(recipe), base, document)
