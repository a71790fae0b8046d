"""Trains a LoRA adapter under the SWAA mask: the Python function behind `swaa-edge finetune`.

outcome = finetune("Qwen3-4B", "data.jsonl", "adapter", SwaaConfig.from_recipe("quality"), learning_rate=5e-5)
print(outcome)
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import SwaaError
from swaa_edge.finetune.settings import Settings
from swaa_edge.support.atomic import atomic_outputs, check_outputs
from swaa_edge.support.figure import check_pictures, figure, picture_type
from swaa_edge.support.interrupt import interruptible
from swaa_edge.support.progress import OnProgress

if TYPE_CHECKING:
    from swaa_edge.finetune.train import Outcome, Run


def finetune(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    swaa: SwaaConfig,
    *,
    plot_file: str | None = None,
    json_file: str | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], object] = lambda line: None,
    **settings: Any,
) -> Outcome:
    """Train a LoRA adapter under the mask of `swaa`.

    model: a Hugging Face model directory.
    data: a JSON Lines or Parquet file. `swaa_edge.finetune.data` describes the records.
    output: the folder for the adapter.
    settings: values for the fields of `Settings`.
    plot_file: file for a plot of the losses.
    json_file: file for the outcome as a JSON document.
    force: whether to replace an existing adapter, `plot_file` or `json_file`.
    on_note: function that receives each line of text for the user.

    Ctrl-C ends training after the current step and raises KeyboardInterrupt. The same call resumes the training.

    Raises `SwaaError` if torch, transformers or PEFT is missing. Also raises the errors of
    `swaa_edge.finetune.train.Run`.
    """
    from swaa_edge.convert.hf_folder import read_hf_folder

    chosen = Settings(**settings)
    read_hf_folder(model)
    check_pictures(plot_file)
    check_outputs((plot_file, json_file), force=force, others=(data, output))
    try:
        from swaa_edge.finetune.train import Run
    except ImportError as error:
        raise SwaaError(f"fine-tuning needs {error.name}; pip install 'swaa-edge[finetune]'") from error
    run = Run(model, data, output, swaa, chosen, force=force)
    if run.too_long:
        on_note(f"leaving out {run.too_long} records that are longer than --max-length")
    if last := run.folder.last_checkpoint():
        on_note(f"resuming after step {last.step}")
    with atomic_outputs((plot_file, json_file), force=force) as files:
        outcome = _train(run, on_progress, on_note)
        if outcome.stopped:
            on_note(f"stopped after step {outcome.step} of {outcome.total}; the same command resumes from there")
            raise KeyboardInterrupt
        if plot_file in files:
            _plot(outcome.history, files[plot_file], picture_type(plot_file))
        if json_file in files:
            files[json_file].write_text(json.dumps(outcome.to_dict(), indent=2) + "\n", encoding="utf-8")
    return outcome


def _train(run: Run, on_progress: OnProgress | None, on_note: Callable[[str], object]) -> Outcome:
    """Train to the end or until Ctrl-C. Only a second Ctrl-C interrupts the current step."""
    outcome = None

    def stop() -> None:
        if not run.control.stopping:
            run.stop()
            on_note("stopping after this step")

    try:
        with interruptible(types.SimpleNamespace(cancel=stop)):
            outcome = run.train(on_progress=on_progress)
    except KeyboardInterrupt:
        if outcome is None:
            raise
    return outcome


def _plot(history: Sequence[Mapping[str, float]], path: Path, kind: str) -> None:
    with figure(path, size=(7, 4), kind=kind) as canvas:
        axes = canvas.subplots()
        for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(line["step"], line[name]) for line in history if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, markersize=4, label=label)
        axes.set(xlabel="step", ylabel="loss, nats per response token", ylim=(0, None))
        axes.legend()
