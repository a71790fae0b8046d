"""Facts about a model in GGUF form, without loading it: its shape, its size, its fitness for SWAA.

    model = read_model("model.gguf"); print(model.n_layers, swaa_refusal(model.header))
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swaa_edge.errors import ModelFileError
from swaa_edge.header import Header, read_header
from swaa_edge.shards import shard_count, shard_paths


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What the engine does not attach to, by what its own graph builds for the architecture. These lists
# only let `annotate` say so early; the engine's loader decides by the graph itself.
_RECURRENT = _names(
    """arwkv7 bailingmoe3 deepseek4 falcon-h1 glm5-next granitehybrid jamba kimi-k3 kimi-linear lfm2 lfm2moe mamba
    mamba2 minimax-01 nemotron_h nemotron_h_moe plamo2 qwen35 qwen35moe qwen3next qwen4exp rwkv6 rwkv6qwen2 rwkv7"""
)
_ENCODERS = _names(
    """bert clip dflash dream eagle3 eurobert gemma-embedding jina-bert-v2 jina-bert-v3 llada llada-moe llama-embed
    modern-bert neo-bert nomic-bert nomic-bert-moe rnd1 t5 t5encoder wavtokenizer-dec"""
)
_OWN_ATTENTION = _names("deepseek32 dots3note glm-dsa hy_v4 minimax-m3")
_OWN_WINDOW = _names(
    """afmoe cohere2 cohere2moe exaone-moe gemma2 gemma3n gemma4 gemma4-assistant gpt-oss granite_swa maple mimo2
    muse-glimmer spark2_5 step35"""
)
# These have a window of their own only where the file gives one. Other architectures ignore that key.
_WINDOW_IF_GIVEN = _names("gemma3 laguna mellum olmo2 plamo3 smallthinker")


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A model's facts. Heads are per layer, since some models vary them; lengths are numbers per head.

    context_length: tokens it was trained for, 0 if the file doesn't say. size: bytes of all its files.
    tensor_types: ggml's name of each type, and how many tensors have it, most frequent first.
    """

    header: Header
    paths: tuple[Path, ...]
    name: str
    architecture: str
    n_layers: int
    n_heads: tuple[int, ...]
    n_kv_heads: tuple[int, ...]
    key_length: int
    value_length: int
    context_length: int
    n_vocab: int
    n_parameters: int
    file_type: str
    tensor_types: dict[str, int]
    size: int


def read_model(path: str | os.PathLike[str]) -> ModelFile:
    """The facts of the model at `path`, all files of a split model included.

    Raises `ModelFileError` if a file of it is missing, cut short, no GGUF or no language model.
    """
    header = read_header(path)
    headers = read_shards(header)
    architecture, n_layers = header.architecture, header.n_layers
    n_heads = _per_layer(header, "attention.head_count", n_layers)
    n_kv_heads = _per_layer(header, "attention.head_count_kv", n_layers, default=n_heads)
    width = _count(header, "embedding_length")
    # llama.cpp's rule where a file leaves the head size out.
    head_size = width // max(n_heads) if max(n_heads, default=0) else 0
    tensors = [tensor for shard in headers for tensor in shard.tensors]
    tokens = header.fields.get("tokenizer.ggml.tokens")
    return ModelFile(
        header=header,
        paths=tuple(shard.path for shard in headers),
        name=str(header.value("general.name", header.path.stem)),
        architecture=architecture,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        key_length=_count(header, "attention.key_length", head_size),
        value_length=_count(header, "attention.value_length", head_size),
        context_length=_count(header, "context_length"),
        n_vocab=tokens.count if tokens else _count(header, "vocab_size"),
        n_parameters=sum(tensor.n_elements for tensor in tensors),
        file_type=_file_type(header),
        tensor_types=_tensor_types(tensor.type for tensor in tensors),
        size=sum(shard.size for shard in headers),
    )


def read_shards(header: Header) -> list[Header]:
    """The headers of all files of a model, the given first one included. Raises `ModelFileError`."""
    headers = [header, *(read_header(path) for path in shard_paths(header)[1:])]
    for number, shard in enumerate(headers):
        if len(headers) > 1 and (shard.value("split.no"), shard_count(shard)) != (number, len(headers)):
            raise ModelFileError(f"{shard.path} is not file {number + 1} of {len(headers)} of its model; get it again")
    return headers


def swaa_refusal(header: Header) -> str | None:
    """Why SWAA can't be applied to the model, as an error's line, or None if nothing speaks against it.

    Judged by the file's metadata alone, so that a model is refused before it is loaded or written.
    """
    reason = _refusal(header)
    return reason and (
        f"{header.path}: SWAA can't be applied to the architecture {header.architecture}, which {reason}; "
        "use a model with plain full attention, such as Llama or Qwen3"
    )


def _refusal(header: Header) -> str | None:
    name = header.architecture

    def given(key: str) -> Any:
        value = header.value(f"{name}.{key}")
        return max(value, default=0) if isinstance(value, tuple) else value

    recurrent_keys = (f"{name}.ssm.", f"{name}.wkv.", f"{name}.shortconv.", f"{name}.kda.")
    if name in _RECURRENT or any(key.startswith(recurrent_keys) for key in header.fields):
        return "has recurrent layers"
    if name in _ENCODERS or given("attention.causal") is False:
        return "is no causal decoder"
    if name in _OWN_ATTENTION or given("attention.key_length_mla"):
        return "has latent or sparse attention of its own"
    window = given("attention.sliding_window")
    if (
        name in _OWN_WINDOW
        or (name in _WINDOW_IF_GIVEN and window)
        or (name == "llama4" and window != 0)
        or (name == "exaone4" and header.n_layers == 64)
    ):
        return "has sliding windows of its own"
    return None


def _count(header: Header, key: str, default: int = 0) -> int:
    value = header.value(f"{header.architecture}.{key}", default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelFileError(f"{header.path}: {header.architecture}.{key} = {value} must be a whole number from 0")
    return value


def _per_layer(header: Header, key: str, n_layers: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    value = header.value(f"{header.architecture}.{key}")
    if value is None:
        return default or (0,) * n_layers
    if not isinstance(value, tuple):
        return (_count(header, key),) * n_layers
    if len(value) != n_layers or not all(isinstance(count, int) and count >= 0 for count in value):
        raise ModelFileError(
            f"{header.path}: {header.architecture}.{key} has {len(value)} elements; "
            f"the model has {n_layers} layers, one whole number for each"
        )
    return value


def _file_type(header: Header) -> str:
    from gguf.constants import LlamaFileType

    code = header.value("general.file_type")
    try:
        return LlamaFileType(code).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "unknown"


def _tensor_types(codes: Iterable[int]) -> dict[str, int]:
    from collections import Counter

    from gguf.constants import GGMLQuantizationType

    names = {int(kind): kind.name for kind in GGMLQuantizationType}
    return {names.get(code, f"type {code}"): count for code, count in Counter(codes).most_common()}
