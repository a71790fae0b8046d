"""A Trainer that checks the loss, reports progress and can be stopped. Also converts our settings to TrainingArguments.

trainer = CheckedTrainer(resume_hint, model=model, args=arguments(settings, state, 80, True), callbacks=[control], ...)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from swaa_edge.errors import TrainingError
from swaa_edge.finetune.settings import Settings
from swaa_edge.support.progress import OnProgress, Progress

# By Trainer's name of a loss: our name in messages, and our name in the history.
_LOSSES = {"loss": ("loss", "loss"), "eval_loss": ("validation loss", "val_loss")}


class Control(transformers.TrainerCallback):
    """Reports each step. If `stopping` is True, training ends after the current step."""

    def __init__(self, validates: bool) -> None:
        self.stopping = False
        self.on_progress: OnProgress | None = None
        self._validates = validates
        self._losses: dict[str, float] = {}
        self._logged = 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._losses |= {key: value for key, value in (logs or {}).items() if key in _LOSSES}
        self._logged = max(1, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopping and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        elif state.global_step == state.max_steps and self._validates:
            control.should_evaluate = control.should_save = True
        if self.on_progress:
            losses = (f"{name} {self._losses[key]:.3f}" for key, (name, _) in _LOSSES.items() if key in self._losses)
            text = ", ".join([f"step {self._logged} of {state.max_steps}", *losses])
            self.on_progress(Progress(state.global_step, state.max_steps, text))


def history(trainer: transformers.Trainer) -> list[dict[str, float]]:
    """Return the logged losses. An entry is {"step", "loss"}, or {"step", "val_loss"} for a validation."""
    log = trainer.state.log_history
    return [
        {"step": line["step"], name: line[key]} for line in log for key, (_, name) in _LOSSES.items() if key in line
    ]


def arguments(settings: Settings, state: Path, n_examples: int, validates: bool) -> transformers.TrainingArguments:
    """Convert our settings to Trainer's arguments.

    state: folder for the checkpoints.
    n_examples: number of training examples.
    validates: whether there are validation examples.
    """
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    total = settings.max_steps or max(1, math.ceil(n_examples / per_step * settings.epochs))
    eval_steps = settings.eval_steps or max(1, min(100, total // 10))
    more: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if validates:
        more |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about options that a later version renames
        return transformers.TrainingArguments(
            output_dir=str(state),
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            max_steps=total,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(total * settings.warmup_ratio),
            weight_decay=0.0,
            bf16=settings.bf16,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=max(1, min(10, eval_steps)),
            logging_nan_inf_filter=False,
            eval_strategy="steps" if validates else "no",
            eval_steps=eval_steps,
            save_strategy="steps",
            save_steps=eval_steps,
            save_total_limit=2,
            load_best_model_at_end=validates,
            prediction_loss_only=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to=[],
            seed=settings.seed,
            log_level="error",
            **more,
        )


class CheckedTrainer(transformers.Trainer):
    """A Trainer that raises `TrainingError` at a NaN or infinite loss, before the weights are damaged.

    resume_hint: function that returns the end of the error message.
    more: arguments of Trainer.
    """

    def __init__(self, resume_hint: Callable[[], str], **more: Any) -> None:
        super().__init__(**more)
        self._resume_hint = resume_hint
        self.remove_callback(transformers.PrinterCallback)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}; lower --learning-rate (now "
                f"{self.args.learning_rate:g}){', or train with --no-bf16' if self.args.bf16 else ''}"
                f"{self._resume_hint()}"
            )
        return found
