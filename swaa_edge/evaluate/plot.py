"""Plots of a comparison: accuracy over prefill speed-up, and needle accuracy by depth and prompt length.

    document = report.to_dict(); plot_accuracy(document, "eval.png"); plot_heatmap(document, "needle.png")

The functions need only the document from `swaa-edge eval --json`, not the model. Errors: `ConfigError` if matplotlib is
missing or the document has no data to plot.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from swaa_edge.engine.configurations import FULL
from swaa_edge.errors import ConfigError
from swaa_edge.evaluate.report import pareto
from swaa_edge.support.figure import figure

Path_ = str | os.PathLike[str]
Points = list[tuple[float, dict[str, Any]]]
# Heat maps per row.
_ACROSS = 3


def plot_accuracy(document: dict[str, Any], path: Path_, kind: str | None = None) -> None:
    """Plot accuracy with its interval over prefill speed-up. A line marks the Pareto front.

    kind: file type (png, svg or pdf), by default taken from `path`.
    """
    with figure(path, size=(8.5, 4.8), kind=kind) as canvas:
        _accuracy(canvas, document, _points(document))


def plot_heatmap(document: dict[str, Any], path: Path_, kind: str | None = None) -> None:
    """Plot the accuracy of the task needle by depth and prompt length. Each configuration has its own heat map."""
    names = _mapped(document)
    with figure(path, size=_map_size(document, names), kind=kind) as canvas:
        _heatmap(canvas, document, names)


def plot_both(document: dict[str, Any], path: Path_, kind: str | None = None) -> None:
    """Draw one picture with two parts: the plot of accuracy above, and the heat maps below."""
    points, names = _points(document), _mapped(document)
    width, height = _map_size(document, names)
    with figure(path, size=(max(8.5, width), 4.8 + height), kind=kind) as canvas:
        top, bottom = canvas.subfigures(2, 1, height_ratios=[4.8, height])
        _accuracy(top, document, points)
        _heatmap(bottom, document, names)


def _points(document: dict[str, Any]) -> Points:
    """Return pairs (speed-up, row) in ascending order."""
    rows = (row for row in document["table"] if row["prefill_ratio"] is not None)
    points = [(float(row["prefill_ratio"]), row) for row in rows]
    if not points:
        raise ConfigError("there is nothing to plot: no configuration has both an accuracy and a prefill time")
    return sorted(points, key=lambda point: (point[0], point[1]["accuracy"]))


def _accuracy(canvas: Any, document: dict[str, Any], points: Points) -> None:
    axes = canvas.subplots()
    front = set(pareto({row["config"]: (-x, row["accuracy"]) for x, row in points}))
    for number, (x, row) in enumerate(points, 1):
        low, high = row["interval"]
        accuracy = row["accuracy"]
        reach = [[max(0.0, accuracy - low)], [max(0.0, high - accuracy)]]
        axes.errorbar([x], [accuracy], reach, fmt="none", ecolor="0.6", elinewidth=1, capsize=3, zorder=1)
        color = "black" if row["config"] == FULL else f"C{(number - 1) % 10}"
        # Names beside the points would overlap, so the points have numbers, and the legend has the names.
        label = f"{number}  {row['config']}: {accuracy:.0%}, {x:.2f}x"
        fill = color if row["config"] in front else "white"
        axes.plot([x], [accuracy], "o", markersize=7, color=color, markerfacecolor=fill, zorder=3, label=label)
    line = [(x, row["accuracy"]) for x, row in points if row["config"] in front]
    axes.plot(*zip(*line, strict=True), color="0.3", linestyle="--", linewidth=1, zorder=2, label="Pareto front")
    _number(axes, points)
    xlabel, ylabel = "prefill speed-up over full attention", "correct answers (bars: 95% interval)"
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.03, 1.06))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)
    axes.set_title(_title(document), fontsize="medium")


def _number(axes: Any, points: Points) -> None:
    """Write a number beside each point, without overlaps if possible."""
    xs = [x for x, _ in points]
    wide = (max(xs) - min(xs)) or 1.0
    spots = [(8, 6), (-14, 6), (8, -14), (-14, -14), (20, 6)]
    taken: list[tuple[float, float]] = []
    for number, (x, row) in enumerate(points, 1):
        # Positions in typographic points, in a picture of about 400 by 280.
        at = ((x - min(xs)) / wide * 360, row["accuracy"] * 260)
        for offset in spots:
            place = (at[0] + offset[0], at[1] + offset[1])
            if all(abs(place[0] - a) > 11 or abs(place[1] - b) > 11 for a, b in taken):
                break
        taken.append(place)
        axes.annotate(str(number), (x, row["accuracy"]), xytext=offset, textcoords="offset points", fontsize=8)


def _title(document: dict[str, Any]) -> str:
    name = document["model"].get("name")
    samples = max(row["samples"] for row in document["table"])
    tokens = max(row["prompt_tokens"] for row in document["table"])
    return f"{name + ', ' if name else ''}{samples} questions, prompts of {tokens:,.0f} tokens"


def _mapped(document: dict[str, Any]) -> list[str]:
    """Return the names of the configurations that have needle results with a depth."""
    names = dict.fromkeys(cell["config"] for cell in document["cells"] if _is_mapped(cell))
    if not names:
        raise ConfigError("a heat map needs the task needle; evaluate this task too")
    return [row["config"] for row in document["table"] if row["config"] in names]


def _is_mapped(cell: dict[str, Any]) -> bool:
    return cell["task"] == "needle" and cell["depth"] is not None and cell["length"] is not None


def _map_size(document: dict[str, Any], names: Sequence[str]) -> tuple[float, float]:
    lengths = {cell["length"] for cell in document["cells"] if _is_mapped(cell)}
    across = min(len(names), _ACROSS)
    return max(4.5, across * max(2.4, 0.75 * len(lengths) + 1.2) + 1.2), 2.5 * -(-len(names) // _ACROSS) + 0.5


def _heatmap(canvas: Any, document: dict[str, Any], names: Sequence[str]) -> None:
    found: dict[tuple[str, float, int], list[int]] = {}
    for cell in document["cells"]:
        if _is_mapped(cell):  # the counts of both styles are added
            counts = found.setdefault((cell["config"], cell["depth"], cell["length"]), [0, 0])
            counts[0] += cell["correct"]
            counts[1] += cell["samples"]
    depths, lengths = (sorted({key[at] for key in found}) for at in (1, 2))
    across = min(len(names), _ACROSS)
    grid = canvas.subplots(-(-len(names) // across), across, squeeze=False)
    image = None
    for axes, name in zip(grid.flat, names, strict=False):
        fractions = [[_fraction(found.get((name, depth, length))) for length in lengths] for depth in depths]
        image = axes.imshow(fractions, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, row in enumerate(fractions):
            for x, fraction in enumerate(row):
                if fraction == fraction:  # not NaN
                    axes.text(x, y, f"{fraction:.0%}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        axes.set_title(name, fontsize="small")
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    canvas.supxlabel("prompt, tokens", fontsize="small")
    canvas.supylabel("depth of the needle, from the start", fontsize="small")
    canvas.colorbar(image, ax=list(grid.flat), label="found", shrink=0.8)


def _fraction(counts: list[int] | None) -> float:
    return counts[0] / counts[1] if counts else float("nan")
