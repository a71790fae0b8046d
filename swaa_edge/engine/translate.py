"""Translate llama_cpp's errors into ours, with one clear line each.

raise decode_failure(error, tokens, n_vocab=32000, n_ctx=4096) from error
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jinja2

from swaa_edge import native
from swaa_edge.errors import ConfigError, GenerationCancelled, GenerationError, ModelFileError


def load_failure(error: BaseException, path: str, lora: str | None = None) -> BaseException:
    """Return our error for a failed load of the model `path` with the adapter `lora`. Other errors are returned
    unchanged."""
    text = " ".join(str(error).split())
    if isinstance(error, jinja2.TemplateError):
        return ModelFileError(f"{path} has a chat template that is not valid Jinja: {text}")
    if isinstance(error, ValueError) and text.startswith("Failed to load model"):
        why = "load it with verbose=True to see why"
        return ModelFileError(native.last_error() or f"llama.cpp can't load {path}; {why}")
    if isinstance(error, ValueError) and text.startswith("Failed to create llama_context"):
        why = "llama.cpp can't make the context: too little memory? lower n_ctx"
        return ConfigError(native.last_error() or why)
    if isinstance(error, RuntimeError) and "LoRA adapter from lora path" in str(error):
        return ModelFileError(f"llama.cpp can't load the LoRA adapter {lora}; load it with verbose=True to see why")
    return error


def decode_failure(error: RuntimeError, tokens: Sequence[int], *, n_vocab: int, n_ctx: int) -> RuntimeError:
    """Return our error for a failed llama_decode of `tokens`. Other errors are returned unchanged."""
    found = re.search(r"llama_decode returned (-?\d+)", str(error))
    if found is None:
        return error
    code, count = int(found[1]), len(tokens)
    if code == 2:
        return GenerationCancelled("cancelled")
    if code == 1:
        return GenerationError(f"the context of {n_ctx} tokens has no room for {count} more; raise n_ctx")
    if code == -1 and not all(0 <= token < n_vocab for token in tokens):
        return GenerationError(f"the engine refused {count} tokens; each must be from 0 to {n_vocab - 1}")
    # If the batch was not refused, the last error may be an older one.
    why = native.last_error() if code == -1 else ""
    return GenerationError(why or f"the engine failed (llama_decode returned {code}); too little memory?")
