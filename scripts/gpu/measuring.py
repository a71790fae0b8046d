"""The benchmark of the GPU check: which shapes, prompts and caches, in which order; swaa_edge.bench does the measuring.

One stage is one model, cache type, ubatch and prompt length, with full attention on the unpatched library and every
recipe on ours taking turns in it. The most telling stages come first, since time may end before the list does.

    for plan in plans("full"): rows = measure(plan, model, patched, baseline, runner)["rows"]
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.errors import CheckError, OutOfTime
from gpu.stages import Runner

RECIPES = ("quality", "balanced", "fast", "memory", "stream")
_LONG, _LENGTHS = 131072, (8192, 32768, 131072)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One stage. prompts, decode, ubatch in tokens; layers, vocab: of the shape, None for its own; threads: of the CPU;
    recipes: () for SWAA turned off in the patched library, which shows what the patches cost."""

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


def plans(size: str) -> Iterator[Plan]:
    """The stages in order. size: "full"; or "tiny", which shows that it all works, in seconds on a CPU."""
    if size == "tiny":
        small = {"layers": 2, "vocab": 512, "ubatch": 64, "decode": 3, "repeat": 1, "threads": 1}
        yield Plan("qwen3-0.6b", (96, 320), recipes=(), **small)
        yield Plan("qwen3-0.6b", (320,), recipes=("fast", "stream"), **small)
        yield Plan("qwen3-0.6b", (320,), recipes=("memory",), kv="q8_0", **small)
        return
    # Two percent are to be told from noise, so the short ones are measured often.
    for length, rounds in ((512, 15), (8192, 5), (32768, 3)):
        yield Plan("qwen3-4b", (length,), decode=64, repeat=rounds, recipes=())
    for length, rounds in ((_LONG, 1), (32768, 2), (8192, 3)):
        yield Plan("qwen3-4b", (length,), repeat=rounds)
    yield Plan("qwen3-4b", (_LONG,), ubatch=2048, repeat=1)
    yield Plan("qwen3-4b", (_LONG,), kv="q8_0", repeat=1)
    for shape in ("qwen3-0.6b", "llama-3.1-8b"):
        for length in _LENGTHS:
            yield Plan(shape, (length,), repeat=1)
    for kv, ubatch in (("f16", 2048), ("q8_0", 512), ("q8_0", 2048)):
        for length in _LENGTHS:
            if (length, kv, ubatch) not in ((_LONG, "f16", 2048), (_LONG, "q8_0", 512)):
                yield Plan("qwen3-4b", (length,), kv=kv, ubatch=ubatch, repeat=1)


def write_model(plan: Plan, folder: Path) -> Path:
    """The plan's model in `folder`, written if it is not there."""
    from swaa_edge.bench.random_model import write_shape

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plan.shape}-{plan.layers or 'all'}-{plan.vocab or 'all'}.gguf"
    if not path.exists():
        write_shape(path, plan.shape, layers=plan.layers, vocab=plan.vocab, ftype="Q8_0")
    return path


def measure(plan: Plan, model: Path, patched: Path, baseline: Path, runner: Runner, *, gpu: bool) -> dict[str, Any]:
    """The rows of a plan, of what `bench.bench` gives. Raises `CheckError`, `OutOfTime` with the rows so far."""
    from swaa_edge import native
    from swaa_edge.bench import bench
    from swaa_edge.bench.report import Settings
    from swaa_edge.config import SwaaConfig
    from swaa_edge.errors import SwaaError

    os.environ[native.PATH_VARIABLE] = str(patched)
    configs: dict[str, Any] = {name: SwaaConfig.from_recipe(name) for name in plan.recipes} or {"off": False}
    settings = Settings(
        decode=plan.decode,
        repeat=plan.repeat,
        batch=plan.ubatch,
        ubatch=plan.ubatch,
        cache_type=plan.kv,
        threads=plan.threads,
        gpu_layers=-1 if gpu else 0,
    )

    def stop_when_late(_: object) -> None:
        if runner.left() <= 0:
            raise KeyboardInterrupt

    try:
        report = bench(model, configs, plan.prompts, settings=settings, baseline=baseline, on_progress=stop_when_late)
    except SwaaError as error:
        raise CheckError(str(error)) from None
    if gpu and not report.libraries["full"]["gpus"]:
        raise CheckError("llama.cpp found no GPU")
    document = report.to_dict()
    result = {"rows": [_row(plan, row) for row in document["rows"]], "fit": document["fit"]}
    if report.stopped == "interrupted":
        raise OutOfTime(result)
    return result | {"problems": [str(report.stopped)] if report.stopped else []}


def _row(plan: Plan, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the check's document: seconds are of the median round."""
    decode = row["decode_tokens"] / row["decode_tok_s"] if row["decode_tok_s"] else 0.0
    kept = (
        "prompt_tokens",
        "decode_tokens",
        "ratio",
        "prefill_ratio",
        "decode_ratio",
        "bound",
        "ratio_to_bound",
        "prefill_seconds",
        "device",
        "kv_bytes",
        "compute_buffer_bytes",
    )
    return {
        "shape": plan.shape,
        "recipe": row["config"],
        "kv": plan.kv,
        "ubatch": plan.ubatch,
        "rounds": len(row["repeats"]),
        **{key: row[key] for key in kept},
        "decode_seconds": decode,
        "seconds": row["prefill_seconds"] + decode,
    }
