"""SWAA settings: which layers slide, how far they see, and which layers decode with full attention.

Every tool and the engine take the settings as one object.

    SwaaConfig(window_size=2048, sink_count=64, fa_layers="1::2", fa_decode=True).sliding_layers(28)
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from swaa_edge.errors import ConfigError, ModelFileError
from swaa_edge.layers import SPEC_HELP, LayerSpec, layer_spec, selected_layers, shown, whole_number

#: The label of a configuration that isn't one of `RECIPES`.
CUSTOM = "custom"
#: Longest label in characters. A longer label is a mistake or an attack.
LABEL_LIMIT = 255
# The paper's spelling of each setting (arXiv 2512.10411), and ours.
_PAPER_SPELLING = {
    "sliding_window_size": "window_size",
    "keep_first": "sink_count",
    "non_sliding_layers": "fa_layers",
    "force_fa_decode": "fa_decode",
}


@dataclasses.dataclass(frozen=True)
class SwaaConfig:
    """The settings of Sliding Window Attention Adaptation: immutable, hashable, validated when created.

    window_size: the window W in tokens, including the current token; from 1 to 2**31 - 1.
    sink_count: the number S of first tokens that stay visible in every sliding layer; from 0 to 2**31 - 1.
    fa_layers: the layers that keep full attention (FA): a list of indices, a slice, "none" or "all". Indices in a list
        start at 0 and can't be negative. A slice "start:stop:step" follows Python's rules, so negative numbers count
        from the end. Start and stop may be fractions of the number of layers: ":1/4" is the first quarter, rounded up.
        Stored as text or as a sorted tuple.
    fa_decode: the sliding layers that decode with full attention: True (all), False (none) or a value as for
        `fa_layers`. FA layers in the list are ignored. Stored as a bool, text or tuple.
    tail_count: the number T of tokens at the end of a prompt (the tail) that attend like decode tokens; from 0 to
        2**31 - 1. A question in the tail sees the whole document. The tail has no effect in layers without FA decode.
    recipe: name of the preset, or "custom"; ignored when settings are compared.
    adapter: name of the fine-tune that is merged into the weights, if any; ignored when settings are compared.

    Raises `ConfigError` with a message that names the setting, its value and the limit.
    """

    window_size: int
    sink_count: int = 0
    fa_layers: LayerSpec | Iterable[int] = "none"
    fa_decode: bool | LayerSpec | Iterable[int] = False
    tail_count: int = 0
    recipe: str = dataclasses.field(default=CUSTOM, compare=False)
    adapter: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("window_size", whole_number("window_size", self.window_size, 1))
        put("sink_count", whole_number("sink_count", self.sink_count, 0))
        put("fa_layers", layer_spec("fa_layers", self.fa_layers))
        put("fa_decode", _fa_decode(self.fa_decode))
        put("tail_count", whole_number("tail_count", self.tail_count, 0))
        put("recipe", _label("recipe", self.recipe))
        put("adapter", None if self.adapter is None else _label("adapter", self.adapter))

    @property
    def reach(self) -> int:
        """Window plus sinks, in tokens. Every layer sees all of a prompt of this length or less."""
        return self.window_size + self.sink_count

    def sliding_layers(self, n_layers: int) -> list[bool]:
        """Return one bool per layer: true for a sliding layer, false for a full-attention layer.

        Raises `ConfigError` if `fa_layers` names a layer that the model doesn't have.
        """
        full = selected_layers("fa_layers", self.fa_layers, n_layers)
        return [layer not in full for layer in range(n_layers)]

    def fa_decode_layers(self, n_layers: int) -> list[bool]:
        """Return one bool per layer: true if the layer slides in prefill but has full attention in decode.

        Raises `ConfigError` if `fa_layers` or `fa_decode` names a layer that the model doesn't have.
        """
        sliding = self.sliding_layers(n_layers)
        if isinstance(self.fa_decode, bool):
            return [slides and self.fa_decode for slides in sliding]
        full = selected_layers("fa_decode", self.fa_decode, n_layers)
        return [slides and layer in full for layer, slides in enumerate(sliding)]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values. `from_dict` reads the result."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    @classmethod
    def from_layers(
        cls,
        window_size: int,
        sink_count: int,
        sliding: Sequence[bool],
        fa_decode: Sequence[bool],
        tail_count: int = 0,
        *,
        recipe: str = CUSTOM,
        adapter: str | None = None,
    ) -> SwaaConfig:
        """Create settings from one bool per layer, as in GGUF files and in the engine.

        sliding: true for each layer that slides.
        fa_decode: true for each layer that decodes with full attention (FA). FA layers are ignored.

        In the result, `fa_layers` is a tuple of layer indices. `fa_decode` is a bool if all sliding layers agree, and a
        tuple of layer indices otherwise.
        """
        decode = tuple(layer for layer, slides in enumerate(sliding) if slides and fa_decode[layer])
        return cls(
            window_size,
            sink_count,
            fa_layers=tuple(layer for layer, slides in enumerate(sliding) if not slides),
            fa_decode=decode if 0 < len(decode) < sum(sliding) else bool(decode),
            tail_count=tail_count,
            recipe=recipe,
            adapter=adapter,
        )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SwaaConfig:
        """Create settings from a mapping. Its keys are our field names or the SWAA paper's names.

        The paper's names are sliding_window_size, keep_first, force_fa_decode and non_sliding_layers. Only the window
        size is required. Raises `ConfigError`, also if two keys contradict each other.
        """
        if not isinstance(settings, Mapping):
            raise ConfigError(f"SWAA settings must be a JSON object, not {shown(settings)}")
        names = [field.name for field in dataclasses.fields(cls)]
        chosen: dict[str, tuple[str, Any]] = {}
        for key, value in settings.items():
            name = _PAPER_SPELLING.get(key, key) if isinstance(key, str) else key
            if name not in names:
                raise ConfigError(_unknown(f"SWAA setting {shown(key)}", key, [*names, *_PAPER_SPELLING]))
            if name == "window_size" and value is None:
                raise ConfigError(f"{key} is null, which means full attention; give a window, or turn SWAA off instead")
            if name in chosen and _normal(name, chosen[name][1]) != _normal(name, value):
                first, other = chosen[name]
                raise ConfigError(
                    f"{first} = {shown(other)} contradicts {key} = {shown(value)}: "
                    "they are the same setting; give only one"
                )
            chosen.setdefault(name, (key, value))
        if "window_size" not in chosen:
            raise ConfigError("SWAA settings lack window_size (or sliding_window_size); give the window in tokens")
        return cls(**{name: value for name, (_, value) in chosen.items()})

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> SwaaConfig:
        """Read settings from a JSON file with one object. Keys are as in `from_dict`. Raises `ConfigError`."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_dict(json.load(file, object_pairs_hook=_without_duplicates))
        except OSError as error:
            raise ConfigError(f"cannot read the settings file {os.fspath(path)}: {error.strerror}") from error
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(path)}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{os.fspath(path)} is not a JSON file: {error}") from error

    @classmethod
    def from_recipe(cls, name: str) -> SwaaConfig:
        """Return the preset called `name` in `RECIPES`. Raises `ConfigError` for an unknown name."""
        if not isinstance(name, str) or name not in RECIPES:
            raise ConfigError(_unknown(f"recipe {shown(name)}", name, list(RECIPES)))
        return RECIPES[name].config

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str]) -> SwaaConfig:
        """Read the settings in a GGUF file. In the result, `fa_layers` is a tuple of layer indices.

        Raises `ModelFileError` if the file is not a valid GGUF, or if its SWAA keys are missing or wrong. For a file
        without SWAA keys, `swaa_edge.metadata.read_swaa` returns None instead.
        """
        from swaa_edge.metadata import read_swaa  # metadata builds on this module

        config = read_swaa(path)
        if config is None:
            raise ModelFileError(f"{os.fspath(path)} has no SWAA keys; write them with: swaa-edge annotate")
        return config


#: Turns SWAA off: every layer has full attention. SWAA keys in the file are ignored.
FULL_ATTENTION: Literal[False] = False

#: Settings, or `FULL_ATTENTION`.
Configuration = SwaaConfig | Literal[False]


def _unknown(what: str, key: Any, valid: list[str]) -> str:
    near = difflib.get_close_matches(str(key), valid, n=1)
    return f"unknown {what}; " + (f"did you mean {near[0]}?" if near else f"valid names: {', '.join(valid)}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps only the last of two equal keys. A contradiction would stay hidden.
    settings = dict(pairs)
    if len(settings) != len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ConfigError(f"{shown(twice)} is given twice; give it once")
    return settings


def _label(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= LABEL_LIMIT or not value.isprintable():
        raise ConfigError(f"{name} = {shown(value)} must be one line of 1 to {LABEL_LIMIT} printable characters")
    return value


def _fa_decode(value: Any) -> bool | LayerSpec:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "yes", "no"):
        raise ConfigError(f"fa_decode = {shown(value)} must be true or false without quotes, or a list of layers")
    if not isinstance(value, str | Iterable):
        raise ConfigError(f"fa_decode = {shown(value)} must be true, false, or {SPEC_HELP}")
    spec = layer_spec("fa_decode", value)
    return {"none": False, "all": True}.get(spec, spec) if isinstance(spec, str) else spec


def _normal(name: str, value: Any) -> Any:
    if name == "fa_layers":
        return layer_spec(name, value)
    return _fa_decode(value) if name == "fa_decode" else (type(value), value)


#: The tail of every recipe that decodes with full attention, in tokens; the paper has none.
TAIL = 128


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A preset and its published figures (Qwen3-4B, arXiv 2512.10411). The figures are only printed.

    The figures were published for the same settings without a tail. The paper doesn't have the preset `early`, so all
    figures of `early` are None.

    accuracy: accuracies in percent on LongMemEval with 24k tokens: "thinking model/instruct model".
    accuracy_lora: the same accuracies with the authors' LoRA adapter.
    seconds: time for a prompt of 128k tokens and 512 generated tokens.
    """

    config: SwaaConfig
    accuracy: str | None
    accuracy_lora: str | None
    seconds: float | None


# The paper's figures for full attention.
FULL_ATTENTION_ACCURACY = "73.0/62.0"
FULL_ATTENTION_SECONDS = 3.44


def _preset(
    name: str,
    fa_layers: str,
    fa_decode: bool,
    accuracy: str | None = None,
    accuracy_lora: str | None = None,
    seconds: float | None = None,
) -> Recipe:
    tail_count = TAIL if fa_decode else 0
    return Recipe(SwaaConfig(2048, 100, fa_layers, fa_decode, tail_count, name), accuracy, accuracy_lora, seconds)


#: The presets by name, most accurate first. `early` has no published accuracy and costs about as much as `balanced`.
#: Accuracies marked S=10 were measured with 10 sinks.
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        preset.config.recipe: preset
        for preset in (
            _preset("quality", "1::2", True, "68.8/50.6", "73.2/58.8", 2.72),
            _preset("balanced", "1::4", True, "53.2/31.4 (S=10)", "68.8/47.0", 2.37),
            _preset("early", ":1/4", True),
            _preset("fast", "none", True, "50.0/17.8", "62.2/42.6", 2.01),
            _preset("memory", "1::2", False, "25.8/36.4 (S=10)", "63.6/54.6", 1.92),
            _preset("stream", "none", False, "16.0/15.6 (S=10)", "18.8/23.8", 0.43),
        )
    }
)
