"""Describe a model file, the SWAA settings and the size of the KV cache, for `swaa-edge inspect`.

describe("model.gguf")["kv_memory"]
"""

from __future__ import annotations

import os
from typing import Any

from swaa_edge.config import SwaaConfig
from swaa_edge.engine.settings import CACHE_TYPES
from swaa_edge.errors import ConfigError
from swaa_edge.files.model import ModelFile, read_model
from swaa_edge.kvsize import kv_size, layer_kinds
from swaa_edge.metadata import VERSION

#: Context sizes for which the memory is computed.
CONTEXTS = {"8k": 8192, "32k": 32768, "128k": 131072}


def describe(model: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a description of `model` as plain JSON values. Sizes are in bytes. Only the metadata are read.

    "swaa": the SWAA settings, or None for a file without SWAA keys.
    "layers": the kind of each layer, one of `kvsize.KINDS`.
    "kv_memory": the bytes of the KV cache, with one row for each context size.

    Raises `ModelFileError`.
    """
    model = read_model(model)
    swaa = model.swaa()
    return {
        "file": str(model.path),
        "files": len(model.paths),
        "size": model.size,
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "parameters": model.n_parameters,
            "file_type": model.file_type,
            "tensor_types": model.tensor_types,
            "layers": model.n_layers,
            "heads": _one_or_all(model.n_heads),
            "kv_heads": _one_or_all(model.n_kv_heads),
            "key_length": model.key_length,
            "value_length": model.value_length,
            "context_length": model.context_length,
            "vocabulary": model.n_vocab,
            "swaa_refusal": model.refusal,
        },
        "swaa": None if swaa is None else {"version": VERSION, **swaa.to_dict()},
        "layers": layer_kinds(swaa, model.n_layers),
        "kv_memory": [_kv_memory(model, swaa, n_ctx) for n_ctx in CONTEXTS.values()],
    }


def _kv_memory(model: ModelFile, swaa: SwaaConfig | None, n_ctx: int) -> dict[str, Any]:
    """Return the bytes of the KV cache for each cache type, or None for a type that the model can't use.

    Each type has the bytes per kind of layer, the sum ("total"), and the sum without rings ("total_swa_full").
    """
    memory: dict[str, Any] = {"context": n_ctx, "ring_cells": kv_size(model, swaa, n_ctx=n_ctx).ring_cells}
    for kind in CACHE_TYPES:
        try:
            size, full = (
                kv_size(model, swaa, n_ctx=n_ctx, type_k=kind, type_v=kind, swa_full=swa_full)
                for swa_full in (False, True)
            )
        except ConfigError:
            memory[kind] = None
        else:
            memory[kind] = {**size.bytes, "total": size.total, "total_swa_full": full.total}
    return memory


def _one_or_all(counts: tuple[int, ...]) -> int | list[int]:
    return counts[0] if len(set(counts)) == 1 else list(counts)
