"""Compute the exact size of a context's KV cache, by kind of layer, before the context is created.

Layers with full attention in prefill or decode keep K and V of the whole context. All other layers keep a ring buffer:
cells for the window, the sinks and one ubatch.

    size = kv_size(read_model("model.gguf"), SwaaConfig(2048, 64), n_ctx=32768); print(size.total, size.ring_cells)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from swaa_edge.config import SwaaConfig
from swaa_edge.engine.settings import round_up
from swaa_edge.errors import ConfigError
from swaa_edge.files.header import Header
from swaa_edge.files.model import ModelFile

#: Kinds of layers: full attention, sliding with FA decode, and sliding without FA decode.
FA, SLIDING_FA_DECODE, SLIDING = "fa", "sliding_fa_decode", "sliding"
KINDS = (FA, SLIDING_FA_DECODE, SLIDING)

# The engine makes no ring if a token has several positions. In the second set, a token has several positions only if
# the file gives rope.dimension_sections.
_MULTI_POSITION = frozenset(
    ["paddleocr", "qwen2vl", "qwen35", "qwen35moe", "qwen3tts", "qwen3vl", "qwen3vlmoe", "qwen4exp"]
)
_MULTI_POSITION_IF_GIVEN = frozenset(["dflash", "glm4", "glm4moe", "hunyuan_vl"])


@dataclasses.dataclass(frozen=True)
class KVSize:
    """The size of a KV cache.

    bytes: bytes of K and V in total for each kind of layer.
    full_cells: number of cells (tokens) per stream in a layer without a ring.
    ring_cells: number of cells per stream in a ring, or 0 if no layer has a ring.
    """

    bytes: Mapping[str, int]
    full_cells: int
    ring_cells: int
    streams: int

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def layer_kinds(swaa: SwaaConfig | None, n_layers: int) -> list[str]:
    """Return the kind of each layer, one of `KINDS`. `swaa` is None for full attention."""
    if swaa is None:
        return [FA] * n_layers
    return [
        SLIDING_FA_DECODE if decodes else SLIDING if slides else FA
        for slides, decodes in zip(swaa.sliding_layers(n_layers), swaa.fa_decode_layers(n_layers), strict=True)
    ]


def kv_size(
    model: ModelFile,
    swaa: SwaaConfig | None,
    *,
    n_ctx: int,
    n_batch: int | None = None,
    n_ubatch: int = 512,
    n_seq_max: int = 1,
    kv_unified: bool = False,
    type_k: str | int = "f16",
    type_v: str | int = "f16",
    swa_full: bool = False,
    flash_attn: bool = True,
) -> KVSize:
    """Return the size of the KV cache that llama.cpp allocates for `model` under `swaa`.

    n_ctx: context size in tokens, or 0 for the model's own context length.
    n_batch: batch size in tokens, by default n_ubatch.
    type_k, type_v: names or numbers of ggml types.
    swa_full: whether every layer keeps the whole context, without rings.

    Raises `ConfigError` for a type that doesn't exist or doesn't fit the model's heads.
    """
    n_ctx = n_ctx or model.context_length
    n_ubatch = min(n_ctx, n_ubatch if n_batch is None else n_batch, n_ubatch)
    streams = 1 if kv_unified else n_seq_max
    full_cells = round_up(round_up(n_ctx) // streams)
    kinds = layer_kinds(swaa, model.n_layers)
    ring_cells = 0
    if swaa is not None and SLIDING in kinds and not swa_full and not _several_positions(model.header):
        needed = round_up((n_seq_max if kv_unified else 1) * swaa.reach + n_ubatch)
        ring_cells = needed if needed < full_cells else 0

    # The last layers of some models predict further tokens. The engine doesn't run such layers.
    cached = range(model.n_layers - int(model.header.value(f"{model.architecture}.nextn_predict_layers", 0)))
    # Without flash attention, V is stored transposed. Every layer's V then has the width of the widest layer.
    widest = max(model.n_kv_heads, default=0)
    sizes = dict.fromkeys(KINDS, 0)
    for layer in cached:
        heads = model.n_kv_heads[layer]
        row = heads * _head_bytes("type_k", type_k, model.key_length)
        row += (heads if flash_attn else widest) * _head_bytes("type_v", type_v, model.value_length)
        in_ring = ring_cells and kinds[layer] == SLIDING
        sizes[kinds[layer]] += row * streams * (ring_cells if in_ring else full_cells)
    return KVSize(sizes, full_cells, ring_cells, streams)


def _head_bytes(name: str, kind: str | int, length: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[
            GGMLQuantizationType[kind.upper()] if isinstance(kind, str) else GGMLQuantizationType(kind)
        ]
    except (KeyError, ValueError):
        raise ConfigError(f"{name} = {kind} is not a ggml type; use f16, q8_0 or q4_0") from None
    if length % block:
        raise ConfigError(
            f"{name} = {kind} has blocks of {block} numbers, but a head has {length}, which is not a multiple; use f16"
        )
    return length // block * size


def _several_positions(header: Header) -> bool:
    name = header.architecture
    sections = header.value(f"{name}.rope.dimension_sections", ())
    given = len(sections) > 1 and min(sections[:2]) > 0
    return name in _MULTI_POSITION or (name in _MULTI_POSITION_IF_GIVEN and given)
