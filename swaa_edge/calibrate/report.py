"""What a calibration found: the layers in order of need, the choice, and how it compares with others.

report.ranking(); report.chosen; report.config()      # a SwaaConfig
report.to_dict(); plot(report.to_dict(), "layers.png")
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from swaa_edge.bench.report import check_plot
from swaa_edge.calibrate.losses import Measured, with_layers
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import SwaaError

#: What a row's gain is, by method.
GAINS = {
    "nll": "loss added when the layer alone slides",
    "keep": "loss saved when the layer alone keeps full attention",
    "greedy": "loss saved by the layer beside those above it",
    "lazy": "share of the layer's attention outside window and sinks",
}


@dataclasses.dataclass(frozen=True)
class Ranked:
    """gain: see `GAINS`; losses in nats per answer token. error: its standard error, None where it can't be told."""

    layer: int
    gain: float
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Compared:
    """A choice of layers on held-out cases; chosen: whether it is the calibration's."""

    name: str
    fa_layers: tuple[int, ...]
    measured: Measured
    chosen: bool


@dataclasses.dataclass
class Report:
    """What is known so far.

    full, sliding, loss: with full attention everywhere, nowhere, and in the `chosen` layers; None: not measured.
    stopped: None if the run is complete, "interrupted", or the error that ended it.
    """

    swaa: SwaaConfig
    n_layers: int
    method: str
    keep: int
    answer_tokens: int
    n_cases: int
    n_held_out: int = 0
    full: Measured | None = None
    sliding: Measured | None = None
    loss: Measured | None = None
    chosen: tuple[int, ...] = ()
    compared: list[Compared] = dataclasses.field(default_factory=list)
    stopped: SwaaError | Literal["interrupted"] | None = None
    _rows: list[Ranked] = dataclasses.field(default_factory=list)

    def add(self, rows: Iterable[Ranked]) -> None:
        self._rows.extend(rows)

    def exchanged(self, rest: Collection[int], rows: Sequence[Ranked]) -> None:
        """Greedy took a layer back: `rest` stay chosen, and `rows` are all others beside them, best first."""
        self._rows = [*(row for row in self._rows if row.layer in rest), *rows]

    def ranking(self) -> list[Ranked]:
        """The layers, the one that needs full attention most first; with greedy, in the order of their choice."""
        return self._rows if self.method == "greedy" else sorted(self._rows, key=lambda row: (-row.gain, row.layer))

    def config(self) -> SwaaConfig | None:
        """The settings with the chosen layers; None before there is a choice."""
        return with_layers(self.swaa, self.chosen) if self.chosen else None

    def recovered(self) -> float | None:
        """The share of the loss that sliding adds which the chosen layers take away; None where nothing is added."""
        if self.full is None or self.sliding is None or self.loss is None:
            return None
        gap = self.sliding.loss - self.full.loss
        return (self.sliding.loss - self.loss.loss) / gap if gap > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values; losses in nats per answer token."""
        config = self.config()
        return {
            "config": config.to_dict() if config else None,
            "swaa": self.swaa.to_dict(),
            "layers": self.n_layers,
            "method": self.method,
            "keep": self.keep,
            "chosen": list(self.chosen),
            "gain": GAINS[self.method],
            "ranking": [dataclasses.asdict(row) | {"chosen": row.layer in self.chosen} for row in self.ranking()],
            "full_loss": self.full and self.full.loss,
            "sliding_loss": self.sliding and self.sliding.loss,
            "chosen_loss": self.loss and self.loss.loss,
            "recovered": self.recovered(),
            "samples": self.n_cases,
            "answer_tokens": self.answer_tokens,
            "held_out": {"samples": self.n_held_out, "table": [self._compared(row) for row in self.compared]},
            "stopped": str(self.stopped) if self.stopped else None,
        }

    def _compared(self, row: Compared) -> dict[str, Any]:
        """full attention is always measured first."""
        added, error = row.measured.above(self.compared[0].measured)
        return {
            "fa_layers": row.name,
            "layers": list(row.fa_layers),
            "chosen": row.chosen,
            "loss": row.measured.loss,
            "added": added,
            "error": error,
        }


def plot(document: dict[str, Any], path: str | os.PathLike[str], kind: str | None = None) -> None:
    """Draw `Report.to_dict()` into `path`: each layer's gain and, where there is one, the comparison.

    kind: "png", "svg" or "pdf"; None goes by the name. Raises `ConfigError` without matplotlib.
    """
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = document["held_out"]["table"]
    figure = Figure(figsize=(10 if table else 6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if table else 1, squeeze=False)[0]
    rows = document["ranking"]
    for chosen, color, name in ((True, "C0", "keeps full attention"), (False, "0.7", "slides")):
        mine = [row for row in rows if row["chosen"] is chosen]
        errors = [row["error"] or 0.0 for row in mine]
        axes[0].bar([row["layer"] for row in mine], [row["gain"] for row in mine], yerr=errors, color=color, label=name)
    axes[0].set(xlabel="layer", ylabel=document["gain"])
    axes[0].legend(fontsize="small")
    if table:
        names = [row["fa_layers"] for row in table]
        colors = ["C0" if row["chosen"] else "0.7" for row in table]
        axes[1].barh(names, [row["loss"] for row in table], color=colors)
        axes[1].invert_yaxis()
        axes[1].set(xlabel="loss on held-out samples, nats per token", ylabel="layers with full attention")
    figure.savefig(path, format=kind or Path(path).suffix.lstrip(".").lower() or "png", dpi=150)
