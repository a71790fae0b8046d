"""The configurations that a command compares, from the names that a user gives.

configs = compared("model.gguf", "full,naive,quality,mine.json", Chosen(changes={"window_size": 128}))
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from swaa_edge.cli.options.swaa import Chosen
from swaa_edge.config import CUSTOM, RECIPES, SwaaConfig
from swaa_edge.errors import ConfigError

#: Full attention, which all others are compared with; a sliding window and nothing else; the file's own settings.
FULL, NAIVE, FILE = "full", "naive", "file"
#: What is compared where neither the command line nor the file says.
DEFAULT = (FULL, NAIVE, "quality", "balanced", "fast")
#: The window of `naive`, unless --window says: that of the recipes.
WINDOW = 2048

Compared = SwaaConfig | Literal[False]


def compared(path: str | os.PathLike[str], names: str | None, chosen: Chosen) -> dict[str, Compared]:
    """The configurations that the options mean, by the names under which they are shown, full attention first.

    names: of --configs, comma separated. With names, single settings change each of them; without, they (or --recipe,
    --config) are one configuration more. Raises `ConfigError` for what doesn't exist or can't be in the model's file
    (`ModelFileError`), or for two that would be shown alike.
    """
    from swaa_edge.metadata import read_swaa

    configs: dict[str, Compared] = {FULL: False}
    if names is not None:
        if chosen.base is not None:
            raise ConfigError("--configs names whole configurations; put recipes and FILE.json there")
        for name in filter(None, map(str.strip, names.split(","))):
            label = Path(name).stem if name.endswith(".json") else name
            if label in configs and label != FULL:
                raise ConfigError(f"--configs has {label} twice; name each configuration once")
            if name.endswith(".json") and label in (FULL, NAIVE, FILE, *RECIPES):
                raise ConfigError(f"--configs: {name} would be shown as {label}, which is another; rename the file")
            configs[label] = named(path, name, chosen.changes)
        return configs
    if swaa := chosen.config:
        return configs | {swaa.recipe: swaa}
    if own := read_swaa(path):
        return configs | {FILE: own}
    return configs | {name: named(path, name, {}) for name in DEFAULT}


def named(path: str | os.PathLike[str], name: str, single: Mapping[str, Any]) -> Compared:
    """The configuration called `name`, for the model at `path`, with single settings changed; False: full attention."""
    from swaa_edge.metadata import read_swaa

    if name == FULL:
        return False
    if name == NAIVE:
        return SwaaConfig(single.get("window_size", WINDOW))
    if name == FILE:
        base = read_swaa(path)
        if base is None:
            raise ConfigError(f"--configs {FILE}: {os.fspath(path)} has no SWAA keys; name a recipe or a FILE.json")
    elif name.endswith(".json"):
        base = SwaaConfig.from_json(name)
    elif name in RECIPES:
        base = RECIPES[name].config
    else:
        known = [FULL, NAIVE, *RECIPES, FILE]
        listed = ", ".join([*known, "FILE.json"])
        raise ConfigError(f"there is no configuration {name}{like(name, known)}; there are {listed}")
    return dataclasses.replace(base, recipe=CUSTOM, **single) if single else base


def like(name: str, known: list[str]) -> str:
    """ " (is it X?)" where a known name is near to a wrong one, else nothing."""
    near = difflib.get_close_matches(name, known, 1)
    return f" (is it {near[0]}?)" if near else ""
