"""Defines the workloads of the GPU check's benchmark, and measures each with `swaa_edge.bench`.

A workload has one model, cache type and ubatch. Each workload compares every recipe on the patched library with full
attention on the unpatched library. The most informative workloads come first, since time may run out.

    for workload in workloads("full"): rows = measure(workload, model, patched, baseline, runner, gpu=True)["rows"]
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.runner import CheckError, OutOfTime, Result, Runner

RECIPES = ("quality", "balanced", "early", "fast", "memory", "stream")
_LONG, _LENGTHS = 131072, (8192, 32768, 131072)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One workload of the benchmark.

    prompts, decode, ubatch: numbers of tokens.
    layers, vocab: sizes that replace the shape's sizes.
    threads: number of CPU threads.
    recipes: names of recipes. Without recipes, SWAA is off and the patches' overhead is measured.
    """

    shape: str
    prompts: tuple[int, ...]
    kv: str = "f16"
    ubatch: int = 512
    decode: int = 512
    repeat: int | None = None
    layers: int | None = None
    vocab: int | None = None
    threads: int | None = None
    recipes: tuple[str, ...] = RECIPES

    @property
    def name(self) -> str:
        lengths = "-".join(map(str, self.prompts))
        return f"{'bench' if self.recipes else 'off-speed'}-{self.shape}-{self.kv}-u{self.ubatch}-{lengths}"


def workloads(size: str) -> Iterator[Workload]:
    """Yield the workloads in order of measurement.

    size: "full", or "tiny" for a trial run of a few seconds on a CPU.
    """
    if size == "tiny":
        small = {"layers": 2, "vocab": 512, "ubatch": 64, "decode": 3, "repeat": 1, "threads": 1}
        yield Workload("qwen3-0.6b", (96, 320), recipes=(), **small)
        yield Workload("qwen3-0.6b", (320,), recipes=("fast", "stream"), **small)
        yield Workload("qwen3-0.6b", (320,), recipes=("memory",), kv="q8_0", **small)
        return
    # A difference of two percent must exceed the noise, so short workloads are repeated often.
    for length, rounds in ((512, 15), (8192, 5), (32768, 3)):
        yield Workload("qwen3-4b", (length,), decode=64, repeat=rounds, recipes=())
    for length, rounds in ((_LONG, 1), (32768, 2), (8192, 3)):
        yield Workload("qwen3-4b", (length,), repeat=rounds)
    yield Workload("qwen3-4b", (_LONG,), ubatch=2048, repeat=1)
    yield Workload("qwen3-4b", (_LONG,), kv="q8_0", repeat=1)
    for shape in ("qwen3-0.6b", "llama-3.1-8b"):
        for length in _LENGTHS:
            yield Workload(shape, (length,), repeat=1)
    for kv, ubatch in (("f16", 2048), ("q8_0", 512), ("q8_0", 2048)):
        for length in _LENGTHS:
            if (length, kv, ubatch) not in ((_LONG, "f16", 2048), (_LONG, "q8_0", 512)):
                yield Workload("qwen3-4b", (length,), kv=kv, ubatch=ubatch, repeat=1)


def write_model(workload: Workload, folder: Path) -> Path:
    """Return the path of the workload's model in `folder`. A missing model is written first."""
    from swaa_edge.shapes import write_shape

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{workload.shape}-{workload.layers or 'all'}-{workload.vocab or 'all'}.gguf"
    if not path.exists():
        write_shape(path, workload.shape, layers=workload.layers, vocab=workload.vocab, ftype="Q8_0")
    return path


def measure(workload: Workload, model: Path, patched: Path, baseline: Path, runner: Runner, *, gpu: bool) -> Result:
    """Measure a workload with `bench.bench`. Return the rows, the fit and the problems.

    Raises `CheckError` if the benchmark fails. When time runs out, raises `OutOfTime` with the finished rows.
    """
    from swaa_edge.bench import bench
    from swaa_edge.engine.configurations import FULL
    from swaa_edge.engine.settings import EngineSettings
    from swaa_edge.errors import SwaaError

    os.environ["SWAA_EDGE_LIB_PATH"] = str(patched)
    settings = EngineSettings(
        n_batch=workload.ubatch,
        n_ubatch=workload.ubatch,
        cache_type=workload.kv,
        n_threads=workload.threads,
        n_gpu_layers=-1 if gpu else 0,
    )

    def stop_when_late(_: object) -> None:
        if runner.left() <= 0:
            raise KeyboardInterrupt

    try:
        report = bench(
            model,
            workload.recipes or (FULL,),
            workload.prompts,
            decode=workload.decode,
            repeat=workload.repeat,
            engine=settings,
            baseline=baseline,
            on_progress=stop_when_late,
        )
    except SwaaError as error:
        raise CheckError(str(error)) from None
    if gpu and not report.libraries["patched"]["gpus"]:
        raise CheckError("llama.cpp found no GPU")
    document = report.to_dict()
    result = {"rows": [_row(workload, row) for row in document["rows"]], "fit": document["fit"]}
    if report.stopped == "interrupted":
        raise OutOfTime(result) if runner.left() <= 0 else KeyboardInterrupt
    return result | {"problems": [str(report.stopped)] if report.stopped else []}


def _row(workload: Workload, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the check's document, with the seconds of the median round.

    "full" means full attention on the unpatched library. "off" means full attention on the patched library. Ratios are
    relative to "full". The bound is relative to "off".
    """
    name, decode = row.pop("config"), row["decode_tokens"] / row["decode_tok_s"] if row["decode_tok_s"] else 0.0
    ours = {
        "shape": workload.shape,
        "recipe": {"unpatched": "full", "full": "off"}.get(name, name),
        "kv": workload.kv,
        "ubatch": workload.ubatch,
        "rounds": len(row.pop("repeats")),
        "ratio": row.pop("vs_unpatched"),
        "prefill_ratio": row.pop("prefill_vs_unpatched"),
        "decode_ratio": row.pop("decode_vs_unpatched"),
        "decode_seconds": decode,
        "seconds": row["prefill_seconds"] + decode,
    }
    return row | ours
