"""Compare full attention with SWAA configurations: the times of one run, as ratios, beside the bound.

A laptop's speed drifts by tens of percent within minutes, so numbers of two runs can't be compared. Here the sides take
turns in every round, forwards and backwards, and the medians over the rounds are compared.

    report = bench("model.gguf", "quality,fast", [4096, 8192]); print(report)
    for row in report.rows(): print(row["config"], row["prompt_tokens"], row["prefill_ratio"], row["bound"])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from swaa_edge.bench.client import PATCHED, UNPATCHED, described, libraries
from swaa_edge.bench.report import Report
from swaa_edge.bench.workload import Workload
from swaa_edge.config import Configuration
from swaa_edge.engine.configurations import configurations
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError, SwaaError
from swaa_edge.support.progress import OnProgress, Progress

#: Prompt lengths by default, as far as the model's context goes.
LENGTHS = (4096, 8192)
#: Tokens decoded after each prompt by default.
DECODE = 32
# Rounds by default: a long prompt averages over its own length.
_ROUNDS, _ROUNDS_LONG, _LONG = 3, 2, 8192

T = TypeVar("T")


def bench(
    model: str | os.PathLike[str],
    configs: str | Iterable[str] | Mapping[str, Configuration] | None = None,
    prompt_tokens: Sequence[int] | None = None,
    *,
    decode: int | None = None,
    repeat: int | None = None,
    engine: EngineSettings | None = None,
    baseline: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Time full attention and `configs` on prompts of these lengths, in turns.

    Args:
        model: path of a GGUF file, or a `ModelFile`.
        configs: names as `configurations` takes them, or configurations by name; {} with a baseline compares full
            attention alone.
        prompt_tokens: prompt lengths; None: `LENGTHS`, or one prompt that fits if the context is too short for them.
        decode: tokens decoded after each prompt; None: `DECODE`.
        repeat: rounds per length; None: 3, and 2 above 8192 tokens.
        engine: sizes of context and batches, threads, KV cache.
        baseline: folder of an unpatched build of the same llama.cpp, which then runs full attention as one more side.

    KeyboardInterrupt, or an error once something is measured, ends the run early: `Report.stopped` holds the reason.
    Raises `ConfigError` for a prompt that exceeds the context or settings that don't fit the model, `ModelFileError`,
    `UnsupportedModelError`, `NativeLibraryError`, `GenerationError`.
    """
    decode = DECODE if decode is None else decode
    work = Workload.of(model, prompt_tokens, decode=decode, engine=engine, default=LENGTHS)
    sides = configurations(work.model, configs)
    _check_sides(sides, baseline)
    names = [*([UNPATCHED] if baseline is not None else []), *sides]
    turns = [
        (name, length)
        for length in work.lengths
        for order in alternating(names, rounds_of(repeat, length))
        for name in order
    ]
    # All jobs before anything is timed: a configuration that doesn't fit the model is refused here.
    jobs = {
        (name, length): work.job(length, sides.get(name, False), patched=name != UNPATCHED)
        for name, length in dict.fromkeys(turns)
    }
    with libraries(baseline) as runners:
        facts = {name: described(runner) for name, runner in runners.items()}
        report = Report(work, sides, repeat, facts)
        meter = Meter([f"{name}, {length:,} tokens" for name, length in turns], [n for _, n in turns], on_progress)
        try:
            for name, length in turns:
                runner = runners[UNPATCHED if name == UNPATCHED else PATCHED]
                timing = runner.measure(jobs[name, length], meter.turn())
                report.samples.setdefault((name, length), []).append(timing)
        except KeyboardInterrupt:
            report.stopped = "interrupted"
        except SwaaError as error:
            if not report.rows():
                raise
            report.stopped = error
    return report


def _check_sides(sides: Mapping[str, Configuration], baseline: str | os.PathLike[str] | None) -> None:
    if UNPATCHED in sides:
        raise ConfigError(f"{UNPATCHED} is the name of the baseline; call the configuration something else")
    if len(sides) == 1 and baseline is None:
        raise ConfigError("give a configuration to compare with full attention, or an unpatched library as baseline")


def rounds_of(repeat: int | None, n_tokens: int) -> int:
    """Return how many rounds a prompt of `n_tokens` gets."""
    return repeat or (_ROUNDS_LONG if n_tokens > _LONG else _ROUNDS)


def alternating(sides: Sequence[T], rounds: int) -> Iterator[Sequence[T]]:
    """Yield the sides of each round, every second round backwards: a steady drift then favours none of them."""
    for number in range(rounds):
        yield sides[:: -1 if number % 2 else 1]


class Meter:
    """Report the progress of turns, in prompt tokens. texts, tokens: one per turn, in order."""

    def __init__(self, texts: Sequence[str], tokens: Sequence[int], on_progress: OnProgress | None) -> None:
        self._texts, self._tokens, self._report = texts, tokens, on_progress
        self._turn, self._before = 0, 0

    def turn(self) -> Callable[[int], None] | None:
        """Begin the next turn; return the callback that takes the number of its prompt tokens done."""
        at, before = self._turn, self._before
        self._turn, self._before = at + 1, before + self._tokens[at]
        if self._report is None:
            return None
        total, text, report = sum(self._tokens), f"{at + 1}/{len(self._texts)} {self._texts[at]}", self._report

        def advance(done: int) -> None:
            report(Progress(before + done, total, text))

        advance(0)
        return advance
