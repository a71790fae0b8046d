"""A GGUF model on disk: shape, size, SWAA settings, and whether SWAA can be applied.

    model = read_model("model.gguf"); print(model.n_layers, model.swaa(), model.refusal)

A model may be split into several files, named NAME-00001-of-0000N.gguf and so on. The first file holds the metadata.
The engine finds the other files by name. This module finds and checks the same files.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ModelFileError, OutputError
from swaa_edge.files.header import Header, read_header, tensor_data
from swaa_edge.files.weights import fingerprint
from swaa_edge.metadata import effective_config

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Architectures without SWAA support, grouped by the reason. With these lists, `annotate` and `inspect` can refuse a
# model early. The engine's loader decides by llama.cpp's graph.
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
# These architectures have a window of their own only if the file has the key attention.sliding_window.
_WINDOW_IF_GIVEN = _names("gemma3 laguna mellum olmo2 plamo3 smallthinker")


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A model, as described by the headers of its files.

    Any function that takes a model's path also takes a `ModelFile`. The headers are then not read again.

    headers, paths: the headers and paths of all files, in order.
    n_heads, n_kv_heads: the number of heads in each layer.
    key_length, value_length: the number of elements per head.
    context_length: the context length in tokens from training, or 0 if the file has none.
    tensor_types: the number of tensors of each ggml type, by type name, most frequent first.
    size: the total number of bytes of all files.
    """

    headers: tuple[Header, ...]
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

    @property
    def header(self) -> Header:
        """The header of the first file, which holds the metadata."""
        return self.headers[0]

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(header.path for header in self.headers)

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def swaa(self, kv_overrides: Mapping[str, Any] | None = None) -> SwaaConfig | None:
        """See `metadata.read_swaa`."""
        return effective_config(self.header, kv_overrides)

    @property
    def refusal(self) -> str | None:
        """See `swaa_refusal`."""
        return swaa_refusal(self.header)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model has a tokenizer. Without a tokenizer, tokenizing makes llama.cpp abort the process."""
        return self.header.value("tokenizer.ggml.model", "none") not in ("none", "no_vocab")

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `weights.fingerprint`."""
        return file_fingerprint(self.headers)


def read_model(source: str | os.PathLike[str]) -> ModelFile:
    """Read the headers of a model, including all files of a split model.

    source: the path of the (first) file. A `ModelFile` is returned unchanged.

    Raises `ModelFileError` if a file is missing, truncated or not a GGUF, or if the model isn't a language model.
    """
    if isinstance(source, ModelFile):
        return source
    header = read_header(source)
    if header.value("general.type") == "adapter":
        raise ModelFileError(
            f"{header.path} is a LoRA adapter, not a model; give its base model, and the adapter with --lora "
            "(lora_path in Python)"
        )
    headers = read_shards(header)
    architecture, n_layers = header.architecture, header.n_layers
    n_heads = _per_layer(header, "attention.head_count", n_layers)
    width = _count(header, "embedding_length")
    # llama.cpp's rule for files without a head size.
    head_size = width // max(n_heads) if max(n_heads, default=0) else 0
    tensors = [tensor for shard in headers for tensor in shard.tensors]
    tokens = header.fields.get("tokenizer.ggml.tokens")
    return ModelFile(
        headers=tuple(headers),
        name=str(header.value("general.name", header.path.stem)),
        architecture=architecture,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=_per_layer(header, "attention.head_count_kv", n_layers, default=n_heads),
        key_length=_count(header, "attention.key_length", head_size),
        value_length=_count(header, "attention.value_length", head_size),
        context_length=_count(header, "context_length"),
        n_vocab=tokens.count if tokens else _count(header, "vocab_size"),
        n_parameters=sum(tensor.n_elements for tensor in tensors),
        file_type=_file_type(header),
        tensor_types=_tensor_types(tensor.type for tensor in tensors),
        size=sum(shard.size for shard in headers),
    )


def first_header(source: str | os.PathLike[str]) -> Header:
    """Return the header with a model's metadata.

    Raises `ModelFileError` if `source` is a later file of a split model.
    """
    if isinstance(source, ModelFile):
        return source.header
    header = read_header(source)
    _check_first(header)
    return header


def file_fingerprint(headers: Iterable[Header]) -> str:
    """Return the fingerprint of a model or an adapter. See `weights.fingerprint`."""
    return fingerprint(
        (header.path, range(header.tensors_end), [data for _, data in tensor_data(header)]) for header in headers
    )


def read_shards(header: Header) -> list[Header]:
    """Return the headers of all files of a model, given the header of the first file.

    Raises `ModelFileError` if a file is missing, misnamed or part of another model.
    """
    headers = [header, *(read_header(path) for path in _shard_paths(header)[1:])]
    for number, shard in enumerate(headers):
        if len(headers) > 1 and (shard.value("split.no"), _shard_count(shard)) != (number, len(headers)):
            raise ModelFileError(f"{shard.path} is not file {number + 1} of {len(headers)} of its model; get it again")
    return headers


def output_paths(first: str | os.PathLike[str], count: int) -> list[Path]:
    """Return the paths of all `count` files of a model, given the first path.

    Raises `OutputError` if the model is split and the first path isn't named like a split file.
    """
    paths = _split_names(Path(first), count)
    if paths is None:
        name = _shard_name("NAME", 0, count)
        raise OutputError(
            f"the model is split into {count} files, so the output {Path(first).name} must be called {name}"
        )
    return paths


def _shard_paths(header: Header) -> list[Path]:
    _check_first(header)
    count = _shard_count(header)
    paths = _split_names(header.path, count)
    if paths is None:
        name = _shard_name("NAME", 0, count)
        raise ModelFileError(f"{header.path} is the first of {count} files; rename it to {name}, like the others")
    # The first file exists: its header was read.
    for path in paths[1:]:
        if not path.is_file():
            raise ModelFileError(f"{path} is missing; the model has {count} files, which must be in one folder")
    return paths


def _check_first(header: Header) -> None:
    number, count = header.value("split.no", 0), _shard_count(header)
    if count > 1 and number != 0:
        match = _SHARD.fullmatch(header.path.name)
        first = header.path.with_name(_shard_name(match["stem"], 0, count)) if match else "its first file"
        raise ModelFileError(f"{header.path} is file {number + 1} of a split model and has no metadata; give {first}")


def _shard_count(header: Header) -> int:
    count = header.value("split.count", 1)
    return count if isinstance(count, int) and count > 1 else 1


def _split_names(first: Path, count: int) -> list[Path] | None:
    """Return the paths of all `count` files, or None if the name of `first` doesn't fit."""
    if count == 1:
        return [first]
    match = _SHARD.fullmatch(first.name)
    if not match or (int(match["number"]), int(match["count"])) != (1, count):
        return None
    return [first.with_name(_shard_name(match["stem"], number, count)) for number in range(count)]


def _shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def swaa_refusal(header: Header) -> str | None:
    """Return an error line if SWAA can't be applied to the model, or None.

    The check reads only metadata, so the model need not be loaded.
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
        return "is not a causal decoder"
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
            f"it must have one whole number for each of the {n_layers} layers"
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
    from gguf.constants import GGMLQuantizationType

    names = {int(kind): kind.name for kind in GGMLQuantizationType}
    return {names.get(code, f"type {code}"): count for code, count in Counter(codes).most_common()}
