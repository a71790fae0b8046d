"""Settings for loading a model, named as in llama.cpp.

llm = EngineSettings(n_ubatch=256, cache_type="q8_0").load("model.gguf", swaa=None, n_ctx=4096)
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from swaa_edge.config import Configuration
from swaa_edge.errors import ConfigError

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

#: Types of the KV cache, with the numbers of enum ggml_type.
CACHE_TYPES = {"f16": 1, "q8_0": 8}
#: llama.cpp rounds contexts and KV caches up to whole blocks of this size in cells.
CONTEXT_STEP = 256
_BATCH = 512


def round_up(n: int, step: int = CONTEXT_STEP) -> int:
    """Return the smallest multiple of `step` that is at least `n`."""
    return -(-n // step) * step


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Settings for loading a model. Sizes are in tokens. None leaves the choice to the command or to llama.cpp.

    n_batch: number of prompt tokens per llama_decode. None means 512 or n_ubatch, whichever is larger.
    n_ubatch: number of prompt tokens computed together. llama.cpp caps n_ubatch at n_batch.
    cache_type: type of the KV cache, a key of `CACHE_TYPES`.
    lora_path: path of a GGUF adapter.

    Raises `ConfigError` for an unknown cache type.
    """

    n_ctx: int | None = None
    n_batch: int = _BATCH
    n_ubatch: int = 512
    n_threads: int | None = None
    cache_type: str = "f16"
    swa_full: bool = False
    n_gpu_layers: int = -1
    lora_path: str | None = None

    def __post_init__(self) -> None:
        if self.n_batch is None:
            object.__setattr__(self, "n_batch", max(_BATCH, self.n_ubatch))
        if self.cache_type not in CACHE_TYPES:
            raise ConfigError(f"cache_type = {self.cache_type} must be one of {', '.join(CACHE_TYPES)}")

    def kwargs(self, n_ctx: int | None = None) -> dict[str, Any]:
        """Return these settings as arguments of `SwaaLlama`.

        n_ctx: if given, replaces the n_ctx of the settings.
        """
        n_ctx = self.n_ctx if n_ctx is None else n_ctx
        return {
            **({} if n_ctx is None else {"n_ctx": n_ctx}),
            "n_batch": self.n_batch,
            "n_ubatch": self.n_ubatch,
            "n_threads": self.n_threads,
            "n_threads_batch": self.n_threads,
            "type_k": CACHE_TYPES[self.cache_type],
            "type_v": CACHE_TYPES[self.cache_type],
            "swa_full": self.swa_full or None,
            "n_gpu_layers": self.n_gpu_layers,
            "lora_path": self.lora_path,
        }

    def load(
        self,
        model: Any,
        *,
        swaa: Configuration | None,
        n_ctx: int,
        kind: type[SwaaLlama] | None = None,
        **more: Any,
    ) -> SwaaLlama:
        """Load a model, with llama.cpp's log off.

        model: a path or a `ModelFile`.
        n_ctx: context size in tokens.
        kind: a subclass to create instead of SwaaLlama.
        more: further arguments of the class.
        """
        from swaa_edge.llama import SwaaLlama  # here, because settings alone don't need llama_cpp

        return (kind or SwaaLlama)(model, swaa=swaa, **self.kwargs(n_ctx), verbose=False, **more)
