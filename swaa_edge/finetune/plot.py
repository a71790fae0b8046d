"""Draws the losses of a fine-tuning run over its steps.

plot(outcome.to_dict(), "loss.png")
"""

from __future__ import annotations

import os
from typing import Any

from swaa_edge.support.figure import figure


def plot(document: dict[str, Any], path: str | os.PathLike[str], kind: str | None = None) -> None:
    """Draw `Outcome.to_dict()` into `path`. kind: "png", "svg" or "pdf"; None takes it from the name.

    Raises `ConfigError` without matplotlib.
    """
    with figure(path, size=(7, 4), kind=kind) as canvas:
        axes = canvas.subplots()
        for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(line["step"], line[name]) for line in document["history"] if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, markersize=4, label=label)
        axes.set(xlabel="step", ylabel="loss, nats per response token", ylim=(0, None))
        axes.legend()
