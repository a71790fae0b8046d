"""search: what is chosen on made-up losses, and what an interruption leaves.

A made-up engine's loss is a function of the layers that keep full attention, so each choice can be checked by hand.
"""

import itertools
import types

import pytest

from swaa_edge import SwaaConfig
from swaa_edge.calibrate import losses as losses_module
from swaa_edge.calibrate.cases import Case
from swaa_edge.calibrate.search import patterns
from swaa_edge.calibrate.search import search as search_with
from swaa_edge.calibrate.settings import CalibrateSettings
from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.support.journal import Journal

SWAA = SwaaConfig(64, 4, fa_decode=True)
CASES = [Case("a", (1, 2, 3), (4, 5)), Case("b", (1, 2, 9), (4,))]
N = 6


def search(load, swaa, n_layers, cases, *, held_out=(), journal=None, on_progress=None, **settings):
    more = {"held_out": held_out, "journal": journal, "on_progress": on_progress}
    return search_with(load, swaa, n_layers, cases, CalibrateSettings(**settings), **more)


class FakeEngine:
    """Each answer token costs loss(FA layers) nats; `asked` holds the measurements in order."""

    def __init__(self, monkeypatch, loss):
        self.loss, self.asked, self.fail_at, self.closed = loss, [], None, 0
        monkeypatch.setattr(losses_module, "answer_nll", self._answer_nll)

    def load(self, config, n_ctx):
        assert n_ctx == 5
        kept = frozenset(range(N)) if config is False else {i for i, s in enumerate(config.sliding_layers(N)) if not s}
        if config:
            assert (config.window_size, config.sink_count, config.fa_decode, config.recipe) == (64, 4, True, "custom")
        return types.SimpleNamespace(kept=frozenset(kept), close=self._close)

    def _close(self):
        self.closed += 1

    def _answer_nll(self, llm, case):
        if self.fail_at and self.fail_at[0] == len(self.asked):
            raise self.fail_at[1]
        self.asked.append((tuple(sorted(llm.kept)), case.id))
        return self.loss(llm.kept) * len(case.answer)


#: Loss saved by each layer's full attention, by itself.
WORTH = [0.1, 0.5, 0.0, 0.9, 0.05, 0.3]


def additive(kept):
    return 3.0 - sum(WORTH[layer] for layer in kept)


def redundant(kept):
    """Either of the layers 1 and 3 suffices, and layer 5 helps only beside one of them."""
    retrieves = bool(kept & {1, 3})
    return 3.0 - 2.0 * retrieves - 0.5 * (retrieves and 5 in kept) - 0.01 * (3 in kept) - 0.1 * (0 in kept)


def misled(kept):
    """4 is the best single layer, but useless beside both 1 and 2, which are the best pair."""
    both = {1, 2} <= kept
    return 3.0 - 1.0 * (4 in kept and not both) - 0.4 * (1 in kept) - 0.3 * (2 in kept) - 2.0 * both - 0.1 * (0 in kept)


@pytest.mark.parametrize("method", ["nll", "keep", "greedy"])
def test_layers_that_work_alone_are_found_by_every_method(monkeypatch, method):
    engine = FakeEngine(monkeypatch, additive)
    report = search(engine.load, SWAA, N, CASES, keep=2, method=method)
    assert report.chosen == (1, 3) and report.stopped is None
    assert report.config() == SwaaConfig(64, 4, fa_layers=(1, 3), fa_decode=True)
    assert [row.layer for row in report.ranking()] == [3, 1, 5, 0, 4, 2]
    assert [row.gain for row in report.ranking()] == pytest.approx([0.9, 0.5, 0.3, 0.1, 0.05, 0.0])
    assert (report.full.loss, report.sliding.loss, report.loss.loss) == pytest.approx((1.15, 3.0, 1.6))
    assert report.recovered() == pytest.approx(1.4 / 1.85)
    assert engine.closed == len({kept for kept, _ in engine.asked}), "each choice is loaded once, and closed"
    assert len(engine.asked) == len(set(engine.asked)), "nothing is measured twice"


def test_methods_differ_where_layers_do_each_other_s_work(monkeypatch):
    chosen = {
        method: search(FakeEngine(monkeypatch, redundant).load, SWAA, N, CASES, keep=2, method=method).chosen
        for method in ("nll", "keep", "greedy")
    }
    # Removing 1 or 3 costs nothing while the other stays; alone, both look equal; only greedy sees layers together.
    assert chosen == {"nll": (0, 5), "keep": (1, 3), "greedy": (3, 5)}


@pytest.mark.parametrize(
    "keep, swaps, chosen",
    [
        (3, 0, (1, 2, 4)),  # 4 first; then 1, then 2, which make it useless
        (3, 1, (0, 1, 2)),
        (2, 1, (1, 4)),  # 1 is the weaker of the two, and nothing is better beside 4
        (2, 2, (1, 2)),
    ],
)
def test_greedy_takes_layers_back(monkeypatch, keep, swaps, chosen):
    report = search(FakeEngine(monkeypatch, misled).load, SWAA, N, CASES, keep=keep, method="greedy", swaps=swaps)
    assert report.chosen == chosen and report.loss.loss == pytest.approx(misled(set(chosen)))
    assert {row.layer for row in report.ranking()[:keep]} == set(chosen)
    assert sorted(row.layer for row in report.ranking()) == list(range(N))
    best = min(itertools.combinations(range(N), keep), key=lambda layers: misled(set(layers)))
    assert (chosen == best) is (swaps == keep or (keep, swaps) == (3, 1))


def test_candidates_limit_greedy(monkeypatch):
    engine = FakeEngine(monkeypatch, additive)
    report = search(engine.load, SWAA, N, CASES, keep=2, method="greedy", candidates=3)
    assert report.chosen == (1, 3) and [row.layer for row in report.ranking()] == [3, 1, 5]
    pairs = {kept for kept, _ in engine.asked if len(kept) == 2}
    assert pairs == {(1, 3), (3, 5)}, "only of the layers 1, 3 and 5; greedy has no reason to try 1 with 5"


def test_the_choice_is_compared_with_patterns_on_other_samples(monkeypatch):
    engine = FakeEngine(monkeypatch, additive)
    held_out = [Case("c", (7,), (8, 8))]
    swaa = SwaaConfig(64, 4, fa_layers="0,5", fa_decode=True)
    report = search(engine.load, swaa, N, CASES, keep=2, held_out=[*held_out, Case("d", (7, 1, 2), (8, 8))])
    table = report.to_dict()["held_out"]["table"]
    assert [(row["fa_layers"], row["layers"], row["chosen"]) for row in table] == [
        ("all", [0, 1, 2, 3, 4, 5], False),
        ("none", [], False),
        (":2", [0, 1], False),
        ("0::3", [0, 3], False),
        ("1::3", [1, 4], False),
        ("2::3", [2, 5], False),
        ("0,5", [0, 5], False),
        ("1,3", [1, 3], True),
    ]
    assert [row["loss"] for row in table] == pytest.approx([1.15, 3.0, 2.4, 2.0, 2.45, 2.7, 2.6, 1.6])
    assert [row["added"] for row in table] == pytest.approx([0, 1.85, 1.25, 0.85, 1.3, 1.55, 1.45, 0.45])
    assert [row["error"] for row in table] == pytest.approx([0] * 8), "both cases differ equally"


def test_settings_that_are_a_pattern_are_compared_once(monkeypatch):
    engine = FakeEngine(monkeypatch, additive)
    swaa = SwaaConfig(64, 4, fa_layers=":1/3", fa_decode=True)
    report = search(engine.load, swaa, N, CASES, keep=2, held_out=[Case("c", (7, 1, 2), (8, 8))])
    assert [row["layers"] for row in report.to_dict()["held_out"]["table"]].count([0, 1]) == 1


def test_patterns():
    assert patterns(8, 2) == {":2": frozenset({0, 1})} | {f"{i}::4": frozenset({i, i + 4}) for i in range(4)}
    assert patterns(28, 7).keys() == {":7", "0::4", "1::4", "2::4", "3::4"}
    assert [len(layers) for layers in patterns(36, 10).values()] == [10, 9, 9, 9, 9]
    assert patterns(5, 4) == {":4": frozenset(range(4))}, "every layer is no pattern"
    assert patterns(4, 1).keys() == {"0::4", "1::4", "2::4", "3::4"}, "the first layer is 0::4"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), GenerationError("out of memory")])
def test_a_run_that_ended_early_resumes(monkeypatch, tmp_path, failure):
    engine = FakeEngine(monkeypatch, additive)
    engine.fail_at = (9, failure)
    with Journal(tmp_path / "journal", {}) as journal:
        report = search(engine.load, SWAA, N, CASES, keep=2, journal=journal)
    assert report.stopped == ("interrupted" if isinstance(failure, KeyboardInterrupt) else failure)
    assert report.chosen == () and report.config() is None and report.loss is None
    # Both ends, two layers, and half of a third: only complete measurements are ranked.
    assert [(row.layer, row.gain) for row in report.ranking()] == [(1, pytest.approx(0.5)), (0, pytest.approx(0.1))]
    assert report.to_dict()["stopped"] == str(report.stopped)
    before, engine.asked, engine.fail_at = engine.asked, [], None
    with Journal(tmp_path / "journal", {}) as journal:
        again = search(engine.load, SWAA, N, CASES, keep=2, journal=journal)
    assert again.chosen == (1, 3) and again.stopped is None
    assert not set(before) & set(engine.asked) and len(before) == 9
    whole = FakeEngine(monkeypatch, additive)
    assert search(whole.load, SWAA, N, CASES, keep=2).to_dict() == again.to_dict()
    assert before + engine.asked == whole.asked


def test_an_error_before_anything_is_measured_is_raised(monkeypatch):
    engine = FakeEngine(monkeypatch, additive)
    engine.fail_at = (0, GenerationError("out of memory"))
    with pytest.raises(GenerationError, match="out of memory"):
        search(engine.load, SWAA, N, CASES)


@pytest.mark.parametrize("method, candidates", [("nll", None), ("keep", None), ("greedy", None), ("greedy", 4)])
@pytest.mark.parametrize("held_out", [[], [Case("c", (1, 1, 1, 1), (2,))]])
def test_progress_counts_up_to_its_total(monkeypatch, method, candidates, held_out):
    seen = []
    engine = FakeEngine(monkeypatch, additive)
    search(
        engine.load,
        SWAA,
        N,
        CASES,
        keep=2,
        method=method,
        candidates=candidates,
        held_out=held_out,
        on_progress=seen.append,
    )
    assert (seen[0].text, seen[0].done) == ("full attention in layers: all", 0)
    assert [at.done for at in seen] == sorted(at.done for at in seen)
    assert len({at.total for at in seen}) == 1 and seen[-1].done == seen[-1].total


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"keep": 6}, "keep = 6 keeps all 6 layers in full attention; keep fewer"),
        (
            {"keep": 3, "candidates": 4},
            r"candidates = 4 needs the method greedy, and must be from 3 \(the layers to keep\) to 6",
        ),
        (
            {"keep": 3, "candidates": 2, "method": "greedy"},
            r"candidates = 2 needs the method greedy, and must be from 3 \(the layers to keep\) to 6",
        ),
        ({"swaps": -1}, "swaps = -1 must be 0 or more"),
        ({"cases": []}, "there are no samples to measure the loss on; give at least one"),
    ],
)
def test_numbers_that_do_not_fit(monkeypatch, arguments, message):
    engine = FakeEngine(monkeypatch, additive)
    with pytest.raises(ConfigError, match=message):
        search(engine.load, SWAA, N, **{"cases": CASES} | arguments)
    assert engine.asked == []
