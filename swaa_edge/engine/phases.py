"""Distinguish prompt tokens from generated tokens, and time both.

The engine needs the phase of every token, but `eval` receives only tokens, from llama_cpp's `generate` and from users.
So the phase is inferred from the caller and from the token that `sample` returned.

    for phase, part in tracker.split(tokens, llm.n_tokens): ...
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from swaa_edge.errors import GenerationError
from swaa_edge.native import Phase


@dataclass
class Timings:
    """Token counts of one generation, and seconds of wall time in the engine and the sampler.

    llama.cpp's own counters include neither a reused prefix nor the sampler.
    """

    prompt_tokens: int = 0  # evaluated
    reused_tokens: int = 0  # of the prompt, found in the cache
    prefill_seconds: float = 0.0
    generated_tokens: int = 0  # sampled, an end token included
    decode_tokens: int = 0  # fed back, drafted tokens included
    decode_seconds: float = 0.0

    @property
    def prefill_speed(self) -> float | None:
        """Prompt tokens evaluated per second, or None if there were none."""
        return self.prompt_tokens / self.prefill_seconds if self.prompt_tokens and self.prefill_seconds else None

    @property
    def decode_speed(self) -> float | None:
        """Generated tokens fed back per second, or None if there were none."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens and self.decode_seconds else None

    def add(self, phase: Phase, n_tokens: int, seconds: float, with_decode_time: bool) -> None:
        """Count an evaluation; with_decode_time: whether to add the seconds of a decode to decode_seconds."""
        if phase is Phase.PREFILL:
            self.prompt_tokens += n_tokens
            self.prefill_seconds += seconds
        else:
            self.decode_tokens += n_tokens
            self.decode_seconds += seconds if with_decode_time else 0.0

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Count the time of this block as decode time, except for the prefill in it."""
        started, prefill = time.perf_counter(), self.prefill_seconds
        try:
            yield
        finally:
            self.decode_seconds += time.perf_counter() - started - (self.prefill_seconds - prefill)


class Turn:
    """One call of `generate`, which first evaluates its prompt and then the tokens that it sampled or drafted."""

    in_prompt = True


class PhaseTracker:
    """Infers the phases of one sequence.

    turn: the running call of `generate`. sampled: position and id of the token that `sample` last returned. rows:
        number of logit rows that the engine holds, the last token's row being the last.
    """

    def __init__(self) -> None:
        self.turn: Turn | None = None
        self.sampled: tuple[int, int] | None = None
        self.rows = 0

    @contextlib.contextmanager
    def running(self, turn: Turn) -> Iterator[None]:
        """Treat tokens evaluated in this block as part of `turn`."""
        self.turn = turn
        try:
            yield
        finally:
            self.turn = None

    def split(
        self, tokens: Sequence[int], position: int, phase: Phase | None = None
    ) -> list[tuple[Phase, Sequence[int]]]:
        """Split `tokens`, which start at `position`, by phase, and record that they are evaluated.

        phase: the phase of all tokens, or None to infer it.
        """
        parts = self._infer(tokens, position) if phase is None else [(phase, tokens)]
        if self.turn:
            self.turn.in_prompt = False
        self.sampled = None
        return parts

    def _infer(self, tokens: Sequence[int], position: int) -> list[tuple[Phase, Sequence[int]]]:
        if self.turn:
            return [(Phase.PREFILL if self.turn.in_prompt else Phase.DECODE, tokens)]
        if self.sampled is None:
            return [(Phase.DECODE if len(tokens) == 1 and position else Phase.PREFILL, tokens)]
        generated = int(len(tokens) > 0 and self.sampled == (position, tokens[0]))
        return [(Phase.DECODE, tokens[:generated]), (Phase.PREFILL, tokens[generated:])]

    def check_row(self, idx: int | None, n_tokens: int) -> None:
        """Raise `GenerationError` if the engine holds no logits for the token at `idx` (None: the last) of
        `n_tokens`."""
        back = 1 if idx is None else n_tokens - idx
        if not 0 < back <= self.rows or n_tokens == 0:
            raise GenerationError(
                f"there are no logits to sample from{'' if idx is None else f' at idx = {idx}'}; evaluate tokens first"
            )

    def shift(self, n_discard: int) -> None:
        """Follow a context shift: the sampled token moves down by `n_discard` positions."""
        if self.sampled is not None:
            self.sampled = (self.sampled[0] - n_discard, self.sampled[1])
