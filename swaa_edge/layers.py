"""Layer lists as users write them: a list of indices, slice text, "none" or "all".

selected_layers("fa_layers", layer_spec("fa_layers", "1::2"), n_layers=6)   # {1, 3, 5}
selected_layers("fa_layers", layer_spec("fa_layers", ":1/4"), n_layers=30)  # {0, 1, ..., 7}: the first quarter
"""

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from swaa_edge.errors import ConfigError

#: Upper limit of windows, sink counts and layers. Positions are int32 in the engine.
INT32_MAX = 2**31 - 1

#: A valid layer list: "none", "all", slice text, or a sorted tuple of indices.
LayerSpec = str | tuple[int, ...]

SPEC_HELP = 'a list of layers, slice text such as "1::2" or ":1/4", "none" or "all"'
# The bounds of a slice may be fractions of the number of layers.
_BOUND = r"[+-]?(?:[0-9]*|[0-9]+/[0-9]+)"
_SLICE = re.compile(rf"{_BOUND}:{_BOUND}(?::[+-]?[0-9]*)?")


def shown(value: Any) -> str:
    """Return at most 60 characters of text for a value in an error message."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def whole_number(name: str, value: Any, least: int) -> int:
    """Return `value` as an int.

    Raises `ConfigError` unless `value` is a whole number from `least` to INT32_MAX. A bool is not a whole number.
    """
    if not _is_whole(value):
        raise ConfigError(f"{name} = {shown(value)} must be a whole number from {least} to {INT32_MAX}")
    if not least <= value <= INT32_MAX:
        raise ConfigError(f"{name} = {shown(int(value))} is out of range: {least} to {INT32_MAX}")
    return int(value)


def layer_spec(name: str, value: Any) -> LayerSpec:
    """Return `value` as text ("none", "all" or a slice) or as a sorted tuple of layer indices.

    An empty list becomes "none". Raises `ConfigError` if `value` is not a layer list.
    """
    if isinstance(value, str):
        text = "".join(value.split())
        if text in ("none", "all") or (_SLICE.fullmatch(text) and _as_slice(text, 1) is not None):
            return text
        # On a command line, a list is typed as "1,3,5" or "5".
        if re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
            return tuple(sorted({int(part) for part in text.split(",")}))
        raise ConfigError(f"{name} = {shown(value)} is not {SPEC_HELP}")
    if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
        raise ConfigError(f"{name} = {shown(value)} is not {SPEC_HELP}")
    layers = list(value)
    for layer in layers:
        if not _is_whole(layer):
            raise ConfigError(f"{name} has {shown(layer)}, which is not a layer index; give whole numbers from 0")
        if not 0 <= layer <= INT32_MAX:
            raise ConfigError(
                f'{name} has {shown(int(layer))}, but indices start at 0; to count from the end, use slice text: "-1:"'
            )
    return tuple(sorted({int(layer) for layer in layers})) or "none"


def _as_slice(text: str, n_layers: int) -> slice | None:
    """Convert text to a slice. Return None for step 0, a lone sign, a denominator of 0 or too many digits."""
    try:
        parts = slice(*(_index(part, n_layers) if part else None for part in text.split(":")))
        range(0)[parts]
    except (ValueError, ZeroDivisionError):
        return None
    return parts


def _index(text: str, n_layers: int) -> int:
    """Convert one bound of a slice. A fraction of `n_layers` is rounded away from zero."""
    if "/" not in text:
        return int(text)
    size = math.ceil(abs(Fraction(text)) * n_layers)
    return -size if text.startswith("-") else size


def selected_layers(name: str, spec: LayerSpec, n_layers: int) -> frozenset[int]:
    """Return the layers that `spec` selects. Raises `ConfigError` if the model doesn't have one of the layers."""
    if not _is_whole(n_layers) or n_layers < 1:
        raise ConfigError(f"n_layers = {shown(n_layers)} must be a whole number of at least 1")
    if isinstance(spec, str):
        if spec == "none":
            return frozenset()
        return frozenset(range(n_layers)[slice(None) if spec == "all" else _as_slice(spec, n_layers)])
    if spec and spec[-1] >= n_layers:
        raise ConfigError(f"{name} has layer {spec[-1]}, but the model has {n_layers} layers: 0 to {n_layers - 1}")
    return frozenset(spec)
