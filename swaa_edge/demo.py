"""What SWAA costs and gains, in a minute, on a small model that ships with the package.

The model (swaa_edge/models/README.md) was trained from scratch with full attention to find facts anywhere in 2,048
tokens. The demo asks it questions on prompts of its whole context under full attention, a bare sliding window, each
recipe, and with the layers in full attention that `calibrate` chooses. It measures accuracy and speed on this machine,
and downloads nothing.

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


def configurations() -> dict[str, Configuration]:
    """Full attention, the bare window, the recipes, and `fast` without its tail, in this model's size."""
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
) -> Comparison:
    """Ask the demo model `samples` questions per task under each of `configurations`, and compare the results.

    The facts to retrieve lie outside the window of a prompt's last token. plot_file: picture of accuracy over speed;
    an existing file is replaced. threads: None for all cores. on_progress: as for `evaluate.compare`.

    Raises `ModelFileError` if the model is missing, `ConfigError` for a plot without matplotlib.
    """
    from swaa_edge.evaluate import compare

    if not MODEL.is_file():
        raise ModelFileError(f"{MODEL} is missing; reinstall swaa-edge, or train it with scripts/demo/train.py")
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
