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

#: Default length of a sample in tokens, unless the model's context length is smaller.
PROMPT_TOKENS = 8192
#: Default number of samples per retrieval task, and default number of windows of a text.
SAMPLES, WINDOWS = 4, 16


@dataclasses.dataclass(frozen=True)
class CalibrateSettings:
    """Settings for choosing layers, and for the samples to measure.

    method: one of the methods in `swaa_edge.calibrate.search`.
    keep: the layers that keep full attention, as a number (int) or as a fraction of all layers (float).
    candidates: number of layers that the method greedy tries (default: all layers). These layers are the top of the
        ranking by the method keep.
    swaps: number of chosen layers that the last step of greedy tries to replace, weakest first.
    compare: compare the chosen layers with the first layers and with periodic layers, on held-out samples.
    task: names of the retrieval tasks that provide the samples, separated by commas.
    text: path of a UTF-8 text that replaces the retrieval tasks ("-" means stdin).
    samples: number of samples per retrieval task (default: `SAMPLES`), or number of windows of the text (default:
        `WINDOWS`).
    prompt_tokens: length of a sample in tokens, answer included. Default: `PROMPT_TOKENS` or the model's context
        length, whichever is smaller.
    answer_tokens: number of tokens at the end of each window of the text. The loss is measured on these tokens.
    seed: seed of the retrieval tasks.
    chat: use the model's chat template in the retrieval tasks.

    Raises `ConfigError` if a value is out of range.
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
        """Return how many layers keep full attention. Raises `ConfigError` if a setting doesn't fit `n_layers`."""
        count = self.keep if isinstance(self.keep, int) else max(1, round(self.keep * n_layers))
        if count >= n_layers:
            raise ConfigError(f"keep = {self.keep} keeps all {n_layers} layers in full attention; keep fewer")
        if self.candidates is not None and (self.method != "greedy" or not count <= self.candidates <= n_layers):
            raise ConfigError(
                f"candidates = {self.candidates} needs the method greedy, and must be from {count} (the layers to "
                f"keep) to {n_layers} layers"
            )
        return count
