"""Loads Hugging Face models and tokenizers from disk. Errors have one line, and transformers prints nothing.

model = load(transformers.AutoModelForCausalLM, "Qwen3-4B", dtype="auto")

Importing this module imports torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from swaa_edge.errors import ModelFileError


def load(kind: Any, folder: str | os.PathLike[str], **options: Any) -> Any:
    """Load a model, a tokenizer or a configuration from a Hugging Face model directory.

    kind: a class of transformers, such as AutoTokenizer.
    options: arguments of `kind.from_pretrained`.

    Raises `ModelFileError` if loading fails.
    """
    try:
        with quiet(), contextlib.redirect_stdout(None):
            return kind.from_pretrained(os.fspath(folder), local_files_only=True, **options)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError) as error:
        raise ModelFileError(f"transformers can't load {os.fspath(folder)}: {one_line(error)}") from error


def context_length(folder: str | os.PathLike[str]) -> int | None:
    """Return the context length in tokens from the model's configuration, or None if there is none.

    Raises `ModelFileError` if the configuration can't be loaded.
    """
    config = load(transformers.AutoConfig, folder)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def out_of_memory(error: Exception) -> bool:
    """Return whether torch raised `error` because memory ran out.

    Torch has an error class for lack of GPU memory. Lack of CPU memory shows only in the error message.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def one_line(error: Exception) -> str:
    """The message of `error` in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
