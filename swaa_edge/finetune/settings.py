"""What can be chosen of a fine-tuning; without torch, so that a command line can be checked before it is loaded."""

from __future__ import annotations

import dataclasses
import math

from swaa_edge.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Settings:
    """How LoRA is trained; rank, alpha, rsLoRA and targets as in arXiv 2512.10411.

    rank, alpha: of the two matrices beside each target; with rslora they are scaled by alpha / sqrt(rank), else by
    alpha / rank. targets: names of linear layers. dropout: of their input, 0 to under 1.
    epochs: times over the data; steps: of the optimizer, instead. batch: records at once; accumulate: batches a step.
    rate: the peak of the learning rate; warmup: the share of steps that it rises in, before it falls as a cosine.
    max_length: tokens of a record, None for what the model was trained for.
    holdout: the share of records that the loss is measured on, every `every` steps; then the state is saved, and the
    best one becomes the adapter. patience: how many times it may fail to get better; 0 never stops early.
    checkpointing: compute activations again instead of keeping them. half: bfloat16. chat: use the chat template.

    Raises `ConfigError` for a value out of range.
    """

    rank: int = 16
    alpha: float = 32
    rslora: bool = True
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 1
    accumulate: int = 8
    rate: float = 1e-4
    warmup: float = 0.1
    max_length: int | None = None
    holdout: float = 0.05
    every: int | None = None
    patience: int = 3
    checkpointing: bool = False
    half: bool = False
    chat: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "batch", "accumulate", "steps", "max_length", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value} must be at least 1")
        for name in ("alpha", "epochs", "rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} = {value} must be more than 0")
        for name in ("dropout", "warmup", "holdout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be from 0 to under 1")
        if self.patience < 0:
            raise ConfigError(f"patience = {self.patience} must be at least 0")
        if not self.targets or not all(self.targets):
            raise ConfigError("targets must name at least one linear layer, as in q_proj,k_proj,v_proj")
