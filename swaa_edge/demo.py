"""Measure in a minute what SWAA costs and gains, on a small model that ships with the package.

The model (swaa_edge/models/README.md) was trained from scratch with full attention to find facts anywhere in 2,048
tokens. The demo asks this model the same questions under full attention, a bare sliding window, each recipe, and the
layers that `calibrate` chooses. The prompts fill the model's whole context. The demo measures accuracy and speed on
this machine, and downloads nothing.

    print(demo())
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from swaa_edge.config import FULL_ATTENTION, RECIPES, Configuration, SwaaConfig
from swaa_edge.engine.configurations import FULL, NAIVE
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ModelFileError
from swaa_edge.support.progress import OnProgress

if TYPE_CHECKING:
    from swaa_edge.evaluate import Comparison

MODEL = Path(__file__).parent / "models" / "demo-Q8_0.gguf"
#: The context that the model was trained for, and the part of it for an answer; tokens.
CONTEXT, ANSWER = 2048, 48
#: A sixteenth of the context, as 2,048 is of 32k; the sinks are the same fraction of the recipes' 100.
WINDOW, SINKS = CONTEXT // 16, 8
#: FA decode, sinks and these layers in full attention: the choice of `calibrate --method greedy` for a quarter of the
#: layers (docs/results.md).
CALIBRATED = "calibrated"
CHOSEN = (1, 2)
#: Questions per configuration and task.
SAMPLES = 8
SEED = 2026


def configurations() -> dict[str, Configuration]:
    """Full attention, the bare window, the recipes and the calibrated layers, with this model's window and sinks."""
    sized = {"window_size": WINDOW, "sink_count": SINKS}
    recipes = {name: dataclasses.replace(recipe.config, **sized) for name, recipe in RECIPES.items()}
    return {
        FULL: FULL_ATTENTION,
        NAIVE: SwaaConfig(WINDOW),
        **recipes,
        CALIBRATED: SwaaConfig(WINDOW, SINKS, CHOSEN, True),
    }


def demo(
    *,
    samples: int = SAMPLES,
    plot_file: str | None = None,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Ask the demo model `samples` questions per task under each of `configurations`, and compare the results.

    The facts to retrieve lie outside the window of a prompt's last token. plot_file: path for a plot of accuracy
    over speed; an existing file is replaced. threads: number of CPU threads (default: all cores). on_progress: as for
    `evaluate.compare`.

    Raises `ModelFileError` if the model is missing, and `ConfigError` for a plot_file if matplotlib is missing.
    """
    from swaa_edge.evaluate import compare

    if not MODEL.is_file():
        raise ModelFileError(f"{MODEL} is missing; reinstall swaa-edge, or train the model with scripts/demo/train.py")
    return compare(
        MODEL,
        configurations(),
        engine=EngineSettings(n_threads=threads or os.cpu_count() or 1, n_gpu_layers=0),
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
