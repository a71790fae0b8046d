"""The result of a search: its document and its picture."""

import pytest

from swaa_edge import SwaaConfig
from swaa_edge.calibrate.losses import Measured
from swaa_edge.calibrate.report import Ranked, Report, plot


def made(full=1.0, sliding=3.0, chosen=1.5):
    report = Report(SwaaConfig(64), 3, "nll", 1, answer_tokens=2, n_cases=2, n_held_out=2, chosen=(1,))
    losses = [None if loss is None else Measured((loss, loss), 2) for loss in (full, sliding, chosen)]
    report.full, report.sliding, report.loss = losses
    report.rows = [Ranked(0, 0.1, 0.01), Ranked(1, 0.9, None), Ranked(2, 0.0, 0.2)]
    report.compared = [
        {"fa_layers": "all", "layers": [0, 1, 2], "chosen": False, "loss": 1.0, "added": 0.0, "error": 0.0},
        {"fa_layers": "1", "layers": [1], "chosen": True, "loss": 1.5, "added": 0.5, "error": 0.0},
    ]
    return report


def test_the_fraction_of_the_loss_that_is_recovered():
    assert made().recovered() == 0.75
    assert made(sliding=1.0).recovered() is None, "sliding adds no loss"
    assert made(chosen=None).recovered() is None


def test_the_document():
    document = made().to_dict()
    assert [(row["layer"], row["chosen"]) for row in document["ranking"]] == [(1, True), (0, False), (2, False)]
    assert document["config"]["fa_layers"] == [1] and document["gain"] == "loss added when only this layer slides"
    assert document["held_out"] == {"samples": 2, "table": made().compared}


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot(made().to_dict(), tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
