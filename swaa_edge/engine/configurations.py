"""Find the configurations to compare by name, for `bench` and `eval`.

    configurations("model.gguf", "full,naive,quality,mine.json", changes={"window_size": 128})

Full attention (`FULL`) always comes first, because all other configurations are compared with full attention.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swaa_edge.config import CUSTOM, FULL_ATTENTION, RECIPES, Configuration, SwaaConfig
from swaa_edge.errors import ConfigError
from swaa_edge.files.model import read_model

#: Names: full attention, only a sliding window, and the settings in the model file.
FULL, NAIVE, FILE = "full", "naive", "file"
#: Compared if neither the caller nor the model file gives settings.
DEFAULT = (FULL, NAIVE, "quality", "balanced", "fast")
#: Default window of `NAIVE` in tokens, the same as in the recipes.
WINDOW = 2048


def configurations(
    model: str | os.PathLike[str],
    names: str | Iterable[str] | Mapping[str, Configuration] | None = None,
    *,
    base: SwaaConfig | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Configuration]:
    """Return the configurations to compare, by name. Full attention comes first.

    model: a path or a `ModelFile`.
    names: a list, a comma-separated text, or a mapping from names to configurations. In a list or text, each name is
        `FULL`, `NAIVE`, `FILE`, a recipe or the path of a JSON file. A JSON file's configuration is named after the
        file, without the extension. A mapping is used unchanged.
    base: one configuration to compare with full attention, instead of `names`.
    changes: fields of SwaaConfig to replace in each configuration. In `NAIVE`, only the window is replaced. Without
        `names` and `base`, the fields alone make up the configuration.

    Without names, base and changes, the settings in the model file are used. If the file has none, `DEFAULT` is used.

    Raises `ConfigError` if a name is unknown or given twice. Raises `ModelFileError` if the model file can't be read.
    """
    changes, configs = dict(changes or {}), {FULL: FULL_ATTENTION}
    if isinstance(names, Mapping):
        return configs | dict(names)
    if names is not None:
        if base is not None:
            raise ConfigError(
                "--configs can't be combined with --recipe or --config; list recipes and FILE.json in --configs"
            )
        listed = [*filter(None, map(str.strip, names.split(",") if isinstance(names, str) else names))]
        if not listed:
            raise ConfigError(f"--configs is empty; name some of {FULL}, {NAIVE}, {', '.join(RECIPES)}, {FILE}")
        for name in listed:
            label = Path(name).stem if name.endswith(".json") else name
            if label in configs and label != FULL:
                raise ConfigError(f"--configs has {label} twice; name each configuration once")
            if name.endswith(".json") and label in (FULL, NAIVE, FILE, *RECIPES):
                raise ConfigError(f"--configs: {name} would be named {label}, a built-in name; rename the file")
            configs[label] = named(model, name, changes)
        return configs
    if base is not None or changes:
        if base is None and "window_size" not in changes:
            raise ConfigError("SWAA settings need a window; add --window N, or start from --recipe NAME")
        base = SwaaConfig(**changes) if base is None else _changed(base, changes)
        return configs | {base.recipe: base}
    own = read_model(model).swaa()
    return configs | ({FILE: own} if own else {name: named(model, name) for name in DEFAULT})


def named(model: str | os.PathLike[str], name: str, changes: Mapping[str, Any] | None = None) -> Configuration:
    """Return the configuration called `name`. Arguments and errors are as in `configurations`."""
    changes = changes or {}
    if name == FULL:
        return FULL_ATTENTION
    if name == NAIVE:
        return SwaaConfig(changes.get("window_size", WINDOW))
    if name == FILE:
        own = read_model(model).swaa()
        if own is None:
            raise ConfigError(f"--configs {FILE}: {model} has no SWAA keys; name a recipe or a FILE.json")
        return _changed(own, changes)
    if name.endswith(".json"):
        return _changed(SwaaConfig.from_json(name), changes)
    if name in RECIPES:
        return _changed(RECIPES[name].config, changes)
    known = [FULL, NAIVE, *RECIPES, FILE]
    listed = ", ".join([*known, "FILE.json"])
    raise ConfigError(f"there is no configuration {name}{like(name, known)}; there are {listed}")


def like(name: str, known: Iterable[str]) -> str:
    """Return " (is it X?)" if a known name resembles `name`, else ""."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (is it {near[0]}?)" if near else ""


def _changed(config: SwaaConfig, changes: Mapping[str, Any]) -> SwaaConfig:
    return dataclasses.replace(config, recipe=CUSTOM, **changes) if changes else config
