"""What is checked and derived before a model is loaded, so that a mistake is one clear line and never an abort in C.

`SwaaLlama` calls these; they need neither llama_cpp nor the native library.

    overrides, config = plan_swaa("model.gguf", SwaaConfig.from_recipe("balanced"), None)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from swaa_edge import metadata
from swaa_edge.config import CUSTOM, SwaaConfig
from swaa_edge.errors import ConfigError, ModelFileError, UnsupportedModelError
from swaa_edge.files.header import read_header
from swaa_edge.files.lora_gguf import read_lora
from swaa_edge.files.model import read_shards, swaa_refusal
from swaa_edge.layers import shown, whole_number
from swaa_edge.metadata import PREFIX, to_kv_overrides

if TYPE_CHECKING:
    from swaa_edge.native import ModelConfig

Override = bool | int | float | str
# upstream keeps a list per batch row, each a memory mapping of its own where the context is long
_MAX_BATCH = 1 << 14
# enum ggml_type: those that a KV cache can have without being quantized (f32, f16, bf16)
_UNQUANTIZED = (0, 1, 30)


def plan_swaa(
    path: str,
    swaa: SwaaConfig | Literal[False] | None,
    given: Mapping[str, Override] | None,
    lora: str | os.PathLike[str] | None = None,
) -> tuple[dict[str, Override] | None, SwaaConfig | None]:
    """The `kv_overrides` by which llama.cpp loads the model at `path` under `swaa`, and the settings meant.

    swaa: as `SwaaLlama` takes it; given: the caller's own overrides, which stay in force; lora: a GGUF adapter, whose
    recipe holds where neither they nor the file have one. The settings are None for full attention. Raises
    `ModelFileError`, `UnsupportedModelError`, `ConfigError`, the last also if the adapter was trained under others.
    """
    if not (swaa is None or swaa is False or isinstance(swaa, SwaaConfig)):
        raise ConfigError(f"swaa = {shown(swaa)} must be a SwaaConfig, None for what the file says, or False for none")
    clash = sorted(key for key in given or {} if key.startswith(PREFIX))
    if swaa is not None and clash:
        raise ConfigError(f"kv_overrides has {clash[0]}, and swaa is given too; give SWAA settings in one of them")
    header = read_header(path)
    shards = read_shards(header)
    overrides = dict(given or {})
    adapter = read_lora(lora, shards) if lora else None
    by_file = swaa is None and any(key.startswith(PREFIX) for key in (*header.fields, *overrides))
    if adapter is not None and swaa is None and not by_file:
        swaa = adapter.swaa
    if swaa is False:
        overrides["swaa.enabled"] = False
    elif swaa is not None:
        overrides |= to_kv_overrides(swaa, header.n_layers)
    meant = metadata.effective_config(header, overrides)
    if meant is not None and (refusal := swaa_refusal(header)):
        raise UnsupportedModelError(refusal)
    if meant is not None and swaa:
        meant = dataclasses.replace(meant, recipe=swaa.recipe)
    if adapter is not None:
        adapter.check_recipe(meant, f"give its recipe as settings, instead of those of {path}" if by_file else None)
        if meant is not None:
            meant = dataclasses.replace(meant, adapter=adapter.label)
    return overrides or None, meant


def check_tokenizer(path: str | os.PathLike[str]) -> None:
    """Refuse a model without a tokenizer: llama.cpp aborts the process on the first text. Raises `ModelFileError`."""
    header = read_header(path)
    if header.value("general.type") == "adapter":
        raise ModelFileError(f"{path} is a LoRA adapter, no model; give its base model, and the adapter as lora_path")
    if header.value("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        raise ModelFileError(f"{path} has no tokenizer; convert the model again from a folder that holds its tokenizer")


def check_context(
    *,
    flash_attn: bool,
    n_ctx: int = 512,
    n_batch: int = 512,
    n_ubatch: int = 512,
    type_v: int | None = None,
    **_: Any,
) -> None:
    """Refuse a context that llama.cpp would refuse without a reason or not survive. Raises `ConfigError`."""
    whole_number("n_ctx", n_ctx, 0)
    for name, value in (("n_batch", n_batch), ("n_ubatch", n_ubatch)):
        if not 1 <= whole_number(name, value, 0) <= _MAX_BATCH:
            raise ConfigError(f"{name} = {value} is out of range: 1 to {_MAX_BATCH}")
    if not flash_attn and type_v is not None and type_v not in _UNQUANTIZED:
        raise ConfigError("a quantized V cache (type_v) needs flash attention; leave flash_attn on, or type_v at f16")


def effective_config(native: ModelConfig | None, meant: SwaaConfig | None) -> SwaaConfig | None:
    """The settings that the engine reports, in the form of `SwaaConfig.from_gguf`, with the labels of those meant."""
    if native is None:
        return None
    layers = range(len(native.sliding))
    decode = tuple(layer for layer in layers if native.sliding[layer] and native.fa_decode[layer])
    return SwaaConfig(
        window_size=native.window_size,
        sink_count=native.sink_count,
        fa_layers=tuple(layer for layer in layers if not native.sliding[layer]),
        fa_decode=decode if 0 < len(decode) < sum(native.sliding) else bool(decode),
        recipe=meant.recipe if meant else CUSTOM,
        adapter=meant.adapter if meant else None,
    )
