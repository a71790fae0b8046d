"""Models under full attention that reply to prompts, for `distill`: here the interface, and our engine on a GGUF file.

    answerer = LlamaAnswerer(SwaaLlama("model.gguf", swaa=False, n_ctx=n_ctx), max_tokens=1024, sampling={})
    answerer.answer(prompt, seed=1)

`hfanswerer` has the one for the folder of a Hugging Face model, which needs torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from swaa_edge.errors import GenerationError

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama


@dataclasses.dataclass(frozen=True)
class Answer:
    """text: of the reply, without the token that ends it. ended: whether it came to that, or to the limit of tokens.
    tokens: how many were generated."""

    text: str
    ended: bool
    tokens: int


class Answerer(Protocol):
    """A model under full attention that replies to prompts."""

    def answer(self, prompt: Sequence[int], seed: int) -> Answer:
        """The reply to these tokens; the same prompt and seed give the same one, whatever was asked before."""
        ...

    def close(self) -> None: ...


def reusable(before: Sequence[int] | None, prompt: Sequence[int], step: int) -> int:
    """How many tokens of `prompt` need no second reading after `before`: whole steps, and never its last token.

    K and V of a token depend, in the last bit, on which tokens were computed along with it. Both prompts are read in
    the same steps from their start on, so whole steps that are equal are equal to the bit.
    """
    if before is None:
        return 0
    most = min(len(before), len(prompt)) - 1
    same = next((at for at in range(most) if before[at] != prompt[at]), most)
    return same // step * step


class LlamaAnswerer:
    """`Answerer` by our engine, on a GGUF file.

    llm: loaded with swaa=False; closed by `close`. sampling: keyword arguments of create_completion, without a seed.
    using(llm): what is held while `llm` works, such as a handler of Ctrl-C.
    """

    def __init__(
        self,
        llm: SwaaLlama,
        *,
        max_tokens: int,
        sampling: Mapping[str, Any],
        using: Callable[[SwaaLlama], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._llm, self._max_tokens, self._sampling, self._using = llm, max_tokens, dict(sampling), using
        self._read: Sequence[int] | None = None

    def answer(self, prompt: Sequence[int], seed: int) -> Answer:
        """As `Answerer`. Raises `GenerationError` if the engine fails or the prompt is too long."""
        with self._using(self._llm):
            self._read_all_but_last(prompt)
            completion = self._llm.create_completion(
                list(prompt), max_tokens=self._max_tokens, seed=seed, **self._sampling
            )
        choice = completion["choices"][0]
        return Answer(choice["text"], choice["finish_reason"] == "stop", self._llm.last_timings.generated_tokens)

    def _read_all_but_last(self, prompt: Sequence[int]) -> None:
        """So the last token is computed by itself for every reply, the first as well as those that find K and V."""
        llm, before = self._llm, self._read
        self._read = None  # until it is true again
        count = len(prompt) - 1 if before == prompt else reusable(before, prompt, llm.n_batch)
        llm.n_tokens = min(count, llm.n_tokens)  # fewer after a failure
        try:
            llm.eval([])  # takes back what lies behind
        except GenerationError:
            llm.reset()  # a memory that can't go back
        llm.eval(prompt[llm.n_tokens : -1])
        self._read = prompt

    def close(self) -> None:
        self._llm.close()
