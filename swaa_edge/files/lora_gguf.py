"""A LoRA adapter in GGUF form: whether it fits a model, and what recipe it was trained under, before C sees it.

llama.cpp's loader says in its log alone why it takes no adapter, ends the process for a key of another type, and
knows nothing of recipes: an adapter under another one than its own gives worse answers without a word.

    adapter = read_lora("my-adapter.gguf", [read_header("model.gguf")]); adapter.check_recipe(config)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from swaa_edge import metadata
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ModelFileError, UnsupportedModelError
from swaa_edge.files import lora_training as training
from swaa_edge.files.header import Header, Tensor, read_header

# What llama.cpp reads of an adapter, and the type without which it ends the process.
_KEYS = {
    "general.type": "string",
    "general.architecture": "string",
    "adapter.type": "string",
    "adapter.lora.alpha": "float32",
}
_ALORA = "adapter.alora.invocation_tokens"
_A, _B = ".lora_a", ".lora_b"
_TOKENS, _OUTPUT = "token_embd.weight", "output.weight"
# Numbers of ggml's types that no matrix can have in a product: whole numbers, and float64.
_NO_FACTORS = frozenset([24, 25, 26, 27, 28])
_ADVICE = "give the adapter that was made for this model"


@dataclasses.dataclass(frozen=True)
class LoraAdapter:
    """An adapter that fits a model of `n_layers` layers. swaa: its recipe, None if the file has none."""

    path: Path
    label: str
    swaa: SwaaConfig | None
    n_layers: int

    def check_recipe(self, wanted: SwaaConfig | None, advice: str | None = None) -> None:
        """Raise `ConfigError` if it has a recipe and `wanted` (None: full attention) is another for some layer.

        advice: what to do about it, as the end of the error.
        """
        if self.swaa is not None:
            training.check_recipe(self.swaa, wanted, self.n_layers, self.label, advice or training.ADVICE)


def read_lora(path: str | os.PathLike[str], model: Sequence[Header]) -> LoraAdapter:
    """The adapter in the GGUF file `path`, for the model whose files have the headers `model`, the first one first.

    Raises `ModelFileError` if it can't be read, is no LoRA adapter or has wrong SWAA keys, `UnsupportedModelError` if
    it doesn't fit the model or llama.cpp can't apply it as it was meant.
    """
    header = read_header(path)
    for key, kind in _KEYS.items():
        if key in header.fields and header.fields[key].type != kind:
            raise ModelFileError(f"{path}: {key} has the type {header.fields[key].type}; it must be {kind}")
    if header.value("general.type") != "adapter" or header.value("adapter.type") != "lora":
        raise ModelFileError(
            f"{path} is no LoRA adapter; make one with: swaa-edge convert HF_DIR -o FILE.gguf --lora DIR --adapter-only"
        )
    if _ALORA in header.fields:
        raise UnsupportedModelError(f"{path} is an aLoRA, which applies behind certain tokens only; use a plain LoRA")
    base = model[0]
    if header.architecture != base.architecture:
        raise _unfit(header, base, f"it is for the architecture {header.architecture}, not {base.architecture}")
    n_layers = header.value(f"{header.architecture}.block_count", base.n_layers)
    if n_layers != base.n_layers:
        raise _unfit(header, base, f"it is for {n_layers} layers, the model has {base.n_layers}")
    _check_tensors(header, base, {tensor.name: tensor.shape for shard in model for tensor in shard.tensors})
    label = header.value("swaa.adapter")
    if label is not None and label == base.value("swaa.adapter"):
        raise UnsupportedModelError(f"{base.path} carries the adapter {label} in its weights; leave {path} out")
    swaa = metadata.effective_config(header)
    return LoraAdapter(header.path, header.path.name if label is None else str(label), swaa, base.n_layers)


def failure(error: BaseException, path: str | os.PathLike[str] | None) -> BaseException:
    """The error to raise for one that came up while the adapter at `path` was loaded; `error` itself for others."""
    if isinstance(error, RuntimeError) and "LoRA adapter from lora path" in str(error):
        return ModelFileError(f"llama.cpp can't load the LoRA adapter {path}; load it with verbose=True to see why")
    return error


def _check_tensors(header: Header, base: Header, weights: dict[str, tuple[int, ...]]) -> None:
    """Refuse matrices that llama.cpp would refuse, or compute with past their ends. Raises `UnsupportedModelError`."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for tensor in header.tensors:
        name, matrix = tensor.name[: -len(_A)], tensor.name[-len(_A) :]
        if matrix in (_A, _B):
            pairs.setdefault(name, {})[matrix] = tensor
        elif not tensor.name.endswith("_norm.weight"):  # llama.cpp passes over those
            raise ModelFileError(f"{header.path} holds {tensor.name}, which is no matrix of a LoRA; convert it again")
    if not pairs:
        raise ModelFileError(f"{header.path} holds no matrices of a LoRA; convert it again")
    for name, pair in sorted(pairs.items()):
        if missing := {_A, _B} - pair.keys():
            raise ModelFileError(f"{header.path} lacks {name}{missing.pop()}; convert it again")
        if name not in weights:
            raise _unfit(header, base, f"the model has no {name}")
        if bad := next((tensor for tensor in pair.values() if tensor.type in _NO_FACTORS), None):
            raise ModelFileError(f"{header.path}: {bad.name} has the type {bad.type} of ggml; convert it as f16")
        a, b, weight = (_four(shape) for shape in (pair[_A].shape, pair[_B].shape, weights[name]))
        if name == _TOKENS:
            # Its A is looked up by token, and so lies the other way round.
            fits = (b[1], a[1], a[0]) == (weight[0], weight[1], b[0])
        else:
            fits = (a[0], b[1], a[1]) == (weight[0], weight[1], b[0]) and a[2:] == b[2:] == weight[2:]
        if not fits or min(a + b) < 1:
            sizes = ", ".join(map(_shown, (a, b)))
            raise _unfit(header, base, f"its matrices for {name} are {sizes}, the weight is {_shown(weight)}")
    if _TOKENS in pairs and _OUTPUT not in weights:
        raise UnsupportedModelError(
            f"{header.path} changes the embeddings, which {base.path} uses for its output too, and llama.cpp can't do "
            "that; merge the adapter into the model instead"
        )


def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1, 1, 1, 1)[:4]


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)).removesuffix("x1").removesuffix("x1")


def _unfit(header: Header, base: Header, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the LoRA adapter {header.path} doesn't fit {base.path}: {why}; {_ADVICE}")
