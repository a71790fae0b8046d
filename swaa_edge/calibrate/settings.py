"""Settings of a calibration, checked before a model is loaded.

settings = CalibrateSettings(method="greedy", keep=7, compare=True)
"""

from __future__ import annotations

import dataclasses
import os
from typing import Literal, get_args

from swaa_edge.errors import ConfigError

Method = Literal["nll", "keep", "greedy"]
METHODS = get_args(Method)

#: Default length of a sample in tokens, if the model was trained for as many.
PROMPT_TOKENS = 8192
#: Default number of samples per retrieval task, and of windows of a text.
SAMPLES, WINDOWS = 4, 16


@dataclasses.dataclass(frozen=True)
class CalibrateSettings:
    """How to choose layers, and which samples to measure.

    method: one of the methods in `swaa_edge.calibrate.search`.
    keep: number of layers that keep full attention, or their fraction of all layers.
    candidates: for greedy, how many of the layers that rank highest with the method `keep` to try (default: all).
    swaps: for greedy, how many of the weakest chosen layers to try replacing as a last step.
    compare: compare the choice with periodic patterns on held-out samples.
    task: retrieval tasks, separated by commas. text: path of a UTF-8 text to measure on instead ("-" means stdin).
    samples: number of samples per task (default: `SAMPLES`), or of windows of the text (default: `WINDOWS`).
    prompt_tokens: length of a sample in tokens, answer included (default: `PROMPT_TOKENS`, or the model's context
        length if that is smaller).
    answer_tokens: with a text, the loss is measured on this many tokens at the end of each window.
    seed: seed of the retrieval tasks. chat: use the model's chat template.

    Raises `ConfigError` for a value out of range.
    """

    method: Method = "nll"
    keep: int | float = 0.25
    candidates: int | None = None
    swaps: int = 1
    compare: bool = False
    task: str = "needle,multi-needle,kv,chain"
    text: str | os.PathLike[str] | None = None
    samples: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int = 64
    seed: int = 0
    chat: bool = True

    def __post_init__(self) -> None:
        if not (self.keep >= 1 if isinstance(self.keep, int) else 0 < self.keep < 1):
            raise ConfigError(f"keep = {self.keep} must be a number of layers, at least 1, or a fraction such as 0.25")
        if self.swaps < 0:
            raise ConfigError(f"swaps = {self.swaps} must be 0 or more")

    def layers_to_keep(self, n_layers: int) -> int:
        """The number of layers that keep full attention. Raises `ConfigError` if a setting doesn't fit `n_layers`."""
        count = self.keep if isinstance(self.keep, int) else max(1, round(self.keep * n_layers))
        if count >= n_layers:
            raise ConfigError(f"keep = {self.keep} leaves none of the model's {n_layers} layers to slide; keep fewer")
        if self.candidates is not None and (self.method != "greedy" or not count <= self.candidates <= n_layers):
            raise ConfigError(
                f"candidates = {self.candidates} needs the method greedy, and must be from {count} (the layers to "
                f"keep) to {n_layers} layers"
            )
        return count
