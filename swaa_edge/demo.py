"""Measure in a minute the accuracy that SWAA costs and the time that it saves, on a small model in the package.

The model (swaa_edge/models/README.md) was trained from scratch with full attention to find facts anywhere in 2,048
tokens. The demo asks this model the same questions under full attention, a bare sliding window, each recipe, the recipe
`fast` without its tail, and the layers that `calibrate` chooses. The prompts fill the model's whole context. Prompts of
2,048 tokens are too short to show the speed-up, so the demo also times a long prompt, on a few layers that have the
shape of a real model but random weights. The demo measures accuracy and speed on this machine, and downloads nothing.

    print(demo())
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from swaa_edge.config import FULL_ATTENTION, RECIPES, Configuration, SwaaConfig
from swaa_edge.engine.configurations import FULL, NAIVE
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ModelFileError
from swaa_edge.evaluate.comparison import Comparison, compare
from swaa_edge.evaluate.table import keeps, speed_up
from swaa_edge.support.interrupt import Stopped
from swaa_edge.support.progress import OnProgress

MODEL = Path(__file__).parent / "models" / "demo-Q8_0.gguf"
#: The context that the model was trained for, and the part of it for an answer; tokens.
CONTEXT, ANSWER = 2048, 48
#: A sixteenth of the context, as 2,048 is of 32k; sinks and tail are the same fraction of the recipes' 100 and 128.
WINDOW, SINKS, TAIL = CONTEXT // 16, 8, 8
#: FA decode, sinks and these layers in full attention: the choice of `calibrate --method greedy` for a quarter of the
#: layers (docs/results.md).
CALIBRATED = "calibrated"
#: `fast` without its tail: what the paper's form costs a question that wants its answer at once.
NO_TAIL = "fast, no tail"
CHOSEN = (1, 2)
#: Questions per configuration and task.
SAMPLES = 8
SEED = 2026
#: The long prompt, in tokens, and what it is timed in: layers of a shape of `swaa_edge.shapes`, under this recipe.
LONG, SHAPE, LAYERS, TIMED = 16384, "qwen3-0.6b", 2, "fast"


class Demo(Comparison):
    """A comparison of answers, with the times of a long prompt in the field "long_prompt" of its document."""

    def __str__(self) -> str:
        timed = self.document["long_prompt"]
        if timed is None:
            return super().__str__()
        answers = Comparison(self.document | {"conclusion": None})
        speed = (
            f"prefill of {timed['prompt_tokens']:,} tokens in {timed['layers']} layers of {timed['shape']}: full "
            f"attention {timed['full_seconds']:.1f} s, {timed['config']} {timed['seconds']:.1f} s, "
            f"ratio {timed['prefill_ratio']:.2f}x"
        )
        return f"{answers}\n\n{speed}\n\n{self.document['conclusion']}"


def configurations() -> dict[str, Configuration]:
    """Return the configurations to compare, with window, sinks and tail reduced to suit the model's short context."""
    recipes = {
        name: dataclasses.replace(
            recipe.config, window_size=WINDOW, sink_count=SINKS, tail_count=min(recipe.config.tail_count, TAIL)
        )
        for name, recipe in RECIPES.items()
    }
    return {
        FULL: FULL_ATTENTION,
        NAIVE: SwaaConfig(WINDOW),
        **recipes,
        NO_TAIL: dataclasses.replace(recipes["fast"], tail_count=0),
        CALIBRATED: SwaaConfig(WINDOW, SINKS, CHOSEN, True, TAIL),
    }


def demo(
    *,
    samples: int = SAMPLES,
    plot_file: str | None = None,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> Demo:
    """Ask the demo model `samples` questions per task under each of `configurations`, and compare the results.

    The facts to retrieve lie outside the window of a prompt's last token. The result also has the times of a long
    prompt.

    plot_file: path for a plot of accuracy over prefill speed-up; an existing file is replaced.
    threads: number of CPU threads (default: all cores).
    on_progress: as for `evaluate.compare`.

    Raises `ModelFileError` if the model is missing, and `ConfigError` if a plot is requested but matplotlib is missing.
    """
    if not MODEL.is_file():
        raise ModelFileError(f"{MODEL} is missing; reinstall swaa-edge, or train the model with scripts/demo/train.py")
    engine = EngineSettings(n_threads=threads or os.cpu_count() or 1, n_gpu_layers=0)
    comparison = compare(
        MODEL,
        configurations(),
        engine=engine,
        plot_file=plot_file,
        force=True,
        fresh=True,
        on_progress=on_progress,
        prompt_tokens=CONTEXT - ANSWER,
        max_tokens=ANSWER,
        samples=samples,
        seed=SEED,
        depths=None,
        beyond=WINDOW,
    )
    if comparison.stopped is not None:
        return Demo(comparison.document | {"long_prompt": None}, comparison.stopped)
    timed, stopped = _long_prompt(engine, on_progress)
    document = comparison.document | {"long_prompt": timed}
    rows = {row["config"]: row for row in document["table"]}
    if timed and rows[FULL]["correct"]:
        document["conclusion"] = (
            f"{TIMED} {keeps(rows[TIMED], rows[FULL])}, and evaluates a prompt of {LONG:,} tokens at a "
            f"{speed_up(timed['prefill_ratio'])}."
        )
    return Demo(document, stopped)


def _long_prompt(engine: EngineSettings, on_progress: OnProgress | None) -> tuple[dict[str, Any] | None, Stopped]:
    """Return the times of the long prompt and None, or if the measurement ended early, None and the reason."""
    from swaa_edge.bench import bench
    from swaa_edge.shapes import write_shape

    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(Path(folder) / "shape.gguf", SHAPE, layers=LAYERS, vocab=512)
        report = bench(model, [TIMED], [LONG], decode=1, repeat=1, engine=engine, on_progress=on_progress)
    if report.stopped is not None:
        return None, report.stopped
    times = {row["config"]: row for row in report.rows()}
    return {
        "shape": SHAPE,
        "layers": LAYERS,
        "prompt_tokens": LONG,
        "config": TIMED,
        "full_seconds": times[FULL]["prefill_seconds"],
        "seconds": times[TIMED]["prefill_seconds"],
        "prefill_ratio": times[TIMED]["prefill_ratio"],
        "swaa": times[TIMED]["swaa"],
    }, None
