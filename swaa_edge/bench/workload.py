"""The work that every side of a comparison does: a model, prompt lengths, and the number of tokens to decode.

work = Workload.of("model.gguf", [4096], decode=32)
runner.measure(work.job(4096, SwaaConfig(2048)))
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections.abc import Sequence
from typing import Any

from swaa_edge.bench.client import Job
from swaa_edge.config import FULL_ATTENTION, Configuration
from swaa_edge.engine.preflight import check_context, resolve_swaa
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError
from swaa_edge.files.model import ModelFile, read_model
from swaa_edge.support.sample_text import real_text


@dataclasses.dataclass(frozen=True)
class Workload:
    """The work of a comparison.

    lengths: prompt lengths, ascending.
    decode: number of tokens decoded after each prompt.
    """

    model: ModelFile
    lengths: tuple[int, ...]
    decode: int
    engine: EngineSettings

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        prompt_tokens: Sequence[int] | None,
        *,
        decode: int,
        engine: EngineSettings | None = None,
        default: Sequence[int] = (),
    ) -> Workload:
        """Return a validated workload.

        default: prompt lengths if `prompt_tokens` is None. Lengths that exceed the context are dropped.

        Raises `ConfigError` if a prompt exceeds the context, or if a setting is out of range. Raises `ModelFileError`
        if the model can't be read.
        """
        engine = engine or EngineSettings()
        # llama.cpp caps n_ubatch too. bench cuts prompts into ubatches, and needs the capped value.
        engine = dataclasses.replace(engine, n_ubatch=min(engine.n_ubatch, engine.n_batch))
        model = read_model(model)
        if prompt_tokens is None:
            room = (engine.n_ctx or model.context_length or default[-1] + decode) - decode
            prompt_tokens = [length for length in default if length <= room] or [max(room, 1)]
        work = cls(model, tuple(sorted(set(prompt_tokens))), decode, engine)
        work._check()
        return work

    def _check(self) -> None:
        engine, lengths, trained = self.engine, self.lengths, self.model.context_length
        if not lengths or lengths[0] < 1:
            raise ConfigError("give at least one prompt length, each of at least 1 token")
        if engine.lora_path is not None:
            raise ConfigError(
                "bench can't run an adapter; merge it into the model: swaa-edge convert HF_DIR --lora DIR -o OUT.gguf"
            )
        check_context(flash_attn=True, n_batch=engine.n_batch, n_ubatch=engine.n_ubatch)
        needed = lengths[-1] + self.decode
        both = f"a prompt of {lengths[-1]} tokens and {self.decode} more"
        if engine.n_ctx is not None and engine.n_ctx < needed:
            raise ConfigError(f"{both} don't fit a context of {engine.n_ctx}; they need {needed} tokens")
        if engine.n_ctx is None and trained and needed > trained:
            raise ConfigError(
                f"{both} exceed the {trained} tokens that the model was trained for; "
                f"use shorter prompts, or set --ctx {needed} (n_ctx in Python)"
            )

    def job(self, length: int, config: Configuration = FULL_ATTENTION, *, patched: bool = True, **changes: Any) -> Job:
        """Return the job for one prompt length under `config`.

        patched: whether the library supports SWAA.
        changes: other fields of `Job`.
        """
        overrides = resolve_swaa(self.model, config).kv_overrides if patched else None
        job = Job(os.fspath(self.model), self.tokens[:length], self.engine, overrides or {}, self.decode)
        return dataclasses.replace(job, **changes)

    @functools.cached_property
    def tokens(self) -> list[int]:
        """The tokens of the longest prompt. Shorter prompts are prefixes of the longest one."""
        return prompt_ids(self.model, self.lengths[-1])

    @property
    def prompt(self) -> str:
        """The name of the tokens' source, for the report."""
        return "Python's language reference" if self.model.has_tokenizer else "random tokens"


def prompt_ids(model: ModelFile, count: int) -> list[int]:
    """Return `count` tokens for a prompt, the same in every run.

    The text is Python's language reference, which ships with Python for help(). A short text is repeated. A model
    without a tokenizer gets random tokens.
    """
    if not model.has_tokenizer:
        generator = random.Random(0)
        return [generator.randrange(model.n_vocab) for _ in range(count)]
    from swaa_edge.engine.tokenizer import tokenize  # loads the native library

    # On average, tokens are shorter than eight characters.
    tokens = tokenize(model, real_text()[: 8 * count])
    return (tokens * (count // len(tokens) + 1))[:count]
