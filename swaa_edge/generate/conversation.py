"""A conversation with a model, in the chat template of the model file.

Each turn sends the whole conversation. The part in the KV cache is not computed again.

    Conversation(llm, system="Be brief.").ask("What is a KV cache?", on_text=print)
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jinja2

from swaa_edge.errors import GenerationError
from swaa_edge.files.model import read_model

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

#: Maximum default context in tokens. The full training context of a model can take tens of gigabytes of KV cache.
DEFAULT_CONTEXT = 16384


class Conversation:
    """The messages of a conversation. `ask` adds a question and the answer.

    max_tokens: maximum length of one answer in tokens. By default, the context is the limit.
    sampling: arguments of create_chat_completion. Each answer gets a new seed, derived from the seed in `sampling`.
    """

    def __init__(
        self,
        llm: SwaaLlama,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self._llm, self._system, self._max_tokens = llm, system, max_tokens
        self._sampling = dict(sampling or {})
        seed = self._sampling.pop("seed", None)
        self._seeds = random.Random(seed) if seed is not None else random.SystemRandom()
        self.messages: list[dict[str, str]] = []
        self.clear()

    def clear(self) -> None:
        """Delete all messages except the system prompt."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, question: str, on_text: Callable[[str], object] = lambda text: None) -> str:
        """Return the answer to `question`.

        on_text: function that is called with each generated piece of text.

        The text of an interrupted answer stays in the conversation.

        Raises `GenerationError` if the conversation exceeds the context or the chat template refuses the conversation.
        The question is then removed.
        """
        self.messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        try:
            self._generate(pieces, on_text)
        except (ValueError, jinja2.TemplateError) as error:
            # llama_cpp raises ValueError for a long prompt. The template raises TemplateError or ValueError.
            pieces.clear()
            if "exceed context window" in str(error):
                size = self._llm.n_ctx()
                problem = f"the conversation is longer than the context of {size} tokens; /clear it, or raise --ctx"
            else:
                problem = f"the model's chat template refuses this conversation: {error}"
            raise GenerationError(problem) from error
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()
        return "".join(pieces)

    def _generate(self, pieces: list[str], on_text: Callable[[str], object]) -> None:
        sampling = self._sampling | {"seed": self._seeds.randrange(2**32 - 1)}
        chunks = self._llm.create_chat_completion(self.messages, max_tokens=self._max_tokens, stream=True, **sampling)
        for chunk in chunks:
            if piece := chunk["choices"][0]["delta"].get("content"):
                pieces.append(piece)
                on_text(piece)


def conversation_context(model: str | os.PathLike[str], requested: int | None = None) -> int:
    """Return `requested`, or by default the model's training context, but not more than `DEFAULT_CONTEXT`."""
    if requested is not None:
        return requested
    return min(read_model(model).context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
