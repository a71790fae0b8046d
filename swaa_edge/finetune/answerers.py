"""Answers prompts with a model under full attention, for `distill`.

    answerer = LlamaAnswerer(SwaaLlama("model.gguf", swaa=False, n_ctx=n_ctx), max_tokens=1024, sampling={})
    answerer.answer(prompt, seed=1)

`Answerer` is the interface. `LlamaAnswerer` runs a GGUF file in our engine. The answerer for Hugging Face models needs
torch, so `hf_answerer` is a separate module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from swaa_edge.errors import GenerationError
from swaa_edge.support.interrupt import interruptible

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama


@dataclasses.dataclass(frozen=True)
class Response:
    """A response of a model.

    text: the response without its end token.
    ended: whether the response ended before the token limit.
    tokens: number of generated tokens.
    """

    text: str
    ended: bool
    tokens: int


class Answerer(Protocol):
    """A model under full attention that answers prompts."""

    def answer(self, prompt: Sequence[int], seed: int) -> Response:
        """Return the response to the tokens of `prompt`. Earlier prompts don't affect the response."""
        ...

    def close(self) -> None: ...


def reusable(before: Sequence[int] | None, prompt: Sequence[int], step: int) -> int:
    """Return the number of tokens at the start of `prompt` that can be reused from the KV cache.

    before: the prompt that was prefilled last, or None.
    step: number of tokens in a prefill batch.

    The result is a multiple of `step`. The last token of each prompt is not counted. Both prompts are prefilled from
    the start in batches of `step` tokens. Equal batches give bit-identical K and V, but the same tokens in another
    batch may not.
    """
    if before is None:
        return 0
    most = min(len(before), len(prompt)) - 1
    same = next((at for at in range(most) if before[at] != prompt[at]), most)
    return same // step * step


class LlamaAnswerer:
    """An `Answerer` that runs a GGUF file in our engine. Ctrl-C stops the engine within one ubatch.

    llm: a model loaded with swaa=False. `close` closes this model.
    sampling: keyword arguments of create_completion, without the seed.
    """

    def __init__(self, llm: SwaaLlama, *, max_tokens: int, sampling: Mapping[str, Any]) -> None:
        self._llm, self._max_tokens, self._sampling = llm, max_tokens, dict(sampling)
        self._prefilled: Sequence[int] | None = None

    def answer(self, prompt: Sequence[int], seed: int) -> Response:
        """See `Answerer.answer`. Raises `GenerationError` if the engine fails or the prompt is too long."""
        with interruptible(self._llm):
            self._prefill(prompt)
            completion = self._llm.create_completion(
                list(prompt), max_tokens=self._max_tokens, seed=seed, **self._sampling
            )
        choice = completion["choices"][0]
        return Response(choice["text"], choice["finish_reason"] == "stop", self._llm.last_timings.generated_tokens)

    def _prefill(self, prompt: Sequence[int]) -> None:
        """Prefill all tokens but the last. For every response, the last token gets a batch of its own."""
        llm, before = self._llm, self._prefilled
        self._prefilled = None  # after an error, the cache is unknown
        count = len(prompt) - 1 if before == prompt else reusable(before, prompt, llm.n_batch)
        llm.n_tokens = min(count, llm.n_tokens)  # after a failure, the cache holds fewer
        try:
            llm.eval([])  # removes the tokens after n_tokens
        except GenerationError:
            llm.reset()  # this cache can't go back
        llm.eval(prompt[llm.n_tokens : -1])
        self._prefilled = prompt

    def close(self) -> None:
        self._llm.close()
