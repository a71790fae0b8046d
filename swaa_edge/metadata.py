"""The `swaa.*` keys of a GGUF file, version 1: what they are, reading, checking and writing them.

A model carries its SWAA settings in these keys, and llama.cpp's kv_overrides can replace each of them
at load time. One table, `KEYS`, is what reading, writing and the document convert/METADATA.md follow.

    read_swaa("model.gguf")                                     # SwaaConfig, or None without keys
    python -m swaa_edge.metadata > convert/METADATA.md          # writes the document anew
"""

import dataclasses
import os
import struct
from collections.abc import Mapping
from typing import Any

from swaa_edge.config import CUSTOM, LABEL_LIMIT, SwaaConfig
from swaa_edge.errors import ConfigError, ModelFileError
from swaa_edge.files.header import ARRAY, SCALARS, STRING, Header, read_header
from swaa_edge.files.shards import check_first
from swaa_edge.layers import INT32_MAX, shown

PREFIX = "swaa."
VERSION = 1

#: The C struct of an override holds a string of 128 bytes, its end included.
MAX_OVERRIDE_LAYERS = 127

_LAYERS = "array of bool"


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: its GGUF type, whether a file with SWAA keys must have it, what it means, and its limits.

    least, most: of a number. For text the limit is `config.LABEL_LIMIT`, for arrays the layer count.
    """

    name: str
    type: str
    required: bool
    meaning: str
    least: int = 0
    most: int = INT32_MAX

    @property
    def limits(self) -> str:
        if self.type == "uint32":
            return str(self.least) if self.least == self.most else f"{self.least} to {self.most}"
        return {
            _LAYERS: "one element per layer (`{arch}.block_count`), each 0 or 1",
            "bool": "0 or 1",
            "string": f"one line of 1 to {LABEL_LIMIT} printable characters",
        }[self.type]


#: Every key, in the order in which they are written and checked: the version first, since a newer one
#: may mean anything by the others.
KEYS = {
    key.name: key
    for key in (
        Key("swaa.version", "uint32", True, "version of these keys", VERSION, VERSION),
        Key("swaa.window_size", "uint32", True, "W: tokens in the window, the current one included", 1),
        Key("swaa.sink_count", "uint32", True, "S: first tokens of a sequence, visible in every sliding layer"),
        Key("swaa.sliding_layers", _LAYERS, True, "true: the layer slides; false: full attention (FA)"),
        Key("swaa.fa_decode_layers", _LAYERS, True, "true: this sliding layer decodes with full attention"),
        Key("swaa.recipe", "string", False, f'the preset\'s name, or "{CUSTOM}"'),
        Key("swaa.adapter", "string", False, "which fine-tune the weights carry"),
        Key("swaa.enabled", "bool", False, "false: run full attention, as if no key were there; absent means true"),
    )
}
# Bookkeeping of `annotate`, not a setting; see `pack`.
PADDING_KEY = "swaa.padding"


@dataclasses.dataclass(frozen=True)
class _Given:
    """A key's value with the GGUF type that it came in; count: elements of an array."""

    type: str
    value: Any
    count: int = 1


def read_swaa(path: str | os.PathLike[str], kv_overrides: Mapping[str, Any] | None = None) -> SwaaConfig | None:
    """The settings in effect for a GGUF file: its keys, replaced by those in `kv_overrides` (llama.cpp's form).

    None means full attention: neither has SWAA keys, or `swaa.enabled` is false. `fa_layers` comes as a
    tuple of layers. Raises `ModelFileError` naming key, value and limit for what is wrong in the file
    (not a GGUF, cut short, a wrong, missing or newer key), `ConfigError` for a wrong override.
    """
    return effective_config(read_header(path), kv_overrides)


def effective_config(header: Header, kv_overrides: Mapping[str, Any] | None = None) -> SwaaConfig | None:
    """As `read_swaa`, for a header that was read already."""
    check_first(header)
    given = {
        field.key: _Given(field.type, field.value, field.count)
        for field in header.fields.values()
        if field.key.startswith(PREFIX) and field.key != PADDING_KEY
    }
    given |= _given_overrides(kv_overrides or {})
    if not given:
        return None
    try:
        # An explicit off holds even if the rest is wrong: it is the way to run such a file at all.
        if _checked("swaa.enabled", given, 0) is False:
            return None
        values = {name: _checked(name, given, header.n_layers) for name in KEYS}
    except ConfigError as error:
        raise ModelFileError(f"{header.path}: {error}") from None
    return _decode(values)


def to_kv_overrides(config: SwaaConfig, n_layers: int) -> dict[str, bool | int | str]:
    """`config` as kv_overrides for llama_cpp.Llama, for a model of `n_layers` layers; it replaces a file's keys.

    Raises `ConfigError` for a layer that the model doesn't have, or more than 127 layers.
    """
    if n_layers > MAX_OVERRIDE_LAYERS:
        raise ConfigError(
            f"the model has {n_layers} layers and an override holds {MAX_OVERRIDE_LAYERS}; "
            "write the settings into the file with: swaa-edge annotate"
        )
    overrides: dict[str, bool | int | str] = {"swaa.enabled": True}
    for name, value in _encode(config, n_layers).items():
        if KEYS[name].type == _LAYERS:
            overrides[name] = "".join("01"[flag] for flag in value)
        elif KEYS[name].type == "uint32":
            overrides[name] = value
    return overrides


def pack(config: SwaaConfig, n_layers: int, padding: bytes | None = None) -> tuple[int, bytes]:
    """The keys for `config` as bytes of a GGUF key section, with their count.

    padding: the original bytes between header and data, kept in a key of their own so that `annotate
    --strip` can restore them; only files whose padding isn't plain zeros need it.
    """
    values = _encode(config, n_layers)
    packed = [_pack(name, KEYS[name].type, value) for name, value in values.items()]
    if padding is not None:
        packed.append(_pack(PADDING_KEY, "string", padding.hex()))
    return len(packed), b"".join(packed)


def render_spec() -> str:
    """The text of convert/METADATA.md."""
    rows = "\n".join(
        f"| `{key.name}` | {key.type} | {'yes' if key.required else 'no'} | {key.limits} | {key.meaning} |"
        for key in KEYS.values()
    )
    return _SPEC.format(rows=rows, version=VERSION, most=MAX_OVERRIDE_LAYERS, padding=PADDING_KEY)


def _encode(config: SwaaConfig, n_layers: int) -> dict[str, Any]:
    values = {
        "swaa.version": VERSION,
        "swaa.window_size": config.window_size,
        "swaa.sink_count": config.sink_count,
        "swaa.sliding_layers": config.sliding_layers(n_layers),
        "swaa.fa_decode_layers": config.fa_decode_layers(n_layers),
        "swaa.recipe": config.recipe,
    }
    return values if config.adapter is None else values | {"swaa.adapter": config.adapter}


def _decode(values: Mapping[str, Any]) -> SwaaConfig:
    sliding, decode = values["swaa.sliding_layers"], values["swaa.fa_decode_layers"]
    full_decode = tuple(layer for layer, slides in enumerate(sliding) if slides and decode[layer])
    return SwaaConfig(
        window_size=values["swaa.window_size"],
        sink_count=values["swaa.sink_count"],
        fa_layers=tuple(layer for layer, slides in enumerate(sliding) if not slides),
        fa_decode=full_decode if 0 < len(full_decode) < sum(sliding) else bool(full_decode),
        recipe=values["swaa.recipe"] or CUSTOM,
        adapter=values["swaa.adapter"],
    )


def _checked(name: str, given: Mapping[str, _Given], n_layers: int) -> Any:
    """The value of one key, or None for an optional one that is absent. Raises `ConfigError`."""
    key = KEYS[name]
    if name not in given:
        if key.required:
            raise ConfigError(f"{name} is missing, though other SWAA keys are there; it must be a {key.type}")
        return None
    value, count = given[name].value, given[name].count
    if given[name].type != key.type:
        raise ConfigError(f"{name} = {shown(value)} has the type {given[name].type}; it must be {key.type}")
    if key.type == "uint32" and not key.least <= value <= key.most:
        if name == "swaa.version":
            raise ConfigError(f"{name} = {value} is not known; this program reads {VERSION}, a newer one may read it")
        raise ConfigError(f"{name} = {value} is out of range: {key.limits}")
    if key.type == "string" and not (value and len(value) <= LABEL_LIMIT and value.isprintable()):
        raise ConfigError(f"{name} = {shown(value)} must be {key.limits}")
    if key.type == "bool" and not isinstance(value, bool):
        raise ConfigError(f"{name} = {value} must be {key.limits}")
    if key.type == _LAYERS:
        if count != n_layers:
            raise ConfigError(f"{name} has {count} elements; the model has {n_layers} layers, one element for each")
        for layer, flag in enumerate(value):
            if not isinstance(flag, bool):
                raise ConfigError(f"{name} has {flag} at layer {layer}; every element must be 0 or 1")
    return value


def _given_overrides(overrides: Mapping[str, Any]) -> dict[str, _Given]:
    """llama.cpp's overrides of our keys in the types of the file: int, bool, and text of 0 and 1 for arrays."""
    given = {}
    for name, value in overrides.items():
        if not name.startswith(PREFIX):
            continue
        if name not in KEYS:
            raise ConfigError(f"unknown override {shown(name)}; there are: {', '.join(KEYS)}")
        wanted = KEYS[name].type
        right = {"uint32": int, "bool": bool, "string": str, _LAYERS: str}[wanted]
        if type(value) is not right:
            form = "text of 0 and 1, one for each layer" if wanted == _LAYERS else right.__name__
            raise ConfigError(f"the override {name} = {shown(value)} must be {form}")
        if wanted != _LAYERS:
            given[name] = _Given(wanted, value)
        elif set(value) <= {"0", "1"} and len(value) <= MAX_OVERRIDE_LAYERS:
            given[name] = _Given(wanted, tuple(char == "1" for char in value), len(value))
        else:
            raise ConfigError(f"the override {name} = {shown(value)} must be up to {MAX_OVERRIDE_LAYERS} of 0 and 1")
    return given


def _pack(name: str, kind: str, value: Any) -> bytes:
    if kind == _LAYERS:
        code, body = ARRAY, struct.pack(f"<IQ{len(value)}B", _code("bool"), len(value), *value)
    elif kind == "string":
        code, body = STRING, _pack_text(value)
    else:
        code = _code(kind)
        body = struct.pack(SCALARS[code][1], value)
    return _pack_text(name) + struct.pack("<I", code) + body


def _code(kind: str) -> int:
    return next(code for code, (name, _) in SCALARS.items() if name == kind)


def _pack_text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


_SPEC = """\
<!-- Written by `python -m swaa_edge.metadata`; change swaa_edge/metadata.py, then run it again. -->
# SWAA keys in GGUF, version {version}

A GGUF file carries its sliding-window settings in the keys below. It stays a valid GGUF: programs
that don't know them ignore them and run full attention.

| key | GGUF type | required | limits | meaning |
|---|---|---|---|---|
{rows}

## What they mean
In a sliding layer, the query at position p sees the key at position j iff `j <= p` and at least one
of these holds:

- `p - j < W`: j is in the window;
- `j < S`: j is a sink;
- the layer's `swaa.fa_decode_layers` is true and the query's token was generated (not part of a prompt).

A layer with `swaa.sliding_layers` false is plain causal; its `swaa.fa_decode_layers` means nothing,
and writers set it to false.

## Rules
- A file has all required keys or none that starts with `swaa.`.
- A reader refuses a file whose keys have another type, length or range, or another version, naming
  the key, its value and the limit. It checks the version before the other keys.
- A reader ignores keys under `swaa.` that this version doesn't name.
- In a split model the keys are in the first file.

## Overrides
Each key can be replaced when a model is loaded, through llama.cpp's `kv_overrides`: integers for
`uint32`, booleans for `bool`, and for an array a string of `0` and `1`, one character per layer, up to
{most} layers. A key that the file lacks is added. `swaa.enabled` = false turns SWAA off, whatever
the other keys say.

## Writing into an existing file
`swaa-edge annotate` adds the keys at the end of the key section and changes nothing else but the count
of keys and the padding before the tensor data; `--strip` takes every key that starts with `swaa.` out
again and gives back the original bytes. Only where the original padding isn't plain zeros, `annotate`
also writes `{padding}` (string): those bytes as hexadecimal digits, for `--strip`. It is no setting.
"""


if __name__ == "__main__":
    print(render_spec(), end="")
