"""Compares full attention with SWAA configurations: the times of one run, as ratios, beside the bound.

A laptop's speed drifts by tens of percent within minutes, so numbers from two runs say little. Here the
sides take turns in every round, forwards and backwards, and medians over the rounds are compared.

    report = bench("model.gguf", {"balanced": SwaaConfig.from_recipe("balanced")}, [4096, 8192])
    for row in report.rows(): print(row["config"], row["prompt_tokens"], row["prefill_ratio"], row["bound"])
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swaa_edge import native
from swaa_edge.bench.client import Job, Runner
from swaa_edge.bench.report import FULL, Compared, Report, Settings
from swaa_edge.engine.preflight import check_context, plan_swaa
from swaa_edge.errors import ConfigError, NativeLibraryError, SwaaError
from swaa_edge.files.model import ModelFile, read_model
from swaa_edge.support.sample_text import real_text

#: Prompt lengths by default, where the model takes them.
LENGTHS = (4096, 8192)
#: Types of the KV cache, as numbers of enum ggml_type.
CACHE_TYPES = {"f16": 1, "q8_0": 8}
# llama.cpp rounds a context up to whole blocks of this many cells.
_CONTEXT_STEP = 256
_Turn = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands: turn `turn` of `turns`, from 1, measures `config`, `done` of `prompt_tokens` so far.

    seconds_left: of the whole run; None while nothing is known.
    """

    turn: int
    turns: int
    config: str
    prompt_tokens: int
    done: int
    seconds_left: float | None


def bench(
    model: str | os.PathLike[str],
    configs: Mapping[str, Compared],
    prompt_tokens: Sequence[int] | None = None,
    *,
    settings: Settings | None = None,
    baseline: str | os.PathLike[str] | None = None,
    on_progress: Callable[[Progress], object] | None = None,
) -> Report:
    """Time full attention and each of `configs` (by name) on prompts of these lengths, in turns.

    prompt_tokens: None for `LENGTHS`, or one prompt that fits if the model's context is too short for them.
    baseline: folder of an unpatched build of the same llama.cpp, which then runs full attention; else the
    patched library does, with SWAA off. KeyboardInterrupt, or an error once something is measured, ends the
    run early: the report says so in `stopped`.

    Raises `ConfigError` for a prompt that exceeds the model's context or settings that don't fit it,
    `ModelFileError`, `UnsupportedModelError`, `NativeLibraryError`, `GenerationError`.
    """
    settings, path = settings or Settings(), os.fspath(model)
    # llama.cpp computes no more at once than it is handed at once.
    settings = dataclasses.replace(settings, ubatch=min(settings.ubatch, settings.batch))
    facts = read_model(path)
    lengths = _default_lengths(facts, settings) if prompt_tokens is None else sorted(set(prompt_tokens))
    _check(facts, configs, lengths, settings)
    overrides = {name: plan_swaa(path, config, None)[0] or {} for name, config in configs.items()}
    overrides[FULL] = {} if baseline else plan_swaa(path, False, None)[0] or {}
    ours_dir = native.library_dir()
    full_dir = _baseline_dir(baseline) if baseline else ours_dir
    tokens, prompt = prompt_ids(facts, lengths[-1])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with Runner(ours_dir) as ours, Runner(full_dir) as full:
        if baseline:
            check_baseline(ours, full)
        libraries = {"swaa": described(ours), FULL: described(full)}
        report = Report(facts, dict(configs), settings, libraries, prompt, load)
        turns = list(_turns(configs, lengths, settings))
        clock = _Clock(turns, on_progress)
        try:
            for name, length in turns:
                job = _job(path, tokens[:length], overrides[name], settings)
                clock.start()
                timing = (full if name == FULL else ours).measure(job, clock.advance)
                clock.finish()
                report.samples.setdefault((name, length), []).append(timing)
        except KeyboardInterrupt:
            report.stopped = "interrupted"
        except SwaaError as error:
            if not report.rows():
                raise
            report.stopped = error
    return report


def _default_lengths(model: ModelFile, settings: Settings) -> list[int]:
    room = (settings.ctx or model.context_length or LENGTHS[-1] + settings.decode) - settings.decode
    return [length for length in LENGTHS if length <= room] or [max(room, 1)]


def _check(model: ModelFile, configs: Mapping[str, Compared], lengths: Sequence[int], settings: Settings) -> None:
    if not configs or FULL in configs:
        raise ConfigError(f"give at least one configuration to compare, and none of the name {FULL}")
    if not lengths or lengths[0] < 1:
        raise ConfigError("give at least one prompt length; each is a number of tokens from 1")
    if settings.cache_type not in CACHE_TYPES:
        raise ConfigError(f"cache_type = {settings.cache_type} must be one of {', '.join(CACHE_TYPES)}")
    check_context(flash_attn=True, n_batch=settings.batch, n_ubatch=settings.ubatch)
    needed, trained = lengths[-1] + settings.decode, model.context_length
    asked = f"a prompt of {lengths[-1]} tokens and {settings.decode} more"
    if settings.ctx is not None and settings.ctx < needed:
        raise ConfigError(f"{asked} don't fit a context of {settings.ctx}; it takes {needed}")
    if settings.ctx is None and trained and needed > trained:
        raise ConfigError(
            f"{asked} exceed the {trained} that the model was trained for; "
            f"take shorter prompts, or go beyond with --ctx {needed}"
        )


def _baseline_dir(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    if not any(path.glob("*llama.*")):
        raise NativeLibraryError(f"{path} holds no llama.cpp library; `make baseline` builds one in build/baseline/lib")
    return path.resolve()


def check_baseline(ours: Runner, full: Runner) -> None:
    """Raise NativeLibraryError unless `full` holds the unpatched library of the release of `ours`."""
    if full.facts["swaa"]:
        raise NativeLibraryError(f"{full.library} holds a patched library; `make baseline` builds an unpatched one")
    if ours.facts["version"] != full.facts["version"]:
        raise NativeLibraryError(
            f"{full.library} holds another release (ggml {full.facts['version']}, the patched library has "
            f"{ours.facts['version']}); `make baseline` builds the same"
        )


def described(runner: Runner) -> dict[str, Any]:
    """A side's library in the document: its folder, whether it is patched, ggml's version and commit, its GPUs."""
    facts = runner.facts
    told = {"patched": facts["swaa"], "ggml": facts["version"], "commit": facts["commit"], "gpus": facts["gpus"]}
    return {"path": str(runner.library)} | told


def _turns(configs: Mapping[str, Compared], lengths: Sequence[int], settings: Settings) -> Iterator[_Turn]:
    """(configuration, prompt length) in the order in which they are measured."""
    forwards = [FULL, *configs]
    for length in lengths:
        for turn in range(settings.rounds(length)):
            # Backwards every second time: what drifts steadily then favours nobody.
            for name in forwards[:: -1 if turn % 2 else 1]:
                yield name, length


def _job(model: str, tokens: Sequence[int], overrides: Mapping[str, Any], settings: Settings) -> Job:
    # The warm-up takes a ubatch and one token.
    needed = max(len(tokens) + settings.decode, min(len(tokens), settings.ubatch) + 1, settings.ctx or 0)
    return Job(
        model=model,
        tokens=tokens,
        overrides=overrides,
        decode=settings.decode,
        n_ctx=-(-needed // _CONTEXT_STEP) * _CONTEXT_STEP,
        n_batch=settings.batch,
        n_ubatch=settings.ubatch,
        threads=settings.threads,
        prefill_threads=settings.threads,
        cache_type=CACHE_TYPES[settings.cache_type],
        gpu_layers=settings.gpu_layers,
        swa_full=settings.swa_full,
    )


def prompt_ids(model: ModelFile, count: int) -> tuple[list[int], str]:
    """`count` tokens for a prompt, always the same, and a few words on what they are.

    Real text (Python's language reference, which ships with it for help()), over and over; random tokens
    where the model has no tokenizer.
    """
    if model.header.value("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        generator = random.Random(0)
        return [generator.randrange(model.n_vocab) for _ in range(count)], "random tokens"
    from swaa_edge.engine.tokenizer import tokenize

    # No tokenizer makes more than a token of a byte, and few take more than eight bytes for one.
    tokens = tokenize(model.paths[0], real_text()[: 8 * count])
    return (tokens * (count // len(tokens) + 1))[:count], "Python's language reference"


class _Clock:
    """Tells `on_progress` where the run stands, and guesses the time left from the turns before."""

    def __init__(self, turns: Sequence[_Turn], on_progress: Callable[[Progress], object] | None) -> None:
        self._turns, self._report = turns, on_progress
        self._index, self._started = 0, 0.0
        self._took: dict[_Turn, float] = {}

    def start(self) -> None:
        self._started = time.perf_counter()
        self.advance(0)

    def advance(self, done: int) -> None:
        """`done` tokens of this turn's prompt are evaluated."""
        if self._report:
            name, length = self._turns[self._index]
            self._report(Progress(self._index + 1, len(self._turns), name, length, done, self._left(done)))

    def finish(self) -> None:
        self._took[self._turns[self._index]] = time.perf_counter() - self._started
        self._index += 1

    def _left(self, done: int) -> float | None:
        now = time.perf_counter() - self._started
        turn = self._turns[self._index]
        pace = now * turn[1] / done if done else None
        took = dict(self._took)
        if turn not in took and pace:
            took[turn] = pace
        if not took:
            return None
        return max(0.0, sum(_guess(took, turn) for turn in self._turns[self._index :]) - now)


def _guess(took: Mapping[_Turn, float], turn: _Turn) -> float:
    """Seconds of a turn: as before, or else as the turn of the nearest length, in proportion to the length."""
    if turn in took:
        return took[turn]
    name, length = turn
    near = min(took, key=lambda other: (other[0] != name and other[1] != length, abs(other[1] - length)))
    return took[near] * length / near[1]
