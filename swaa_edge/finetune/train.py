"""LoRA under the SWAA mask, with PEFT and transformers' Trainer.

    run = Run("Qwen3-4B", "train.jsonl", "adapter", SwaaConfig.from_recipe("quality"), Settings(epochs=2))
    outcome = run.train(on_step=print)

The adapter's folder gets the recipe and the base model it is for (`files.lora_training`). What is needed to go on after
an interruption lies in it, in `training`, until the training ends: the same call goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from swaa_edge import hf
from swaa_edge.config import LABEL_LIMIT, SwaaConfig
from swaa_edge.errors import ConfigError, OutputError, TrainingError, UnsupportedModelError
from swaa_edge.files.lora_training import BaseModel, Training
from swaa_edge.finetune.data import Collator, Example, read_examples, split
from swaa_edge.finetune.folder import AdapterFolder
from swaa_edge.finetune.memory import out_of_memory
from swaa_edge.finetune.settings import Settings


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a training stands. step, total: optimizer's. loss: mean over the last steps; held_out: of the examples held
    back, when they were last measured; both in nats per token of a reply. seconds_left: a guess."""

    step: int
    total: int
    loss: float | None
    held_out: float | None
    seconds_left: float | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """stopped: at the caller's wish, before the end; then there is no adapter yet. history: of losses, by step.

    resumed: the step this call began at. examples, held_out, too_long: how many were learned from, held back, left out.
    """

    stopped: bool
    step: int
    total: int
    resumed: int
    examples: int
    held_out: int
    too_long: int
    seconds: float
    history: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


class Run:
    """One training, checked and loaded; see the module.

    model: folder of a Hugging Face model. data: see `swaa_edge.finetune.data`. output: the adapter's folder, made
    if it is missing. force: replace the adapter in it, or the state of another run.

    Raises `ModelFileError`, `DataFileError`, `ConfigError`, `UnsupportedModelError` for what is wrong with these, and
    `OutputError` if `output` holds something else.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        data: str | os.PathLike[str],
        output: str | os.PathLike[str],
        swaa: SwaaConfig,
        settings: Settings | None = None,
        *,
        force: bool = False,
    ) -> None:
        self.settings, self.folder = settings or Settings(), AdapterFolder(output)
        self.base = BaseModel.of(model)
        swaa.fa_decode_layers(self.base.n_layers)
        label = swaa.adapter or os.path.basename(os.path.abspath(output))[:LABEL_LIMIT]
        self.swaa = dataclasses.replace(swaa, adapter=label)
        self._stop = False
        key = {
            "base": self.base.fingerprint,
            "data": _sha256(data),
            "swaa": {name: value for name, value in self.swaa.to_dict().items() if name not in ("recipe", "adapter")},
            "settings": dataclasses.asdict(self.settings),
        }
        key = json.loads(json.dumps(key))
        self.folder.check(key, force)
        tokenizer = _loaded(transformers.AutoTokenizer, model)
        self._model = self._adapted(model)
        length = self.settings.max_length or self._model.config.get_text_config().max_position_embeddings
        examples = read_examples(data, tokenizer, max_length=length, chat=self.settings.chat)
        self.too_long = examples.too_long
        self.examples, self.held_out = split(examples.kept, self.settings.holdout, self.settings.seed)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        self._collator, self._key = Collator(pad), key

    def stop(self) -> None:
        """End `train` after the step at work, keeping its state; from any thread or a signal handler."""
        self._stop = True

    def train(self, *, on_step: Callable[[Step], object] | None = None) -> Outcome:
        """Train to the end, or until `stop`; then write the adapter. Raises `TrainingError` if the loss isn't a number
        any more or memory runs out; what was saved before stays, and the same call goes on from there."""
        state = self.folder.open(self._key)
        watch = _Watch(self, on_step)
        trainer = self._trainer(state, watch)
        kept = self.folder.last_state()
        started, before = time.monotonic(), []
        try:
            if self.held_out and kept is None:
                before = [{"step": 0, "held_out": trainer.evaluate()["eval_loss"]}]
            trainer.train(resume_from_checkpoint=None if kept is None else str(kept.path))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise TrainingError(
                f"memory ran out at step {trainer.state.global_step + 1}; lower --batch or --max-length, or add "
                f"--gradient-checkpointing{self.folder.told()}"
            ) from error
        except OSError as error:
            raise OutputError(f"cannot write in {state}: {error.strerror or error}") from error
        history = before + _history(trainer.state.log_history)
        stopped = self._stop and trainer.state.global_step < trainer.state.max_steps
        outcome = Outcome(
            stopped=stopped,
            step=trainer.state.global_step,
            total=trainer.state.max_steps,
            resumed=0 if kept is None else kept.step,
            examples=len(self.examples),
            held_out=len(self.held_out),
            too_long=self.too_long,
            seconds=time.monotonic() - started,
            history=history,
        )
        if not stopped:
            more = {
                "settings": dataclasses.asdict(self.settings),
                "data": {"sha256": self._key["data"], "examples": outcome.examples, "held_out": outcome.held_out},
                "steps": outcome.step,
                "losses": history,
            }
            self.folder.save(trainer.model, Training(self.swaa, self.base, more))
        return outcome

    def _adapted(self, folder: str | os.PathLike[str]) -> Any:
        """The model under the mask, with matrices to train beside its own, which stay as they are."""
        chosen = self.settings
        transformers.set_seed(chosen.seed)
        model = _loaded(transformers.AutoModelForCausalLM, folder, dtype=torch.bfloat16 if chosen.half else "auto")
        if not chosen.half:
            model = model.float()
        hf.apply(model, self.swaa)
        model.config.use_cache = False
        lora = peft.LoraConfig(
            r=chosen.rank,
            lora_alpha=chosen.alpha,
            use_rslora=chosen.rslora,
            lora_dropout=chosen.dropout,
            target_modules=list(chosen.targets),
            task_type=peft.TaskType.CAUSAL_LM,
        )
        try:
            adapted = peft.get_peft_model(model, lora)
        except ValueError as error:
            linear = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if _trainable(part)})
            raise UnsupportedModelError(
                f"{self.base.name} has no layers called {', '.join(chosen.targets)}; --targets can name "
                f"{', '.join(linear)}"
            ) from error
        if chosen.checkpointing:
            adapted.enable_input_require_grads()
        return adapted

    def _trainer(self, state: Path, watch: _Watch) -> transformers.Trainer:
        chosen = self.settings
        per_step = chosen.batch * chosen.accumulate
        total = chosen.steps or max(1, math.ceil(len(self.examples) / per_step * chosen.epochs))
        every = chosen.every or max(1, min(100, total // 10))
        held = bool(self.held_out)
        kinds = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        checkpointing = kinds if chosen.checkpointing else {}
        arguments = _quietly(
            transformers.TrainingArguments,
            output_dir=str(state),
            per_device_train_batch_size=chosen.batch,
            per_device_eval_batch_size=chosen.batch,
            gradient_accumulation_steps=chosen.accumulate,
            max_steps=total,
            learning_rate=chosen.rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(total * chosen.warmup),
            weight_decay=0.0,
            bf16=chosen.half,
            use_cpu=not torch.accelerator.is_available(),
            **checkpointing,
            logging_steps=max(1, min(10, every)),
            logging_nan_inf_filter=False,
            eval_strategy="steps" if held else "no",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=held,
            metric_for_best_model="eval_loss" if held else None,
            greater_is_better=False if held else None,
            prediction_loss_only=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to=[],
            seed=chosen.seed,
            log_level="error",
        )
        callbacks: list[transformers.TrainerCallback] = [watch]
        if held and chosen.patience:
            callbacks.append(transformers.EarlyStoppingCallback(chosen.patience))
        trainer = _Trainer(
            model=self._model,
            args=arguments,
            data_collator=self._collator,
            train_dataset=_Listed(self.examples),
            eval_dataset=_Listed(self.held_out) if held else None,
            callbacks=callbacks,
        )
        trainer.kept = self.folder.told
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer


class _Trainer(transformers.Trainer):
    """Trainer that stops at a loss that is no number, before a step would spoil the weights."""

    kept: Callable[[], str]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower --rate, now "
                f"{self.args.learning_rate:g}{', or train with --no-bf16' if self.args.bf16 else ''}{self.kept()}"
            )
        return found


class _Watch(transformers.TrainerCallback):
    """Tells the caller of each step, and ends the training when it wants that."""

    def __init__(self, run: Run, on_step: Callable[[Step], object] | None) -> None:
        self._run, self._report = run, on_step
        self._loss = self._held_out = None
        self._started, self._first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started, self._first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._loss = (logs or {}).get("loss", self._loss)
        self._held_out = (logs or {}).get("eval_loss", self._held_out)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._run._stop and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        elif state.global_step == state.max_steps and self._run.held_out:
            control.should_evaluate = control.should_save = True
        if self._report:
            each = (time.monotonic() - self._started) / max(1, state.global_step - self._first)
            left = each * (state.max_steps - state.global_step)
            self._report(Step(state.global_step, state.max_steps, self._loss, self._held_out, left))


class _Listed(torch.utils.data.Dataset):
    def __init__(self, examples: list[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, at: int) -> Example:
        return self._examples[at]


def _history(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """By step: loss, and the loss of the examples held back."""
    named = {"loss": "loss", "eval_loss": "held_out"}
    return [{"step": line["step"], named[name]: line[name]} for line in log for name in named if name in line]


def _trainable(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear)


def _loaded(kind: Any, folder: str | os.PathLike[str], **options: Any) -> Any:
    try:
        with contextlib.redirect_stdout(None):
            return kind.from_pretrained(os.fspath(folder), local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"transformers can't load {folder}: {' '.join(str(error).split())}") from error


def _quietly(make: Any, **options: Any) -> Any:
    """`make(**options)`, without word of options that a later version will call otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return make(**options)


def _sha256(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ConfigError(f"cannot read the data file {os.fspath(path)}: {error.strerror}") from error
    return digest.hexdigest()
