"""The turns of a conversation with a model, in the chat template of its file.

Each turn sends the whole conversation; the part that is already in the KV cache is not computed again.

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

#: Tokens. The whole context that a model was trained for can take tens of gigabytes of K and V.
DEFAULT_CONTEXT = 16384


class Conversation:
    """The messages of a conversation, and a method that adds a question and its answer.

    max_tokens: maximum length of one answer in tokens (default: as long as the context allows).
    sampling: arguments of create_chat_completion. Each answer gets its own seed, derived from the seed in `sampling`.
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
        """Return the answer to `question`, and pass each piece of it to `on_text` as it is generated.

        If an answer is interrupted, its text so far stays in the conversation. If the conversation exceeds the context,
        or the chat template refuses it, the question is removed and `GenerationError` is raised.
        """
        self.messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        try:
            self._generate(pieces, on_text)
        except (ValueError, jinja2.TemplateError) as error:
            # llama_cpp raises the first for a prompt that is too long, the template the second, or either.
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
    """Return the context size for a conversation, by default the model's training context up to `DEFAULT_CONTEXT`."""
    if requested is not None:
        return requested
    return min(read_model(model).context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
