"""LoRA adapters in GGUF form: the recipe of an adapter, and checks before llama.cpp loads the adapter.

    adapter = read_lora("my-adapter.gguf", "model.gguf"); adapter.check_recipe(config)

llama.cpp's own checks are not enough:

- If llama.cpp refuses an adapter, only the log states the reason.
- If a key has the wrong type, llama.cpp aborts the process.
- llama.cpp doesn't check recipes. Under another recipe, an adapter silently gives worse answers.
"""

from __future__ import annotations

import dataclasses
import functools
import os

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ModelFileError, UnsupportedModelError
from swaa_edge.files import lora_training as training
from swaa_edge.files.header import Header, Tensor, read_header
from swaa_edge.files.model import file_fingerprint, read_model
from swaa_edge.metadata import effective_config

# The type of each key that llama.cpp reads. For another type, llama.cpp aborts the process.
_KEYS = {
    "general.type": "string",
    "general.architecture": "string",
    "adapter.type": "string",
    "adapter.lora.alpha": "float32",
}
_ALORA = "adapter.alora.invocation_tokens"
_A, _B = ".lora_a", ".lora_b"
_TOKENS, _OUTPUT = "token_embd.weight", "output.weight"
# Codes of the types that ggml can't multiply by: integers and float64.
_NOT_MULTIPLIED = frozenset([24, 25, 26, 27, 28])
_ADVICE = "give the adapter that was made for this model"


@dataclasses.dataclass(frozen=True)
class LoraAdapter:
    """An adapter that fits a model of `n_layers` layers.

    swaa: the adapter's recipe, or None if the file has none.
    """

    header: Header
    label: str
    swaa: SwaaConfig | None
    n_layers: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `weights.fingerprint`."""
        return file_fingerprint([self.header])

    def check_recipe(self, requested: SwaaConfig | None, advice: str | None = None) -> None:
        """Raise `ConfigError` if `requested` differs from the adapter's recipe in some layer.

        requested: settings, or None for full attention.
        advice: end of the error message, about how to resolve the conflict.

        An adapter without a recipe accepts all settings.
        """
        if self.swaa is not None:
            training.check_recipe(self.swaa, requested, self.n_layers, self.label, advice or training.ADVICE)


def read_lora(path: str | os.PathLike[str], model: str | os.PathLike[str]) -> LoraAdapter:
    """Read a LoRA adapter, and check that the adapter fits a model.

    path: the adapter's GGUF file.
    model: the path of a GGUF model, or a `ModelFile`.

    Raises `ModelFileError` if the file can't be read, isn't a LoRA adapter or has wrong SWAA keys. Raises
    `UnsupportedModelError` if the adapter doesn't fit the model, or if llama.cpp can't apply the adapter correctly.
    """
    model = read_model(model)
    header = read_header(path)
    for key, kind in _KEYS.items():
        if key in header.fields and header.fields[key].type != kind:
            raise ModelFileError(f"{path}: {key} has the type {header.fields[key].type}; it must be {kind}")
    if header.value("general.type") != "adapter" or header.value("adapter.type") != "lora":
        raise ModelFileError(
            f"{path} is not a LoRA adapter; make one with: "
            "swaa-edge convert HF_DIR -o FILE.gguf --lora DIR --adapter-only"
        )
    if _ALORA in header.fields:
        raise UnsupportedModelError(f"{path} is an aLoRA, which only applies after certain tokens; use a plain LoRA")
    base = model.header
    if header.architecture != base.architecture:
        raise _unfit(header, base, f"it is for the architecture {header.architecture}, not {base.architecture}")
    n_layers = header.value(f"{header.architecture}.block_count", base.n_layers)
    if n_layers != base.n_layers:
        raise _unfit(header, base, f"it is for {n_layers} layers, but the model has {base.n_layers}")
    _check_tensors(header, base, {tensor.name: tensor.shape for file in model.headers for tensor in file.tensors})
    label = header.value("swaa.adapter")
    if label is not None and label == base.value("swaa.adapter"):
        raise UnsupportedModelError(f"{base.path} already has the adapter {label} in its weights; leave {path} out")
    label = header.path.name if label is None else str(label)
    return LoraAdapter(header, label, effective_config(header), base.n_layers)


def _check_tensors(header: Header, base: Header, weights: dict[str, tuple[int, ...]]) -> None:
    """Check the LoRA matrices against the model's weights. llama.cpp would read some wrong shapes out of bounds."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for tensor in header.tensors:
        name, matrix = tensor.name[: -len(_A)], tensor.name[-len(_A) :]
        if matrix in (_A, _B):
            pairs.setdefault(name, {})[matrix] = tensor
        elif not tensor.name.endswith("_norm.weight"):  # llama.cpp ignores norms
            raise ModelFileError(f"{header.path} holds {tensor.name}, which is not a LoRA matrix; convert it again")
    if not pairs:
        raise ModelFileError(f"{header.path} holds no LoRA matrices; convert it again")
    for name, pair in sorted(pairs.items()):
        if missing := {_A, _B} - pair.keys():
            raise ModelFileError(f"{header.path} lacks {name}{missing.pop()}; convert it again")
        if name not in weights:
            raise _unfit(header, base, f"the model has no {name}")
        if bad := next((tensor for tensor in pair.values() if tensor.type in _NOT_MULTIPLIED), None):
            raise ModelFileError(f"{header.path}: {bad.name} has the ggml type {bad.type}; convert the adapter as f16")
        a, b, weight = (_four(shape) for shape in (pair[_A].shape, pair[_B].shape, weights[name]))
        if name == _TOKENS:
            # llama.cpp looks up the rows of A by token, so A is stored transposed.
            fits = (b[1], a[1], a[0]) == (weight[0], weight[1], b[0])
        else:
            fits = (a[0], b[1], a[1]) == (weight[0], weight[1], b[0]) and a[2:] == b[2:] == weight[2:]
        if not fits or min(a + b) < 1:
            sizes = ", ".join(map(_shown, (a, b)))
            raise _unfit(header, base, f"its matrices for {name} are {sizes}, the weight is {_shown(weight)}")
    if _TOKENS in pairs and _OUTPUT not in weights:
        raise UnsupportedModelError(
            f"{header.path} changes the embeddings, which {base.path} also uses as its output matrix; llama.cpp "
            "doesn't support that, so merge the adapter into the model instead"
        )


def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1, 1, 1, 1)[:4]


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)).removesuffix("x1").removesuffix("x1")


def _unfit(header: Header, base: Header, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the LoRA adapter {header.path} doesn't fit {base.path}: {why}; {_ADVICE}")
