"""Measure the accuracy that SWAA costs and the time that SWAA saves, with a small model in the package.

The demo takes about a minute and downloads nothing. The model was trained with full attention to find facts anywhere in
2,048 tokens (swaa_edge/models/README.md). The demo asks the same questions under each of `configurations`. Each prompt
fills the model's context.

Such prompts are too short to show the speed-up. So the demo also times a long prompt. The layers for the long prompt
have the shape of a real model, and random weights.

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
#: The model's context, and the part reserved for an answer, in tokens.
CONTEXT, ANSWER = 2048, 48
#: About a sixteenth of the recipes' 2,048, 100 and 128 tokens, because the context is a sixteenth of 32k.
WINDOW, SINKS, TAIL = CONTEXT // 16, 8, 8
#: FA decode, sinks, a tail, and full attention in the layers `CHOSEN`. These are the quarter of the layers that
#: `calibrate --method greedy` chose (docs/results.md).
CALIBRATED = "calibrated"
#: `fast` without the tail, as in the paper. Shows how much accuracy a direct answer then loses.
NO_TAIL = "fast, no tail"
CHOSEN = (1, 2)
#: Questions per configuration and task.
SAMPLES = 8
SEED = 2026
#: Tokens of the long prompt, one of `shapes.SHAPES`, the number of layers, and the recipe to time.
LONG, SHAPE, LAYERS, TIMED = 16384, "qwen3-0.6b", 2, "fast"


class Demo(Comparison):
    """A comparison of answers. The document also holds the times of a long prompt, under "long_prompt"."""

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
    """Return the configurations to compare. Window, sinks and tail are reduced to fit the model's short context."""
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
    """Compare the demo model's answers under each of `configurations`, and time a long prompt.

    The facts to retrieve lie outside the window of the prompt's last token.

    samples: number of questions per configuration and task.
    plot_file: path for a plot of accuracy over prefill speed-up; an existing file is replaced.
    threads: number of CPU threads (default: all cores).
    on_progress: as for `evaluate.compare`.

    Raises `ModelFileError` if the model is missing, and `ConfigError` if `plot_file` is given without matplotlib.
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
    """Time the long prompt. Return (times, None), or (None, reason) if the measurement ended early."""
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
