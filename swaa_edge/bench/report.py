"""What a benchmark measured: raw samples, and the table, document and plot that are made of them.

report.rows()                       # one dict per configuration and prompt length
report.to_dict()                    # all of it as plain JSON values
plot(report.to_dict(), "bench.png")
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from swaa_edge.bench import bound
from swaa_edge.bench.client import Timing
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import SwaaError
from swaa_edge.files.model import ModelFile
from swaa_edge.support.figure import check_plot
from swaa_edge.support.machine import machine

#: What a configuration can be: settings, or False for SWAA turned off in the patched library.
Compared = SwaaConfig | Literal[False]
#: The name of the side that the others are compared with.
FULL = "full"

# Rounds, if the caller leaves it open: a long prompt averages over its own length.
_ROUNDS, _ROUNDS_LONG, _LONG = 3, 2, 8192


@dataclasses.dataclass(frozen=True)
class Settings:
    """How every side runs; sizes in tokens. repeat: rounds per prompt length, None for 3, and 2 above 8192 tokens."""

    decode: int = 32
    repeat: int | None = None
    ctx: int | None = None
    batch: int = 512
    ubatch: int = 512
    threads: int | None = None
    cache_type: str = "f16"
    gpu_layers: int = -1
    swa_full: bool = False

    def rounds(self, n_tokens: int) -> int:
        """How often each side measures a prompt of `n_tokens`."""
        return self.repeat or (_ROUNDS_LONG if n_tokens > _LONG else _ROUNDS)


@dataclasses.dataclass
class Report:
    """What was measured so far. samples: by (configuration, prompt length), one Timing a round.

    prompt: what the tokens were. load: processes that wanted a core when the run began, a mean over the minute
    before; None where the system doesn't say. stopped: None if the run is complete, "interrupted", or the error
    that ended it.
    """

    model: ModelFile
    configs: dict[str, Compared]
    settings: Settings
    libraries: dict[str, dict[str, Any]]
    prompt: str
    load: float | None = None
    samples: dict[tuple[str, int], list[Timing]] = dataclasses.field(default_factory=dict)
    stopped: SwaaError | Literal["interrupted"] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """One row per configuration and prompt length, full attention first; plain JSON values.

        Ratios are medians of full attention over medians of the configuration: above 1 is faster. What
        can't be told is None: the bound of a prompt of less than three ubatches, a speed of no tokens.
        """
        return [
            self._row(name, length)
            for length in self._lengths()
            for name in (FULL, *self.configs)
            if (name, length) in self.samples and (FULL, length) in self.samples
        ]

    def _lengths(self) -> list[int]:
        return list(dict.fromkeys(length for _, length in self.samples))

    def line(self, n_tokens: int) -> bound.Line | None:
        """The fit of full attention at this prompt length: medians over the rounds of each full ubatch."""
        rounds = [timing.ubatch_seconds for timing in self.samples.get((FULL, n_tokens), [])]
        medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
        return bound.fit_line(medians[: n_tokens // self.settings.ubatch], self.settings.ubatch)

    def _row(self, name: str, n_tokens: int) -> dict[str, Any]:
        prefill, decode = self._medians(name, n_tokens)
        full_prefill, full_decode = self._medians(FULL, n_tokens)
        config, timings = self.configs.get(name) or None, self.samples[name, n_tokens]
        ratio, best, new = full_prefill / prefill, self._bound(config, n_tokens), self.settings.decode
        return {
            "config": name,
            "recipe": config.recipe if config else None,
            "swaa": config.to_dict() if config else None,
            "prompt_tokens": n_tokens,
            "prefill_seconds": prefill,
            "prefill_tok_s": n_tokens / prefill,
            "prefill_ratio": ratio,
            "bound": best,
            "ratio_to_bound": ratio / best if best else None,
            "decode_tokens": new,
            "decode_tok_s": new / decode if new else None,
            "decode_ratio": full_decode / decode if new else None,
            "ratio": (full_prefill + full_decode) / (prefill + decode),
            "device": self.device(name),
            "compute_buffer_bytes": timings[0].compute_bytes,
            "kv_bytes": timings[0].kv_bytes,
            "repeats": [dataclasses.asdict(timing) for timing in timings],
        }

    def device(self, name: str) -> str:
        """What computed `name`: the GPUs that its library found, with how many layers if not all, or the processor."""
        layers = self.settings.gpu_layers
        gpus = self.libraries[FULL if name == FULL else "swaa"]["gpus"]
        if not gpus or layers == 0:
            return str(machine()["cpu"])
        # Beside its repeating layers a model has an output layer to place.
        part = f", {layers} of {self.model.n_layers} layers" if 0 < layers <= self.model.n_layers else ""
        return " + ".join(gpus) + part

    def _medians(self, name: str, n_tokens: int) -> tuple[float, float]:
        """Seconds of the prefill and of all decoded tokens."""
        timings = self.samples[name, n_tokens]
        return (
            statistics.median(sum(timing.ubatch_seconds) for timing in timings),
            statistics.median(sum(timing.decode_seconds) for timing in timings),
        )

    def _bound(self, config: SwaaConfig | None, n_tokens: int) -> float | None:
        line = self.line(n_tokens)
        return line and bound.bound(line, config, n_tokens, self.settings.ubatch, self.model.n_heads)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain JSON values: rows with their raw samples, fit, model, machine, libraries."""
        model = self.model
        return {
            "rows": self.rows(),
            "fit": list(self._fits()),
            "settings": dataclasses.asdict(self.settings),
            "prompt": self.prompt,
            "model": {
                "path": str(model.paths[0]),
                "name": model.name,
                "architecture": model.architecture,
                "layers": model.n_layers,
                "heads": list(model.n_heads),
                "kv_heads": list(model.n_kv_heads),
                "type": model.file_type,
                "parameters": model.n_parameters,
                "bytes": model.size,
            },
            "machine": machine() | {"load": self.load},
            "libraries": self.libraries,
            "stopped": str(self.stopped) if self.stopped else None,
        }

    def _fits(self) -> Iterator[dict[str, Any]]:
        for length in self._lengths():
            if line := self.line(length):
                share = bound.attention_share(line, length, self.settings.ubatch)
                yield {"prompt_tokens": length, "a": line.a, "b": line.b, "attention_share": share}


def plot(document: dict[str, Any], path: str | os.PathLike[str], kind: str | None = None) -> None:
    """Draw `Report.to_dict()` into `path`: prefill speed, and ratio with its bound, over the prompt length.

    kind: "png", "svg" or "pdf"; None goes by the name. Raises `ConfigError` without matplotlib.
    """
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    speed, ratio = figure.subplots(1, 2)
    rows = document["rows"]
    for number, name in enumerate(dict.fromkeys(row["config"] for row in rows)):
        mine = [row for row in rows if row["config"] == name]
        lengths, style = [row["prompt_tokens"] for row in mine], {"color": f"C{number}", "marker": "o"}
        speed.plot(lengths, [row["prefill_tok_s"] for row in mine], label=name, **style)
        if name != FULL:
            ratio.plot(lengths, [row["prefill_ratio"] for row in mine], label=name, **style)
            bounds = [row["bound"] or float("nan") for row in mine]
            ratio.plot(lengths, bounds, color=style["color"], linestyle=":", label=f"{name}, bound")
    speed.set(xlabel="prompt tokens", ylabel="prefill, tokens per second", ylim=(0, None))
    ratio.set(xlabel="prompt tokens", ylabel="prefill, times as fast as full attention", ylim=(0, None))
    ratio.axhline(1, color="gray", linewidth=0.8)
    for axes in (speed, ratio):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{document['model']['name']} on {document['machine']['cpu']}", fontsize="medium")
    figure.savefig(path, format=kind or Path(path).suffix.lstrip(".").lower() or "png", dpi=150)
