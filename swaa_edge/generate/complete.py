"""Complete one prompt, or answer a question about a text, and measure the time.

print(complete("model.gguf", "Once upon a time", max_tokens=64).to_dict())
print(complete("model.gguf", report, question="Who wrote this report?").text)
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
from swaa_edge.errors import ConfigError, GenerationError, ModelFileError
from swaa_edge.files.model import ModelFile, read_model

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama, Timings

_TEMPLATE = "tokenizer.chat_template"


@dataclasses.dataclass(frozen=True)
class Completion:
    """A generated text with settings and times.

    finish_reason: why the text ended, "stop" or "length".
    seed: sampling seed that reproduces the text.
    swaa: the SWAA settings, or None under full attention.
    policy: name of the method that computed sliding layers.
    load_seconds: wall time of loading the model.
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
        """Return all fields as plain JSON values; speeds are in tokens per second."""
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
    question: str | None = None,
    system: str | None = None,
    max_tokens: int = 128,
    swaa: Configuration | None = None,
    engine: EngineSettings | None = None,
    sampling: Mapping[str, Any] | None = None,
    using: Callable[[SwaaLlama], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    on_text: Callable[[str], object] | None = None,
    on_prefill: Callable[[int, int], object] | None = None,
    on_note: Callable[[str], object] = lambda line: None,
) -> Completion:
    """Load `model`, complete `prompt` with at most `max_tokens` tokens, and close the model.

    question: question to answer through the chat template. `system` is the system prompt. The user message is `prompt`
        (possibly empty) and the question. Special tokens in the message are treated as text.
    swaa: settings, as for `SwaaLlama`.
    engine: settings of the engine. The default for n_ctx is the length of the prompt plus `max_tokens`.
    sampling: arguments of create_completion. Without a seed, a random seed is chosen.
    using: function that takes the loaded model and returns a context manager for the generation.
    on_text: function that is called with each generated piece of text.
    on_note: function that gets one line of advice, for example if the question is longer than the tail.

    Raises `GenerationError` if the prompt doesn't fit the context, and `ConfigError` for an empty question. Raises
    `ModelFileError` if the chat template for a question is missing or fails, and the errors of loading the model.
    """
    model, engine = read_model(model), engine or EngineSettings()
    asked = _Prompt.of(model, prompt, question, system)
    tokens, sampling = asked.tokens, {"seed": None, "stop": asked.stops, **(sampling or {})}
    if sampling["seed"] is None:
        sampling["seed"] = random.SystemRandom().randrange(2**32 - 1)
    n_ctx = fitting_context(model, len(tokens), max_tokens, engine.n_ctx)
    started = time.perf_counter()
    llm = engine.load(model, swaa=swaa, n_ctx=n_ctx, on_prefill=on_prefill)
    load_seconds = time.perf_counter() - started
    pieces: list[str] = []
    reason = None
    with contextlib.closing(llm), using(llm):
        if note := asked.note(model, llm.swaa):
            on_note(note)
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


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A prompt in tokens.

    stops: texts that end the response.
    asking: as in `Prompts.asking`, or 0 without a question.
    """

    tokens: list[int]
    stops: list[str] = dataclasses.field(default_factory=list)
    asking: int = 0

    @classmethod
    def of(cls, model: ModelFile, text: str, question: str | None, system: str | None) -> _Prompt:
        """Build the prompt. Arguments and errors are as in `complete`.

        The template is rendered with a placeholder for the user's message. The message is tokenized separately, without
        special tokens. So the text "<|im_end|>" in a document can't end the user's turn.
        """
        from swaa_edge.engine.tokenizer import tokenize  # imports llama_cpp, which takes seconds
        from swaa_edge.generate.prompts import Prompts

        if question is None:
            if system is not None:
                raise ConfigError("--system needs a question; add -q QUESTION")
            return cls(tokenize(model, text))
        text, question = text.rstrip(), question.strip()
        if not question:
            raise ConfigError("the question is empty; give the question's text after -q")
        if _TEMPLATE not in model.header.fields:
            raise ModelFileError(
                f"{model} has no chat template, which a question needs; "
                "leave out -q to continue a text, or give the file of an instruct model"
            )
        with Prompts(model, system=system, advice="leave out -q to continue a text") as prompts:
            tokens = prompts.ask(text, question) if text else prompts.ask(question, "")
            return cls(list(tokens), prompts.stops, prompts.asking(question))

    def note(self, model: ModelFile, swaa: SwaaConfig | None) -> str | None:
        """Return one line of advice about this prompt under `swaa`, or None."""
        if not self.asking:
            unused = f"{model} has a chat template, which -p and -f alone don't use; -q QUESTION asks through it"
            return unused if _TEMPLATE in model.header.fields else None
        # Without FA decode, the tail has no effect. A prompt within window and sinks needs no tail.
        if swaa is None or not swaa.fa_decode or len(self.tokens) <= swaa.window_size + swaa.sink_count:
            return None
        if self.asking <= swaa.tail_count:
            return None
        return (
            f"the question and the end of its turn have {self.asking} tokens, but the tail has {swaa.tail_count}; "
            f"to cover the question, add --tail {self.asking} to the SWAA settings"
        )


def fitting_context(model: str | os.PathLike[str], n_prompt: int, n_new: int, requested: int | None = None) -> int:
    """Return the context size in tokens: `requested`, or by default `n_prompt` + `n_new`.

    Raises `GenerationError` if `requested` or, without `requested`, the training context is too small.
    """
    needed = n_prompt + n_new
    if requested is not None:
        if requested < needed:
            raise GenerationError(
                f"--ctx {requested} is too small for {n_prompt} prompt tokens and {n_new} new tokens; use {needed}"
            )
        return requested
    trained = read_model(model).context_length
    if trained and needed > trained:
        raise GenerationError(
            f"{n_prompt} prompt tokens and {n_new} new tokens exceed the model's training context of {trained} tokens; "
            f"shorten the prompt, lower -n, or exceed the training context with --ctx {needed}"
        )
    return needed
