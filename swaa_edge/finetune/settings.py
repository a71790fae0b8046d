"""Settings of `finetune` and `distill`. The checks need no torch, so an invalid setting fails at once.

settings = Settings(lora_rank=32, learning_rate=5e-5, epochs=2)
settings = DistillSettings(samples=8, max_tokens=8192)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from swaa_edge.errors import ConfigError
from swaa_edge.evaluate.questions import check_judge

#: Defaults of `distill`: responses per record, tokens per response, and sampling temperature.
SAMPLES, MAX_TOKENS, TEMPERATURE = 4, 1024, 0.7


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings for training an adapter.

    The defaults of rank, alpha, rsLoRA and target modules are from arXiv 2512.10411.

    lora_rank: rank of the LoRA matrices.
    lora_alpha: scale of the LoRA matrices, before the division by the rank or its square root.
    rslora: whether to divide lora_alpha by the square root of the rank (rsLoRA) instead of the rank.
    lora_dropout: probability of dropout before the LoRA matrices.
    target_modules: names of the linear layers that get LoRA matrices.
    epochs: number of training epochs.
    max_steps: number of optimizer steps. If given, epochs is ignored.
    batch_size: number of examples per batch.
    gradient_accumulation_steps: number of batches per optimizer step.
    learning_rate: peak learning rate.
    warmup_ratio: fraction of the steps before the learning rate reaches the peak. A cosine decay follows.
    max_length: maximum example length in tokens, or None for the model's context length. Longer examples are left out.
    val_fraction: fraction of the examples held out for validation.
    eval_steps: number of steps between two validations. None means a tenth of all steps, but at most 100. The training
        state is saved at the same steps.
    patience: number of validations without improvement before training stops, or 0 to never stop early.
    gradient_checkpointing: whether to recompute activations to save memory.
    bf16: whether to compute in bfloat16. None means yes if a GPU supports bfloat16.
    chat: whether to format the examples with the model's chat template.

    Raises `ConfigError` for a value out of range.
    """

    lora_rank: int = 16
    lora_alpha: float = 32
    rslora: bool = True
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 1
    gradient_accumulation_steps: int = 8
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.1
    max_length: int | None = None
    val_fraction: float = 0.05
    eval_steps: int | None = None
    patience: int = 3
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    chat: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lora_rank", "batch_size", "gradient_accumulation_steps", "max_steps", "max_length", "eval_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value} must be at least 1")
        for name in ("lora_alpha", "epochs", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} = {value} must be greater than 0")
        for name in ("lora_dropout", "warmup_ratio", "val_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 0 and less than 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed = {self.seed} must be from 0 to {2**32 - 1}")
        if self.patience < 0:
            raise ConfigError(f"patience = {self.patience} must be at least 0")
        if not self.target_modules or not all(self.target_modules):
            raise ConfigError("target_modules must name at least one linear layer, as in q_proj,k_proj,v_proj")


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """Settings for generating, judging and keeping responses.

    samples: maximum number of responses per record. None means 4, or 1 at temperature 0.
    keep: number of correct responses to keep per record.
    max_tokens: token limit of a response. A response that does not end within the limit is not kept.
    temperature, top_p, top_k, seed: settings for sampling the responses.
    chat: whether to use the model's chat template.
    scorer, judge, judge_model: settings for judging the responses, as in `eval`. The default is the scorer "contains".
    limit: maximum number of records to ask about, starting with the first.
    skip_long: whether to leave out records that exceed the context instead of raising an error.

    Raises `ConfigError` for values that contradict each other.
    """

    samples: int | None = None
    keep: int = 1
    max_tokens: int = MAX_TOKENS
    temperature: float = TEMPERATURE
    top_p: float = 0.95
    top_k: int = 40
    seed: int = 0
    chat: bool = True
    scorer: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    limit: int | None = None
    skip_long: bool = False

    def __post_init__(self) -> None:
        check_judge(self.scorer, self.judge, self.judge_model)
        if self.temperature == 0 and (self.samples or 1) > 1:
            raise ConfigError(
                f"samples = {self.samples} at temperature 0 would give equal responses; "
                "use 1 sample, or a higher temperature"
            )
        if self.samples is None:
            object.__setattr__(self, "samples", SAMPLES if self.temperature else 1)
        if not 1 <= self.keep <= self.samples:
            raise ConfigError(f"keep = {self.keep} must be from 1 to samples = {self.samples}")

    @property
    def scored_by(self) -> str:
        """A text that identifies the scorer, or the judge and its model."""
        return f"{self.judge} {self.judge_model}" if self.judge else self.scorer or ""

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling arguments of create_completion."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
