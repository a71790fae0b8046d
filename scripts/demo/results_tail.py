"""Measures how a dense tail changes accuracy on the demo model, for docs/results.md.

    document = measure_tail(samples=50, threads=2)      # python scripts/demo/results.py measure-tail

The questions are the first questions of each task in the main table of docs/results.md.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

from demo.results_measure import BUILD, EVALUATED
from swaa_edge import SwaaConfig, SwaaLlama
from swaa_edge.config import FULL_ATTENTION, Configuration
from swaa_edge.demo import ANSWER, CONTEXT, MODEL, SINKS, TAIL, WINDOW
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.evaluate.run import evaluate
from swaa_edge.evaluate.tasks import TASKS, TaskSettings, build
from swaa_edge.generate.prompts import Prompts
from swaa_edge.support.journal import Journal
from swaa_edge.support.machine import machine
from swaa_edge.support.progress import progress_bar

#: The layers with full attention of each recipe, and the tails to measure.
RECIPES = {"fast": "none", "balanced": "1::4", "quality": "1::2"}
TAILS = {"fast": (1, TAIL, 2 * TAIL), "balanced": (TAIL,), "quality": (TAIL,)}


def configurations() -> dict[str, Configuration]:
    """Return the configurations: full attention, a bare window, and each recipe with its tails."""
    return {
        "full": FULL_ATTENTION,
        "naive": SwaaConfig(WINDOW),
        **{
            f"{name}, tail {tail}": SwaaConfig(WINDOW, SINKS, layers, True, tail)
            for name, layers in RECIPES.items()
            for tail in TAILS[name]
        },
    }


def measure_tail(samples: int, threads: int) -> dict[str, Any]:
    """Ask every configuration `samples` questions per task. Return the document. Resumes an interrupted run."""
    engine = EngineSettings(n_threads=threads, n_gpu_layers=0)

    def load(swaa: Configuration, n_ctx: int) -> SwaaLlama:
        return engine.load(MODEL, swaa=swaa, n_ctx=n_ctx)

    settings = TaskSettings(tuple(TASKS), (CONTEXT - ANSWER,), samples=samples, seed=EVALUATED, beyond=WINDOW)
    with Prompts(MODEL) as prompts:
        asked = build(settings, prompts)
    model, configs = hashlib.sha256(MODEL.read_bytes()).hexdigest(), configurations()
    hashed = hashlib.sha256(b"".join(sample.prompt.tobytes() for sample in asked)).hexdigest()
    BUILD.mkdir(exist_ok=True)
    key = {"model": model, "prompts": hashed, "configs": list(configs)}
    with Journal(BUILD / "results-tail.jsonl", key) as journal, progress_bar(True) as show:
        report = evaluate(load, configs, asked, max_tokens=ANSWER, journal=journal, on_progress=show)
    if report.stopped:
        sys.exit("stopped early; run the same command to resume")
    document = report.to_dict()
    return {
        "table": document["table"],
        "cells": document["cells"],
        "model_sha256": model,
        "samples_per_task": samples,
        "machine": machine(),
    }
