"""The result of a search: ranking, chosen layers, and a comparison with other choices of layers.

report.ranking(); report.chosen; report.config()      # a SwaaConfig
report.to_dict(); plot(report.to_dict(), "layers.png")
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from swaa_edge.calibrate.losses import Measured, with_layers
from swaa_edge.config import SwaaConfig
from swaa_edge.support.figure import figure
from swaa_edge.support.interrupt import Stopped

#: Meaning of a row's gain, by method.
GAINS = {
    "nll": "loss added when only this layer slides",
    "keep": "loss saved when only this layer keeps full attention",
    "greedy": "loss saved by adding this layer to those above it",
}
# Length of the longest bar in characters.
_BAR = 40


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The gain of a layer.

    gain: change of the loss, in nats per answer token. `GAINS` defines the gain of each method.
    error: standard error of the gain, or None if unknown.
    """

    layer: int
    gain: float
    error: float | None


@dataclasses.dataclass
class Report:
    """The results of a search so far.

    A loss is None until measured.

    full: loss with full attention in all layers.
    sliding: loss with full attention in no layer.
    loss: loss with full attention in the `chosen` layers.
    compared: comparison on held-out cases, with one JSON object for each choice of layers.
    rows: the entries of the ranking, unsorted.
    stopped: why the run ended early ("interrupted" or the error), or None if the run is complete.
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
    compared: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stopped: Stopped = None
    rows: list[Ranked] = dataclasses.field(default_factory=list)

    def ranking(self) -> list[Ranked]:
        """Return the layers in descending order of gain. For greedy, return the layers in the order chosen."""
        return self.rows if self.method == "greedy" else sorted(self.rows, key=lambda row: (-row.gain, row.layer))

    def config(self) -> SwaaConfig | None:
        """Return the settings with the chosen layers, or None if no layers are chosen yet."""
        return with_layers(self.swaa, self.chosen) if self.chosen else None

    def recovered(self) -> float | None:
        """Return the fraction of the added loss that the chosen layers remove.

        The added loss is `sliding` minus `full`. Returns None if no loss is added, or if a loss is not measured yet.
        """
        if self.full is None or self.sliding is None or self.loss is None:
            return None
        gap = self.sliding.loss - self.full.loss
        return (self.sliding.loss - self.loss.loss) / gap if gap > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values. Losses are in nats per answer token."""
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
            "held_out": {"samples": self.n_held_out, "table": self.compared},
            "stopped": str(self.stopped) if self.stopped else None,
        }


def summary(document: dict[str, Any]) -> str:
    """Render the document of a `Calibration` as text. Bars show the ranking."""
    parts = [_facts(document), _bars(document), _comparison(document), _conclusion(document)]
    return "\n\n".join(text for part in parts if (text := "\n".join(part)))


def _facts(document: dict[str, Any]) -> Iterator[str]:
    swaa = SwaaConfig.from_dict(document["swaa"])
    decode = {True: "FA decode", False: "no FA decode"}.get(swaa.fa_decode, f"FA decode in {swaa.fa_decode}")
    yield (
        f"{document['model']['name']}, {document['layers']} layers; window {swaa.window_size}, "
        f"{swaa.sink_count} sinks, {decode}, tail {swaa.tail_count}"
    )
    yield (
        f"{document['samples']} samples of {document['prompt_tokens']:,} tokens; loss in nats per token, over "
        f"{document['answer_tokens']:,} answer tokens"
    )
    for name, key in (("full attention", "full_loss"), ("all layers slide", "sliding_loss")):
        if document[key] is not None:
            yield f"{name + ':':<17} {document[key]:.4f}"


def _bars(document: dict[str, Any]) -> Iterator[str]:
    rows = document["ranking"]
    most = max((abs(row["gain"]) for row in rows), default=0.0) or 1.0
    if rows:
        yield document["gain"] + ":"
    for row in rows:
        bar = "#" * round(_BAR * max(0.0, row["gain"]) / most)
        keeps = "FA" if row["chosen"] else "  "
        yield f"layer {row['layer']:>3}  {keeps}  {row['gain']:+.4f}{_error(row)}  {bar}".rstrip()


def _comparison(document: dict[str, Any]) -> Iterator[str]:
    table = sorted(document["held_out"]["table"], key=lambda row: row["loss"])
    width = max((len(row["fa_layers"]) for row in table), default=0)
    if table:
        yield f"on {document['held_out']['samples']} held-out samples, by FA layers:"
    for row in table:
        mark = "  <- chosen" if row["chosen"] else ""
        yield f"{row['fa_layers']:>{width}}  loss {row['loss']:.4f}  ({row['added']:+.4f}{_error(row)}){mark}"


def _error(row: dict[str, Any]) -> str:
    return "" if row["error"] is None else f" ± {row['error']:.4f}"


def _conclusion(document: dict[str, Any]) -> Iterator[str]:
    if document["stopped"]:
        yield f"Stopped early ({document['stopped']}); the same command resumes from here."
    if document["chosen"]:
        layers = ",".join(map(str, document["chosen"]))
        text = f"--fa-layers {layers}  ({len(document['chosen'])} of {document['layers']} layers"
        if document["chosen_loss"] is not None:
            text += f"; loss {document['chosen_loss']:.4f}"
        if document["recovered"] is not None:
            text += f", recovers {document['recovered']:.0%} of the loss that sliding adds"
        yield text + ")"


def plot(document: dict[str, Any], path: str | os.PathLike[str], kind: str | None = None) -> None:
    """Draw the document of a report: the gain of each layer, and the comparison if there is one.

    kind: file type (png, svg or pdf). The default is the type of `path`.

    Raises `ConfigError` if matplotlib is missing.
    """
    table = document["held_out"]["table"]
    with figure(path, size=(10 if table else 6, 4.2), kind=kind) as canvas:
        axes = canvas.subplots(1, 2 if table else 1, squeeze=False)[0]
        rows = document["ranking"]
        for chosen, color, name in ((True, "C0", "keeps full attention"), (False, "0.7", "slides")):
            mine = [row for row in rows if row["chosen"] is chosen]
            layers, gains = [row["layer"] for row in mine], [row["gain"] for row in mine]
            axes[0].bar(layers, gains, yerr=[row["error"] or 0.0 for row in mine], color=color, label=name)
        axes[0].set(xlabel="layer", ylabel=document["gain"])
        axes[0].legend(fontsize="small")
        if table:
            colors = ["C0" if row["chosen"] else "0.7" for row in table]
            axes[1].barh([row["fa_layers"] for row in table], [row["loss"] for row in table], color=colors)
            axes[1].invert_yaxis()
            axes[1].set(xlabel="loss on held-out samples, nats per token", ylabel="layers with full attention")
