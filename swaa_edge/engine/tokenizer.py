"""Tokenize a text without loading the model's weights.

Loading a model fixes the context size, so a prompt's token count must be known before.

    tokens = tokenize("model.gguf", "Once upon a time")
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from swaa_edge import native
from swaa_edge.engine.preflight import check_tokenizer
from swaa_edge.errors import ModelFileError


@contextlib.contextmanager
def open_vocabulary(model: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield the vocabulary of `model` as llama_cpp's own `LlamaModel`.

    model: a path or a `ModelFile`. SWAA keys in the file are ignored.

    Raises `ModelFileError` if the file isn't a valid GGUF or has no vocabulary.
    """
    llama_cpp = native.load()
    check_tokenizer(model)
    off = (llama_cpp.llama_model_kv_override * 2)()  # an empty entry ends the list
    off[0].key, off[0].tag = b"swaa.enabled", llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL
    params = llama_cpp.llama_model_default_params()
    params.vocab_only, params.kv_overrides = True, off
    # llama_cpp.Llama would also make a context, and warn about the missing weights.
    from llama_cpp._internals import LlamaModel

    try:
        vocabulary = LlamaModel(path_model=os.fspath(model), params=params, verbose=False)
    except ValueError as error:
        raise ModelFileError(f"{model} has no vocabulary that llama.cpp can read; convert the model again") from error
    try:
        yield vocabulary
    finally:
        vocabulary.close()


def tokenize(model: str | os.PathLike[str], text: str) -> list[int]:
    """Return the tokens of `text`. Special tokens in `text` are recognized.

    If the model uses a start token, the result begins with the start token. Errors are as in `open_vocabulary`.
    """
    with open_vocabulary(model) as vocabulary:
        return vocabulary.tokenize(text.encode("utf-8"), add_bos=True, special=True)
