"""Read, check and write the `swaa.*` keys of a GGUF file. The keys hold the model's SWAA settings.

llama.cpp's kv_overrides can replace each key at load time. The table `KEYS` determines how keys are read and written.
The document convert/METADATA.md is generated from `KEYS`.

    read_swaa("model.gguf")                                     # SwaaConfig, or None without keys
    python -m swaa_edge.metadata > convert/METADATA.md          # regenerates the document
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swaa_edge.config import CUSTOM, LABEL_LIMIT, SwaaConfig
from swaa_edge.errors import ConfigError, ModelFileError
from swaa_edge.layers import INT32_MAX, shown

if TYPE_CHECKING:
    from swaa_edge.files.header import Field, Header

PREFIX = "swaa."
VERSION = 1
#: The C struct of an override holds a string of 128 bytes, including the terminating zero.
MAX_OVERRIDE_LAYERS = 127
_LAYERS = "array of bool"


@dataclasses.dataclass(frozen=True)
class Key:
    """One of the SWAA keys.

    type: the GGUF type.
    required: whether every file with SWAA keys must have this key.
    least, most: limits of a number.
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


#: All keys, in the order of writing and checking. The version comes first, since the meaning of the other keys may
#: depend on the version.
KEYS = {
    key.name: key
    for key in (
        Key("swaa.version", "uint32", True, "version of these keys", VERSION, VERSION),
        Key("swaa.window_size", "uint32", True, "W: tokens in the window, including the current one", 1),
        Key(
            "swaa.sink_count",
            "uint32",
            True,
            "S: first tokens of a sequence, which stay visible in every sliding layer",
        ),
        Key(
            "swaa.tail_count", "uint32", False, "T: last tokens of a prompt, which attend like decode tokens; absent: 0"
        ),
        Key("swaa.sliding_layers", _LAYERS, True, "true: the layer slides; false: full attention (FA)"),
        Key("swaa.fa_decode_layers", _LAYERS, True, "true: this sliding layer decodes with full attention"),
        Key("swaa.recipe", "string", False, f'the preset\'s name, or "{CUSTOM}"'),
        Key("swaa.adapter", "string", False, "the fine-tune in the weights"),
        Key("swaa.enabled", "bool", False, "false: run full attention, as without SWAA keys; absent means true"),
    )
}
# Written by `annotate` for `--strip`; not a setting. See `pack`.
PADDING_KEY = "swaa.padding"


@dataclasses.dataclass(frozen=True)
class _Given:
    """An override, with the fields of `files.header.Field` that this module uses."""

    type: str
    value: Any
    count: int = 1


def read_swaa(path: str | os.PathLike[str], kv_overrides: Mapping[str, Any] | None = None) -> SwaaConfig | None:
    """Return the SWAA settings of a GGUF file, or None for full attention.

    kv_overrides: overrides in llama.cpp's form. An override replaces or adds the key of the same name.

    The result is None if there are no SWAA keys, or if `swaa.enabled` is false. The result's `fa_layers` is a tuple of
    layers.

    Raises `ModelFileError` if the file is not a GGUF or is truncated. A wrong or missing key, or a newer version of the
    keys, also raises `ModelFileError`. The message then names the key, the value and the limit. Raises `ConfigError`
    for a wrong override.
    """
    from swaa_edge.files.model import first_header  # files builds on this module

    return effective_config(first_header(path), kv_overrides)


def effective_config(header: Header, kv_overrides: Mapping[str, Any] | None = None) -> SwaaConfig | None:
    """Do the same as `read_swaa`, given the header of a model's first file."""
    given: dict[str, Field | _Given] = {
        key: field for key, field in header.fields.items() if key.startswith(PREFIX) and key != PADDING_KEY
    }
    given |= _given_overrides(kv_overrides or {})
    if not given:
        return None
    try:
        # With swaa.enabled = false, the other keys may be wrong. So a file with wrong keys can still be run.
        if _checked("swaa.enabled", given, 0) is False:
            return None
        values = {name: _checked(name, given, header.n_layers) for name in KEYS}
    except ConfigError as error:
        raise ModelFileError(f"{header.path}: {error}") from None
    return SwaaConfig.from_layers(
        values["swaa.window_size"],
        values["swaa.sink_count"],
        values["swaa.sliding_layers"],
        values["swaa.fa_decode_layers"],
        values["swaa.tail_count"] or 0,
        recipe=values["swaa.recipe"] or CUSTOM,
        adapter=values["swaa.adapter"],
    )


def to_kv_overrides(config: SwaaConfig, n_layers: int) -> dict[str, bool | int | str]:
    """Convert `config` to kv_overrides of llama_cpp.Llama. The overrides replace the keys in the file.

    n_layers: number of layers in the model.

    Raises `ConfigError` for a layer that the model doesn't have, or for more than 127 layers.
    """
    if n_layers > MAX_OVERRIDE_LAYERS:
        raise ConfigError(
            f"the model has {n_layers} layers, but an override holds at most {MAX_OVERRIDE_LAYERS}; "
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
    """Encode `config` as GGUF keys. Return the number of keys, and the bytes.

    padding: the original bytes between header and data, for `annotate --strip`. An extra key stores the padding. None
        omits the extra key; enough if all bytes are zero.
    """
    values = _encode(config, n_layers)
    if not config.tail_count:  # a file without a tail is the same as in earlier releases
        del values["swaa.tail_count"]
    packed = [_pack(name, KEYS[name].type, value) for name, value in values.items()]
    if padding is not None:
        packed.append(_pack(PADDING_KEY, "string", padding.hex()))
    return len(packed), b"".join(packed)


def render_spec() -> str:
    """Return the text of convert/METADATA.md."""
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
        "swaa.tail_count": config.tail_count,
        "swaa.sliding_layers": config.sliding_layers(n_layers),
        "swaa.fa_decode_layers": config.fa_decode_layers(n_layers),
        "swaa.recipe": config.recipe,
    }
    return values if config.adapter is None else values | {"swaa.adapter": config.adapter}


def _checked(name: str, given: Mapping[str, Field | _Given], n_layers: int) -> Any:
    """Return the value of one key, or None for an optional key that is absent. Raises `ConfigError`."""
    key = KEYS[name]
    if name not in given:
        if key.required:
            raise ConfigError(f"{name} is missing although the file has other SWAA keys; add it as {key.type}")
        return None
    value, count = given[name].value, given[name].count
    if given[name].type != key.type:
        raise ConfigError(f"{name} = {shown(value)} has the type {given[name].type}; it must be {key.type}")
    if key.type == "uint32" and not key.least <= value <= key.most:
        if name == "swaa.version":
            raise ConfigError(
                f"{name} = {value} is unknown; this swaa-edge reads version {VERSION}; a newer one may help"
            )
        raise ConfigError(f"{name} = {value} is out of range: {key.limits}")
    if key.type == "string" and not (value and len(value) <= LABEL_LIMIT and value.isprintable()):
        raise ConfigError(f"{name} = {shown(value)} must be {key.limits}")
    if key.type == "bool" and not isinstance(value, bool):
        raise ConfigError(f"{name} = {value} must be {key.limits}")
    if key.type == _LAYERS:
        if count != n_layers:
            raise ConfigError(f"{name} has {count} elements, but the model has {n_layers} layers; give one for each")
        for layer, flag in enumerate(value):
            if not isinstance(flag, bool):
                raise ConfigError(f"{name} has {flag} at layer {layer}; every element must be 0 or 1")
    return value


def _given_overrides(overrides: Mapping[str, Any]) -> dict[str, _Given]:
    """Convert the overrides of SWAA keys to GGUF types.

    In llama.cpp's overrides, a number is an int, a flag is a bool, and an array is a text of 0 and 1.
    """
    given = {}
    for name, value in overrides.items():
        if not name.startswith(PREFIX):
            continue
        if name not in KEYS:
            raise ConfigError(f"unknown override {shown(name)}; the SWAA keys are: {', '.join(KEYS)}")
        kind = KEYS[name].type
        python = {"uint32": int, "bool": bool, "string": str, _LAYERS: str}[kind]
        if type(value) is not python:
            form = "text of 0 and 1, one for each layer" if kind == _LAYERS else python.__name__
            raise ConfigError(f"the override {name} = {shown(value)} must be {form}")
        if kind != _LAYERS:
            given[name] = _Given(kind, value)
        elif set(value) <= {"0", "1"} and len(value) <= MAX_OVERRIDE_LAYERS:
            given[name] = _Given(kind, tuple(char == "1" for char in value), len(value))
        else:
            raise ConfigError(
                f"the override {name} = {shown(value)} must be up to {MAX_OVERRIDE_LAYERS} characters, each 0 or 1"
            )
    return given


def _pack(name: str, kind: str, value: Any) -> bytes:
    # Not imported at the top, because importing gguf takes a moment.
    from gguf.constants import GGUFValueType

    if kind == _LAYERS:
        code = GGUFValueType.ARRAY
        body = struct.pack(f"<IQ{len(value)}B", GGUFValueType.BOOL, len(value), *value)
    elif kind == "string":
        code, body = GGUFValueType.STRING, _pack_text(value)
    else:
        code, body = GGUFValueType.UINT32, struct.pack("<I", value)
    return _pack_text(name) + struct.pack("<I", code) + body


def _pack_text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


_SPEC = """\
<!-- Generated by `python -m swaa_edge.metadata`; edit swaa_edge/metadata.py, then run it again. -->
# SWAA keys in GGUF, version {version}

A GGUF file carries its sliding-window settings in the keys below. The file stays a valid GGUF: programs
without SWAA ignore the keys and run full attention.

| key | GGUF type | required | limits | meaning |
|---|---|---|---|---|
{rows}

## Meaning
In a sliding layer, the query at position p sees the key at position j iff `j <= p` and at least one
of these holds:

- `p - j < W`: j is in the window;
- `j < S`: j is a sink;
- the layer's `swaa.fa_decode_layers` is true, and the query's token was generated or is one of the last T tokens of a
  prompt.

The prompt consists of the tokens that are evaluated before the model generates: in a chat, the new tokens of each turn.

A layer whose `swaa.sliding_layers` is false has plain causal attention; its `swaa.fa_decode_layers` has no effect, and
writers set it to false.

## Rules
- A file has all required keys, or no key that starts with `swaa.`.
- A reader refuses a file if a key has another type, length or value than the table allows, or if the version is
  unknown. The error message names the key, the value and the limit. The reader checks the version before the other
  keys.
- A reader ignores keys under `swaa.` that this version doesn't define.
- In a split model the keys are in the first file.

## Overrides
llama.cpp's `kv_overrides` can replace the value of each key when a model is loaded. The override of a `uint32` is an
integer, and that of a `bool` is a boolean. The override of an array is a string with one character per layer, `0` or
`1`, for up to {most} layers. An override of a key that the file lacks adds this key. `swaa.enabled` = false
turns SWAA off, regardless of the other keys.

## Writing into an existing file
`swaa-edge annotate` adds the keys at the end of the key section. Apart from this, `annotate` changes only the key count
and the padding before the tensor data. `--strip` removes every key that starts with `swaa.`, which restores the
original bytes. If the original padding isn't all zero, `annotate` stores it as hexadecimal digits in the string key
`{padding}`, from which `--strip` restores it; this key is not a setting.
"""


if __name__ == "__main__":
    print(render_spec(), end="")
