"""The losses of a fine-tuning over its steps, as a picture.

plot(outcome.to_dict(), "loss.png")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from swaa_edge.bench.report import check_plot


def plot(document: dict[str, Any], path: str | os.PathLike[str], kind: str | None = None) -> None:
    """Draw `Outcome.to_dict()` into `path`. kind: "png", "svg" or "pdf"; None goes by the name.

    Raises `ConfigError` without matplotlib.
    """
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, style in (("loss", "learned from", "-"), ("held_out", "held out", "o-")):
        points = [(line["step"], line[name]) for line in document["history"] if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=4, label=label)
    axes.set(xlabel="step", ylabel="loss, nats per token of a reply", ylim=(0, None))
    axes.legend()
    figure.savefig(path, format=kind or Path(path).suffix.lstrip(".").lower() or "png", dpi=150)
