"""Complete one prompt and measure the time, as `swaa-edge run` does.

print(complete("model.gguf", "Once upon a time", max_tokens=64).to_dict())
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from swaa_edge.config import Configuration, SwaaConfig
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import GenerationError
from swaa_edge.files.model import read_model

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama, Timings


@dataclasses.dataclass(frozen=True)
class Completion:
    """A generated text, with the settings and times of its generation.

    finish_reason: stop or length. seed: sampling seed that reproduces the text. swaa: settings, or None under full
    attention. policy: the way in which the engine computed sliding layers. load_seconds: wall time of loading.
    """

    model: str
    text: str
    finish_reason: str | None
    seed: int
    n_ctx: int
    swaa: SwaaConfig | None
    policy: str | None
    load_seconds: float
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; speeds are in tokens per second."""
        timings = self.timings
        return {
            "model": self.model,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": timings.prompt_tokens,
            "generated_tokens": timings.generated_tokens,
            "seed": self.seed,
            "n_ctx": self.n_ctx,
            "swaa": self.swaa.to_dict() if self.swaa else None,
            "policy": self.policy,
            "timings": {
                "load_seconds": self.load_seconds,
                "prefill_seconds": timings.prefill_seconds,
                "prefill_tokens_per_second": timings.prefill_speed,
                "decode_seconds": timings.decode_seconds,
                "decode_tokens_per_second": timings.decode_speed,
            },
        }


def complete(
    model: str | os.PathLike[str],
    prompt: str,
    *,
    max_tokens: int = 128,
    swaa: Configuration | None = None,
    engine: EngineSettings | None = None,
    sampling: Mapping[str, Any] | None = None,
    using: Callable[[SwaaLlama], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    on_text: Callable[[str], object] | None = None,
    on_prefill: Callable[[int, int], object] | None = None,
) -> Completion:
    """Load `model`, complete `prompt` with at most `max_tokens` tokens, and close the model.

    swaa: settings, as for `SwaaLlama`. engine: engine settings; if n_ctx is None, the context is just large enough
    for the prompt and `max_tokens`. sampling: arguments of create_completion; without a seed, a random seed is chosen.
    on_text: function called with each piece of text as it is generated. using(llm): context manager that is active
    during generation, such as `interruptible`.

    Raises `GenerationError` if the prompt doesn't fit the context, and the errors of loading the model.
    """
    from swaa_edge.engine.tokenizer import tokenize  # imports llama_cpp, which takes seconds

    model, engine = read_model(model), engine or EngineSettings()
    sampling = {"seed": None, **(sampling or {})}
    if sampling["seed"] is None:
        sampling["seed"] = random.SystemRandom().randrange(2**32 - 1)
    tokens = tokenize(model, prompt)
    n_ctx = fitting_context(model, len(tokens), max_tokens, engine.n_ctx)
    started = time.perf_counter()
    llm = engine.load(model, swaa=swaa, n_ctx=n_ctx, on_prefill=on_prefill)
    load_seconds = time.perf_counter() - started
    pieces: list[str] = []
    reason = None
    with contextlib.closing(llm), using(llm):
        for chunk in llm.create_completion(tokens, max_tokens=max_tokens, stream=True, **sampling):
            choice = chunk["choices"][0]
            pieces.append(choice["text"])
            reason = choice["finish_reason"] or reason
            if on_text:
                on_text(choice["text"])
        return Completion(
            model=str(model),
            text="".join(pieces),
            finish_reason=reason,
            seed=sampling["seed"],
            n_ctx=llm.n_ctx(),
            swaa=llm.swaa,
            policy=llm.swaa_policy,
            load_seconds=load_seconds,
            timings=llm.last_timings,
        )


def fitting_context(model: str | os.PathLike[str], n_prompt: int, n_new: int, requested: int | None = None) -> int:
    """Return `requested`, or else `n_prompt` + `n_new`, as the context size in tokens.

    Raises `GenerationError` if `requested` is too small, or without it, if the model's training context is too small.
    """
    needed = n_prompt + n_new
    if requested is not None:
        if requested < needed:
            raise GenerationError(
                f"--ctx {requested} is too small for {n_prompt} prompt tokens and {n_new} new ones; use {needed}"
            )
        return requested
    trained = read_model(model).context_length
    if trained and needed > trained:
        raise GenerationError(
            f"{n_prompt} prompt tokens and {n_new} new ones exceed the model's training context of {trained} tokens; "
            f"shorten the prompt, lower -n, or exceed the training context with --ctx {needed}"
        )
    return needed
