"""Compare the speed of full attention and SWAA configurations within one run.

A laptop's speed drifts by tens of percent within minutes, so figures from two runs can't be compared. Within one run,
the sides take turns in alternating order. The medians over all rounds are compared.

    print(bench("model.gguf", "quality,fast", [4096, 8192]))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from swaa_edge.bench.client import PATCHED, UNPATCHED, described, libraries
from swaa_edge.bench.report import Report
from swaa_edge.bench.workload import Workload
from swaa_edge.config import Configuration
from swaa_edge.engine.configurations import configurations
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError
from swaa_edge.support.interrupt import ends_early
from swaa_edge.support.progress import OnProgress, Progress

#: Default prompt lengths, if they fit the context.
LENGTHS = (4096, 8192)
#: Default number of tokens decoded after each prompt.
DECODE = 32
# Default rounds, fewer for prompts longer than _LONG: noise averages out over a long prompt.
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
    """Time full attention and `configs` in turns, on prompts of the given lengths.

    model: a path or a `ModelFile`.
    configs: as for the function `configurations`. An empty mapping compares only full attention with the baseline.
    prompt_tokens: prompt lengths, or None for the `LENGTHS` that fit the context. If none fits, one shorter length is
        used.
    decode: number of tokens to decode after each prompt, or None for `DECODE`.
    repeat: rounds per length, or None for 3 (2 for prompts longer than 8192 tokens).
    engine: settings for loading the model.
    baseline: folder of an unpatched build of the same llama.cpp. The build runs full attention as one more side.

    Ctrl-C ends the run early, and so does an error after the first row. `Report.stopped` then holds the reason.

    Raises `ConfigError` if a prompt exceeds the context, or if settings don't fit the model. Also raises
    `ModelFileError`, `UnsupportedModelError`, `NativeLibraryError` and `GenerationError`.
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
    # Make all jobs before timing. A configuration that doesn't fit the model fails here.
    jobs = {
        (name, length): work.job(length, sides.get(name, False), patched=name != UNPATCHED)
        for name, length in dict.fromkeys(turns)
    }
    with libraries(baseline) as runners:
        facts = {name: described(runner) for name, runner in runners.items()}
        report = Report(work, sides, repeat, facts)
        meters = progress_of([(f"{name}, {length:,} tokens", length) for name, length in turns], on_progress)
        with ends_early(report, report.rows):
            for (name, length), advance in zip(turns, meters, strict=True):
                runner = runners[UNPATCHED if name == UNPATCHED else PATCHED]
                timing = runner.measure(jobs[name, length], advance)
                report.samples.setdefault((name, length), []).append(timing)
    return report


def _check_sides(sides: Mapping[str, Configuration], baseline: str | os.PathLike[str] | None) -> None:
    if UNPATCHED in sides:
        raise ConfigError(f"{UNPATCHED} is the name of the baseline; give the configuration another name")
    if len(sides) == 1 and baseline is None:
        raise ConfigError("there is nothing to compare with full attention; give a configuration or a baseline")


def rounds_of(repeat: int | None, n_tokens: int) -> int:
    return repeat or (_ROUNDS_LONG if n_tokens > _LONG else _ROUNDS)


def alternating(sides: Sequence[T], rounds: int) -> Iterator[Sequence[T]]:
    """Yield the sides of each round. Every second round is reversed, so that a steady drift favours no side."""
    for number in range(rounds):
        yield sides[:: -1 if number % 2 else 1]


def progress_of(
    turns: Sequence[tuple[str, int]], on_progress: OnProgress | None
) -> Iterator[Callable[[int], None] | None]:
    """Yield one progress callback per turn, or None without `on_progress`.

    A callback takes the number of prompt tokens prefilled so far.

    turns: text and number of prompt tokens of each turn.
    """
    if on_progress is None:
        yield from [None] * len(turns)
        return
    before, total = 0, sum(tokens for _, tokens in turns)

    def advance(before: int, text: str, done: int) -> None:
        on_progress(Progress(before + done, total, text))

    for number, (text, tokens) in enumerate(turns, 1):
        turn = partial(advance, before, f"{number}/{len(turns)} {text}")
        turn(0)
        yield turn
        before += tokens
