"""LoRA training under the SWAA mask, with PEFT and transformers' Trainer.

    run = Run("Qwen3-4B", "train.jsonl", "adapter", SwaaConfig.from_recipe("quality"), Settings(epochs=2))
    outcome = run.train(on_progress=print)

`files.lora_training` stores the recipe and the identity of the base model in the adapter's folder. During training, the
subfolder `training` holds the training state. The same call resumes an interrupted run from this state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from typing import Any

import peft
import torch
import transformers

from swaa_edge import hf
from swaa_edge.config import LABEL_LIMIT, SwaaConfig
from swaa_edge.errors import ConfigError, OutputError, TrainingError, UnsupportedModelError
from swaa_edge.files.lora_training import BaseModel, Training
from swaa_edge.finetune.data import Collator, read_examples, split
from swaa_edge.finetune.folder import AdapterFolder
from swaa_edge.finetune.hf_model import load, out_of_memory
from swaa_edge.finetune.settings import Settings
from swaa_edge.finetune.trainer import CheckedTrainer, Control, arguments, history
from swaa_edge.support.progress import OnProgress, duration


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a training run.

    model, output: the values given to `Run`.
    swaa: the recipe given to `Run`, with the name of the adapter added.
    stopped: whether `Run.stop` ended the run early. There is then no adapter yet.
    step: number of optimizer steps done.
    total: number of optimizer steps planned.
    resumed: the step that this call resumed from.
    examples, val_examples: numbers of training and validation examples.
    too_long: number of records left out as too long.
    seconds: duration of this call.
    history: the logged losses, in nats per response token. An entry is {"step", "loss"}, or {"step", "val_loss"} for a
        validation.
    """

    model: str
    output: str
    swaa: SwaaConfig
    stopped: bool
    step: int
    total: int
    resumed: int
    examples: int
    val_examples: int
    too_long: int
    seconds: float
    history: list[dict[str, float]]

    def __str__(self) -> str:
        losses = [line["val_loss"] for line in self.history if "val_loss" in line]
        early = f" of {self.total}, until the validation loss stopped improving" if self.step < self.total else ""
        text = f"{self.step} steps{early}, on {self.examples} examples in {duration(self.seconds)}"
        if losses:
            first, best = losses[0], min(losses)
            text += f"; validation loss on {self.val_examples} examples: {first:.3f} at first, {best:.3f} at best"
        merge = f"swaa-edge convert {self.model} -o OUT.gguf --lora {self.output}"
        return f"{text}\nwrote {self.output}; make a GGUF of it with: {merge}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"swaa": self.swaa.to_dict()}


class Run:
    """A training run. The constructor checks the input and loads the model.

    model: a Hugging Face model directory.
    data: a JSON Lines or Parquet file. `swaa_edge.finetune.data` describes the records.
    output: the adapter's folder. A missing folder is created.
    force: whether to replace an adapter or the training state of another run in `output`.

    Raises `ModelFileError`, `DataFileError`, `ConfigError` or `UnsupportedModelError` for invalid input. Raises
    `OutputError` if `output` holds anything but the training state of this run.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        data: str | os.PathLike[str],
        output: str | os.PathLike[str],
        swaa: SwaaConfig,
        settings: Settings,
        *,
        force: bool = False,
    ) -> None:
        self.settings, self.folder = settings, AdapterFolder(output)
        if settings.bf16 is None:
            supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            self.settings = dataclasses.replace(settings, bf16=supported)
        self.base = BaseModel.of(model)
        swaa.fa_decode_layers(self.base.n_layers)
        label = swaa.adapter or os.path.basename(os.path.abspath(output))[:LABEL_LIMIT]
        self.swaa = dataclasses.replace(swaa, adapter=label)
        # Version 0.2 stored no tail_count. A run that 0.2 began must have the same key.
        ignored = ("recipe", "adapter") if swaa.tail_count else ("recipe", "adapter", "tail_count")
        key = {
            "base": self.base.fingerprint,
            "data": _sha256(data),
            "swaa": {name: value for name, value in self.swaa.to_dict().items() if name not in ignored},
            "settings": dataclasses.asdict(self.settings),
        }
        self._hf_dir, self._key = os.fspath(model), json.loads(json.dumps(key))
        self.folder.check(self._key, force)
        tokenizer = load(transformers.AutoTokenizer, model)
        self._model = self._with_lora(model)
        length = self.settings.max_length or self._model.config.get_text_config().max_position_embeddings
        kept, self.too_long = read_examples(data, tokenizer, max_length=length, chat=self.settings.chat)
        self.examples, self.validation = split(kept, self.settings.val_fraction, self.settings.seed)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        self._collator = Collator(pad)
        self.control = Control(bool(self.validation))

    def stop(self) -> None:
        """End `train` after the current step and save the training state. Safe in threads and signal handlers."""
        self.control.stopping = True

    def train(self, *, on_progress: OnProgress | None = None) -> Outcome:
        """Train to the end and write the adapter, or train until `stop` is called.

        Raises `TrainingError` if memory runs out, or if the loss becomes NaN or infinite. The last checkpoint stays.
        The same call resumes from this checkpoint. Raises `OutputError` if the folder can't be written.
        """
        self.control.on_progress = on_progress
        trainer = self._trainer(self.folder.open(self._key), self.control)
        last = self.folder.last_checkpoint()
        started, before = time.monotonic(), []
        try:
            if self.validation and last is None:
                before = [{"step": 0, "val_loss": trainer.evaluate()["eval_loss"]}]
            trainer.train(resume_from_checkpoint=None if last is None else str(last.path))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise TrainingError(
                f"memory ran out at step {trainer.state.global_step + 1}; lower --batch-size or --max-length, or add "
                f"--gradient-checkpointing{self.folder.resume_hint()}"
            ) from error
        except OSError as error:
            raise OutputError(f"cannot write in {self.folder.path}: {error.strerror or error}") from error
        outcome = Outcome(
            model=self._hf_dir,
            output=os.fspath(self.folder.path),
            swaa=self.swaa,
            stopped=self.control.stopping and trainer.state.global_step < trainer.state.max_steps,
            step=trainer.state.global_step,
            total=trainer.state.max_steps,
            resumed=0 if last is None else last.step,
            examples=len(self.examples),
            val_examples=len(self.validation),
            too_long=self.too_long,
            seconds=time.monotonic() - started,
            history=before + history(trainer),
        )
        if not outcome.stopped:
            self._save(trainer.model, outcome)
        return outcome

    def _save(self, model: Any, outcome: Outcome) -> None:
        counts = {"examples": outcome.examples, "val_examples": outcome.val_examples}
        more = {
            "settings": dataclasses.asdict(self.settings),
            "data": {"sha256": self._key["data"], **counts},
            "steps": outcome.step,
            "losses": outcome.history,
        }
        self.folder.save(model, Training(self.swaa, self.base, more))

    def _trainer(self, state: Any, control: transformers.TrainerCallback) -> transformers.Trainer:
        patience = self.settings.patience if self.validation else 0
        return CheckedTrainer(
            self.folder.resume_hint,
            model=self._model,
            args=arguments(self.settings, state, len(self.examples), bool(self.validation)),
            data_collator=self._collator,
            train_dataset=self.examples,
            eval_dataset=self.validation or None,
            callbacks=[control, *([transformers.EarlyStoppingCallback(patience)] if patience else [])],
        )

    def _with_lora(self, folder: str | os.PathLike[str]) -> Any:
        """Load the model under the SWAA mask, with frozen weights and trainable LoRA matrices."""
        settings = self.settings
        transformers.set_seed(settings.seed)
        dtype = torch.bfloat16 if settings.bf16 else "auto"
        model = load(transformers.AutoModelForCausalLM, folder, dtype=dtype)
        if not settings.bf16:
            model = model.float()
        hf.apply(model, self.swaa)
        model.config.use_cache = False
        lora = peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            use_rslora=settings.rslora,
            lora_dropout=settings.lora_dropout,
            target_modules=list(settings.target_modules),
            task_type=peft.TaskType.CAUSAL_LM,
        )
        try:
            adapted = peft.get_peft_model(model, lora)
        except ValueError as error:
            modules = model.named_modules()
            linear = {name.rpartition(".")[2] for name, part in modules if isinstance(part, torch.nn.Linear)}
            raise UnsupportedModelError(
                f"{self.base.name} has no layers named {', '.join(settings.target_modules)}; --target-modules can be "
                f"{', '.join(sorted(linear))}"
            ) from error
        if settings.gradient_checkpointing:
            adapted.enable_input_require_grads()
        return adapted


def _sha256(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ConfigError(f"cannot read the data file {os.fspath(path)}: {error.strerror}") from error
    return digest.hexdigest()
