"""Check arguments before a model is loaded. A mistake gives one clear error line instead of an abort in C.

The checks need neither llama_cpp nor the native library.

    resolved = resolve_swaa("model.gguf", SwaaConfig.from_recipe("balanced")); print(resolved.config)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from swaa_edge.config import Configuration, SwaaConfig
from swaa_edge.errors import ConfigError, ModelFileError, UnsupportedModelError
from swaa_edge.files.lora_gguf import read_lora
from swaa_edge.files.model import read_model
from swaa_edge.layers import shown, whole_number
from swaa_edge.metadata import PREFIX, to_kv_overrides

Override = bool | int | float | str
# Upstream keeps a list per batch row. In a long context, each list is a memory mapping of its own.
_MAX_BATCH = 1 << 14
# GGML_MAX_N_THREADS
_MAX_THREADS = 512
# Unquantized types of a KV cache (f32, f16, bf16) in enum ggml_type
_UNQUANTIZED = (0, 1, 30)


@dataclasses.dataclass(frozen=True)
class ResolvedSwaa:
    """Settings for a load.

    kv_overrides: the overrides to pass to llama.cpp, or None.
    config: the SWAA settings in effect, or None for full attention.
    """

    kv_overrides: dict[str, Override] | None
    config: SwaaConfig | None


def resolve_swaa(
    model: str | os.PathLike[str],
    swaa: Configuration | None,
    kv_overrides: Mapping[str, Override] | None = None,
    lora: str | os.PathLike[str] | None = None,
) -> ResolvedSwaa:
    """Combine all sources of settings.

    model: a path or a `ModelFile`.
    swaa: as for `SwaaLlama`.
    kv_overrides: the caller's overrides. The result contains the overrides too.
    lora: a GGUF adapter. The adapter's recipe applies if no other source has settings.

    Raises `ConfigError`, for example if the adapter was trained under other settings. Also raises `ModelFileError` and
    `UnsupportedModelError`.
    """
    if not (swaa is None or swaa is False or isinstance(swaa, SwaaConfig)):
        raise ConfigError(
            f"swaa = {shown(swaa)} must be a SwaaConfig, None for the settings in the file, or False for full attention"
        )
    overrides = dict(kv_overrides or {})
    clash = sorted(key for key in overrides if key.startswith(PREFIX))
    if swaa is not None and clash:
        raise ConfigError(f"kv_overrides has {clash[0]}, and swaa is given too; give SWAA settings in one of them")
    model = read_model(model)
    adapter = read_lora(lora, model) if lora else None
    by_file = swaa is None and any(key.startswith(PREFIX) for key in (*model.header.fields, *overrides))
    if adapter is not None and swaa is None and not by_file:
        swaa = adapter.swaa
    if swaa is False:
        overrides["swaa.enabled"] = False
    elif swaa is not None:
        overrides |= to_kv_overrides(swaa, model.n_layers)
    config = model.swaa(overrides)
    if config is not None and model.refusal:
        raise UnsupportedModelError(model.refusal)
    if config is not None and swaa:
        config = dataclasses.replace(config, recipe=swaa.recipe)
    if adapter is not None:
        adapter.check_recipe(config, f"give its recipe as settings, instead of those of {model}" if by_file else None)
        if config is not None:
            config = dataclasses.replace(config, adapter=adapter.label)
    return ResolvedSwaa(overrides or None, config)


def check_tokenizer(model: str | os.PathLike[str]) -> None:
    """Raise `ModelFileError` for a model without a tokenizer. llama.cpp would abort the process at the first text."""
    model = read_model(model)
    if not model.has_tokenizer:
        raise ModelFileError(
            f"{model} has no tokenizer; convert the model again from a folder that holds its tokenizer"
        )


def check_context(
    *,
    flash_attn: bool,
    n_ctx: int = 512,
    n_batch: int = 512,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_threads_batch: int | None = None,
    type_v: int | None = None,
    **_: Any,
) -> None:
    """Check a context's arguments. Some values crash llama.cpp, and others make it fail without a reason.

    Raises `ConfigError`.
    """
    whole_number("n_ctx", n_ctx, 0)
    for name, value in (("n_batch", n_batch), ("n_ubatch", n_ubatch)):
        if not 1 <= whole_number(name, value, 0) <= _MAX_BATCH:
            raise ConfigError(f"{name} = {value} is out of range: 1 to {_MAX_BATCH}")
    for name, value in (("n_threads", n_threads), ("n_threads_batch", n_threads_batch)):
        if value is not None and whole_number(name, value, 0) > _MAX_THREADS:
            raise ConfigError(f"{name} = {value} is out of range: 1 to {_MAX_THREADS}")
    if not flash_attn and type_v is not None and type_v not in _UNQUANTIZED:
        raise ConfigError(
            "a quantized V cache (type_v) needs flash attention; leave flash_attn on, or use type_v = f16"
        )


def labelled(reported: SwaaConfig | None, expected: SwaaConfig | None) -> SwaaConfig | None:
    """Return `reported` with the recipe and adapter labels of `expected`."""
    if reported is None or expected is None:
        return reported
    return dataclasses.replace(reported, recipe=expected.recipe, adapter=expected.adapter)
