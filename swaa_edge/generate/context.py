"""How large a context to make: just large enough for one prompt, or a usual size for a conversation.

n_ctx = fitting_context("model.gguf", n_prompt=4000, n_new=128)
"""

from __future__ import annotations

import os

from swaa_edge.errors import GenerationError
from swaa_edge.files.model import read_model

#: Tokens. The whole context that a model was trained for can take tens of gigabytes of K and V.
DEFAULT_CONTEXT = 16384


def fitting_context(model: str | os.PathLike[str], n_prompt: int, n_new: int, requested: int | None = None) -> int:
    """The context for `n_prompt` + `n_new` tokens: exactly that, or `requested`.

    Raises `GenerationError` if `requested`, or else the context that the model was trained for, is too small.
    """
    needed = n_prompt + n_new
    if requested is not None:
        if requested < needed:
            raise GenerationError(
                f"--ctx {requested} is too small for {n_prompt} prompt tokens and {n_new} new ones; it takes {needed}"
            )
        return requested
    trained = read_model(model).context_length
    if trained and needed > trained:
        raise GenerationError(
            f"{n_prompt} prompt tokens and {n_new} new ones exceed the {trained} that the model was trained for; "
            f"shorten the prompt, lower -n, or exceed the training context with --ctx {needed}"
        )
    return needed


def conversation_context(model: str | os.PathLike[str], requested: int | None = None) -> int:
    """The context for a conversation: `requested`, or what `model` was trained for up to `DEFAULT_CONTEXT`."""
    if requested is not None:
        return requested
    return min(read_model(model).context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
