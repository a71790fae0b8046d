"""Plots of a comparison: what is drawn where, the files, and documents without data."""

import pytest

from swaa_edge.errors import ConfigError
from swaa_edge.evaluate import plot

Figure = pytest.importorskip("matplotlib.figure").Figure


def row(name, accuracy, ratio, seconds):
    return {
        "config": name,
        "accuracy": accuracy,
        "interval": [max(0.0, accuracy - 0.1), min(1.0, accuracy + 0.05)],
        "prefill_ratio": ratio,
        "prefill_seconds": seconds,
        "samples": 12,
        "prompt_tokens": 4096,
    }


def cell(name, depth, length, correct, samples, task="needle"):
    return {"config": name, "task": task, "length": length, "depth": depth, "correct": correct, "samples": samples}


DOCUMENT = {
    "model": {"name": "tiny"},
    "table": [
        row("full", 0.9, 1.0, 4.0),
        row("bad", 0.2, 1.5, 2.7),
        row("best", 0.95, 2.0, 2.0),
        row("fast", 0.5, 4.0, 1.0),
        row("untimed", 0.5, None, None),
    ],
    "cells": [
        cell("full", 0.5, 100, 1, 2),
        cell("full", 0.5, 100, 2, 2),
        cell("full", 0.0, 100, 0, 1),
        cell("full", 0.5, 2000, 5, 5),
        cell("fast", 0.5, 100, 0, 3),
        cell("full", None, 100, 0, 9, "kv"),
        cell("full", None, 100, 0, 9),
    ],
}


def test_accuracy_over_speed():
    figure = Figure(figsize=(8, 4))
    plot._accuracy(figure, DOCUMENT, plot._points(DOCUMENT))
    (axes,) = figure.axes
    places = {"full": (1.0, 0.9), "bad": (1.5, 0.2), "best": (2.0, 0.95), "fast": (4.0, 0.5)}
    lines = {line.get_label(): line for line in axes.lines}
    front = lines.pop("Pareto front")
    shown = {label.split("  ")[1].split(":")[0]: line for label, line in lines.items() if "  " in label}
    assert {name: (line.get_xdata()[0], line.get_ydata()[0]) for name, line in shown.items()} == places
    # full is slower and worse than best, so it is off the front: there points are hollow.
    hollow = {name for name, line in shown.items() if line.get_markerfacecolor() == "white"}
    assert hollow == {"full", "bad"}
    assert sorted(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [places["best"], places["fast"]]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4"]
    assert axes.get_title() == "tiny, 12 questions, prompts of 4,096 tokens"


def test_the_heat_map_adds_up_both_styles():
    figure = Figure(figsize=(8, 4))
    plot._heatmap(figure, DOCUMENT, plot._mapped(DOCUMENT))
    full, fast, *_ = figure.axes
    assert [axes.get_title() for axes in (full, fast)] == ["full", "fast"]
    labels = {text.get_position(): text.get_text() for text in full.texts}
    # Columns are lengths, rows are depths from the start on.
    assert labels == {(0, 0): "0%", (0, 1): "75%", (1, 1): "100%"}
    assert [text.get_text() for text in fast.texts] == ["0%"]
    assert [label.get_text() for label in full.get_xticklabels()] == ["100", "2,000"]
    assert [label.get_text() for label in full.get_yticklabels()] == ["0%", "50%"]


def test_files(tmp_path):
    plot.plot_accuracy(DOCUMENT, tmp_path / "a.png")
    plot.plot_heatmap(DOCUMENT, tmp_path / "b.part", "pdf")
    plot.plot_both(DOCUMENT, tmp_path / "c.svg")
    starts = [(tmp_path / name).read_bytes()[:4] for name in ("a.png", "b.part", "c.svg")]
    assert starts == [b"\x89PNG", b"%PDF", b"<?xm"]


def test_nothing_to_draw(tmp_path):
    untimed = {**DOCUMENT, "table": [row("full", 0.9, None, None)], "cells": [cell("full", None, 100, 0, 9, "kv")]}
    with pytest.raises(ConfigError, match="nothing to plot"):
        plot.plot_accuracy(untimed, tmp_path / "a.png")
    with pytest.raises(ConfigError, match="a heat map needs the task needle"):
        plot.plot_heatmap(untimed, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
