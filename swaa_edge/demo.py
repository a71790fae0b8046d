"""What SWAA costs and brings, shown in a minute on a small model that ships with the package.

The model (swaa_edge/models/README.md) was trained from scratch with full attention to find facts anywhere in 2,048
tokens. Here it reads prompts of its whole context under full attention, a bare sliding window, each recipe, and with
the layers that `calibrate` keeps in full attention; its answers are counted. Nothing is downloaded, nothing is made up:
the figures are this machine's.

    report = demo(); print(report["table"], report["conclusion"])
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from swaa_edge.config import RECIPES, Configuration, SwaaConfig
from swaa_edge.engine.configurations import FULL
from swaa_edge.errors import ModelFileError
from swaa_edge.evaluate.run import evaluate
from swaa_edge.evaluate.tasks import TASKS, TaskSettings, build
from swaa_edge.support.figure import check_plot
from swaa_edge.support.progress import OnProgress

MODEL = Path(__file__).parent / "models" / "demo-Q8_0.gguf"
#: The context that the model was trained for, and what an answer may take of it; tokens.
CONTEXT, ANSWER = 2048, 48
#: A sixteenth of the context, as 2,048 is of 32k; the recipes' sinks are as small a share of theirs.
WINDOW, SINKS = CONTEXT // 16, 8
#: A sliding window and nothing else; and FA decode, sinks and these layers in full attention, which `calibrate
#: --method greedy` chose when it might keep a quarter (docs/results.md).
NAIVE, CALIBRATED = "naive", "calibrated"
CHOSEN = (1, 2)
#: Answers per configuration and task.
SAMPLES = 8
SEED = 2026


def configurations() -> dict[str, Configuration]:
    """Full attention, the bare window, the recipes and the calibrated layers, with this model's window and sinks."""
    sized = {"window_size": WINDOW, "sink_count": SINKS}
    recipes = {name: dataclasses.replace(recipe.config, **sized) for name, recipe in RECIPES.items()}
    calibrated = SwaaConfig(WINDOW, SINKS, CHOSEN, True)
    return {FULL: False, NAIVE: SwaaConfig(WINDOW), **recipes, CALIBRATED: calibrated}


def plan(samples: int, seed: int = SEED) -> TaskSettings:
    """All tasks, at the whole context; nothing that is asked for is in the window of the prompt's last token."""
    return TaskSettings(tuple(TASKS), (CONTEXT - ANSWER,), samples=samples, seed=seed, beyond=WINDOW)


def demo(
    *,
    samples: int = SAMPLES,
    plot: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Ask the demo model `samples` questions of each task under each of `configurations`, and count.

    plot: a PNG of accuracy over time to write, in place of one that is there. threads: None for all cores.

    The result is plain JSON values: "table" has a row per configuration with config, accuracy, prefill_seconds,
    prefill_ratio (full attention's time over this one's) and more (`evaluate.report`); "conclusion" is a sentence.
    Raises `ModelFileError` if the model is missing, `ConfigError` for a plot without matplotlib.
    """
    from swaa_edge.evaluate.plot import plot_accuracy
    from swaa_edge.evaluate.prompts import Prompts
    from swaa_edge.llama import SwaaLlama

    if plot is not None:
        check_plot()
    if not MODEL.is_file():
        raise ModelFileError(f"{MODEL} is missing; reinstall swaa-edge, or train it with scripts/demo/train.py")
    threads = threads or os.cpu_count() or 1

    def load(swaa: Configuration, n_ctx: int) -> SwaaLlama:
        return SwaaLlama(
            str(MODEL),
            swaa=swaa,
            n_ctx=n_ctx,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            verbose=False,
        )

    with Prompts(MODEL) as prompts:
        asked = build(plan(samples), prompts)
    report = evaluate(load, configurations(), asked, max_tokens=ANSWER, together=True, on_progress=on_progress)
    if report.stopped:
        raise KeyboardInterrupt
    document = report.to_dict()
    document |= {"model": MODEL.name, "prompt_tokens": CONTEXT - ANSWER, "window": WINDOW, "sinks": SINKS}
    document["conclusion"] = conclusion(document["table"])
    if plot is not None:
        plot_accuracy(document, plot)
    return document


def conclusion(table: list[dict[str, Any]]) -> str:
    """One sentence on what the figures say: how far the bare window falls, and what the best configuration keeps."""
    rows = {row["config"]: row for row in table}
    full, naive = rows[FULL], rows[NAIVE]
    others = [row for name, row in rows.items() if name not in (FULL, NAIVE)]
    best = max(others, key=lambda row: (row["accuracy"], row["prefill_ratio"]))
    name = "FA decode with calibrated layers" if best["config"] == CALIBRATED else f"the recipe {best['config']}"
    told = f"A bare sliding window answers {naive['accuracy']:.0%} of the questions right, full attention "
    told += f"{full['accuracy']:.0%}; {name} {best['accuracy']:.0%}"
    return f"{told}, and it reads the prompt {_speed(best['prefill_ratio'])}."


def _speed(ratio: float) -> str:
    return f"{ratio:.2f} times as fast" if ratio >= 1 else f"in {1 / ratio:.2f} times the time"
