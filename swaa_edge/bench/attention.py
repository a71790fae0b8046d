"""Time attention on the CPU: our kernels against llama.cpp's, with and without flash attention.

    report = bench_attention("model.gguf", quick=True, baseline="build/baseline/lib"); print(report)

The KV cache is f16 or q8_0. The compared sides take turns, as in `bench`. A turn prefills a prompt and decodes tokens,
and then does both with a prompt of only `SHALLOW` tokens.

In decode, attention time is the extra time of a token after the long prompt. In prefill, attention time is the part of
each ubatch's time that grows with the number of visible keys (bound.py). Memory bandwidth limits decode, so the
bandwidth is measured right after each turn (bandwidth.py). docs/bench.md defines each figure.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from swaa_edge.bench.attention_report import SHALLOW, AttentionReport, Sample, Side
from swaa_edge.bench.bandwidth import bandwidth
from swaa_edge.bench.client import PATCHED, UNPATCHED, UPSTREAM_KERNELS, Runner, described, libraries
from swaa_edge.bench.run import alternating, progress_of
from swaa_edge.bench.workload import Workload
from swaa_edge.config import Configuration
from swaa_edge.engine.configurations import FULL, configurations
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError
from swaa_edge.support.interrupt import ends_early
from swaa_edge.support.progress import OnProgress

#: Default prompt lengths, without and with `quick`.
LENGTHS, QUICK_LENGTHS = (2048, 8192, 32768), (8192,)
#: Default number of tokens decoded after each prompt.
DECODE = 64
_ROUNDS, _QUICK_ROUNDS = 3, 5
# Time limit of `quick` in seconds.
_QUICK_SECONDS = 270.0
# Longest prompt for llama.cpp's kernels with a q8_0 cache. Prefill of this length takes minutes.
_Q8_0_LENGTH = 8192


def bench_attention(
    model: str | os.PathLike[str],
    configs: str | Iterable[str] | Mapping[str, Configuration] | None = None,
    prompt_tokens: Sequence[int] | None = None,
    *,
    quick: bool = False,
    decode: int | None = None,
    repeat: int | None = None,
    engine: EngineSettings | None = None,
    baseline: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> AttentionReport:
    """Time attention on the CPU for prompts of the given lengths.

    model, decode: as in `bench`.
    configs: SWAA configurations to time, with our kernels and with llama.cpp's. None times only full attention.
    prompt_tokens: prompt lengths, or None for the `LENGTHS` (with quick: `QUICK_LENGTHS`) that fit the context.
    quick: end within 270 seconds by skipping rounds, and skip llama.cpp's kernels on a q8_0 cache.
    repeat: rounds per length, or None for 3 (5 with quick).
    engine: settings for loading the model. If n_threads is None, all cores are used. Cache type and GPU layers are
        ignored.
    baseline: folder of an unpatched build of the same llama.cpp, as the reference. Without a baseline, the reference
        is the patched library with llama.cpp's own kernels (GGML_CPU_FATTN=0).

    Errors and interrupted runs are as in `bench`.
    """
    engine = dataclasses.replace(engine or EngineSettings(), n_gpu_layers=0, cache_type="f16")
    if engine.n_threads is None:
        engine = dataclasses.replace(engine, n_threads=_cores())
    decode = DECODE if decode is None else decode
    if decode < 1:
        raise ConfigError(f"decode = {decode} must be at least 1; this benchmark also measures attention in decode")
    work = Workload.of(model, prompt_tokens, decode=decode, engine=engine, default=QUICK_LENGTHS if quick else LENGTHS)
    chosen = {FULL: False} if configs is None else configurations(work.model, configs)
    rounds = repeat or (_QUICK_ROUNDS if quick else _ROUNDS)
    reference = UPSTREAM_KERNELS if baseline is None else UNPATCHED
    with libraries(baseline, upstream_kernels=baseline is None or len(chosen) > 1) as runners:
        facts = {name: described(runner) for name, runner in runners.items()}
        report = AttentionReport(work, chosen, rounds, facts, reference)
        report.skipped += [
            f"llama.cpp's kernels with a q8_0 cache, {n:,} tokens: its prefill takes minutes"
            for n in work.lengths
            if quick or n > _Q8_0_LENGTH
        ]
        with ends_early(report, report.rows):
            planned = list(_rounds(report, rounds, quick))
            _measure(report, planned, runners, _QUICK_SECONDS if quick else float("inf"), on_progress)
    return report


def _cores() -> int:
    # Only the cores that this process may use, if the system tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rounds(report: AttentionReport, rounds: int, quick: bool) -> Iterator[tuple[int, int, list[Side]]]:
    """Yield (prompt length, round number from 0, sides in running order)."""
    reference = report.reference
    # The most important ratios compare neighbours in this list.
    sides = [Side(reference, flash_attn=False), Side(PATCHED), Side(reference), Side(PATCHED, cache_type="q8_0")]
    names = [name for name in report.configs if name != FULL]
    sides += [Side(library, config=name) for name in names for library in (UPSTREAM_KERNELS, PATCHED)]
    for length in report.work.lengths:
        for number, order in enumerate(alternating(sides, rounds)):
            once = number == 0 and not quick and length <= _Q8_0_LENGTH
            yield length, number, [*order, *([Side(reference, cache_type="q8_0")] if once else [])]


def _measure(
    report: AttentionReport,
    rounds: Sequence[tuple[int, int, list[Side]]],
    runners: Mapping[str, Runner],
    limit: float,
    on_progress: OnProgress | None,
) -> None:
    turns = [
        (f"{side.label}, {length:,} tokens, round {number + 1}", length)
        for length, number, sides in rounds
        for side in sides
    ]
    meters = progress_of(turns, on_progress)
    began, last = time.monotonic(), 0.0
    for length, number, sides in rounds:
        started = time.monotonic()
        if number and started - began + last > limit:
            report.skipped.append(f"round {number + 1} at {length:,} tokens: no time left")
            return
        for side in sides:
            sample = _turn(report, side, length, runners[side.library], next(meters))
            report.samples.setdefault((side, length), []).append(sample)
        last = time.monotonic() - started


def _turn(
    report: AttentionReport, side: Side, length: int, runner: Runner, advance: Callable[[int], None] | None
) -> Sample:
    work = report.work
    job = work.job(
        length,
        report.configs[side.config],
        patched=side.library != UNPATCHED,
        engine=dataclasses.replace(work.engine, cache_type=side.cache_type),
        flash_attn=side.flash_attn,
    )
    # In this order, both decodes and the memory test run within seconds of each other.
    deep = runner.measure(job, advance)
    shallow = runner.measure(dataclasses.replace(job, tokens=job.tokens[:SHALLOW]))
    return Sample(deep, shallow, bandwidth(work.engine.n_threads), job.n_ctx)
