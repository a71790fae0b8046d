"""Finds the layers that should keep full attention (FA layers): by ranking single layers, or greedily.

    settings = CalibrateSettings(method="greedy", keep=7)
    report = search(load, SwaaConfig(2048, 100, fa_decode=True), 28, cases, settings)
    report.chosen            # (2, 5, 9, ...)

nll ranks layers by how much the loss rises when only that layer slides, after arXiv 2606.27791. keep ranks them by how
much the loss falls when only that layer keeps full attention, which helps in a model that can do without any single
layer: there, nll finds nothing. greedy starts with all layers sliding, adds the FA layer that lowers the loss most, and
repeats, so that it sees how layers work together; finally it exchanges chosen layers while that lowers the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from swaa_edge.calibrate.cases import Case
from swaa_edge.calibrate.losses import Counter, Load, Losses, Measured, label
from swaa_edge.calibrate.report import Choice, Ranked, Report
from swaa_edge.calibrate.settings import CalibrateSettings, Method
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, SwaaError
from swaa_edge.layers import selected_layers
from swaa_edge.support.journal import Journal
from swaa_edge.support.progress import OnProgress


def search(
    load: Load,
    swaa: SwaaConfig,
    n_layers: int,
    cases: Sequence[Case],
    settings: CalibrateSettings,
    *,
    visible: Callable[[], Sequence[float]] | None = None,
    held_out: Sequence[Case] = (),
    journal: Journal | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Choose FA layers of a model with `n_layers`, for `swaa` without its own FA layers.

    settings: method, keep, candidates and swaps are used.
    visible: for lazy, measures the fraction of each layer's attention that a window sees (`lazy.visible_attention`).
    held_out: cases to compare the choice on with periodic patterns of equal size, the FA layers of `swaa`, all layers
        and none; empty for no comparison.
    journal: keeps losses, and supplies those of an earlier run.

    KeyboardInterrupt, or an error after the first measurement, ends the run early: see `Report.stopped`.
    Raises `ConfigError` for settings that don't fit `n_layers`, and the errors of loading and running a model.
    """
    keep, method = settings.layers_to_keep(n_layers), settings.method
    candidates, swaps = settings.candidates, settings.swaps
    if method == "lazy" and visible is None:
        raise ConfigError("method lazy needs a measurement of attention; give visible")
    counter, journal = Counter(on_progress), journal or Journal(None, {})
    losses = Losses(load, swaa, n_layers, cases, journal=journal, counter=counter)
    apart = Losses(load, swaa, n_layers, held_out, journal=journal, counter=counter) if held_out else None
    report = Report(swaa, n_layers, method, keep, sum(len(case.answer) for case in cases), len(cases), len(held_out))
    rivals = periodic(n_layers, keep) | given(swaa, n_layers) if apart else {}
    losses.expect(_choices(n_layers, keep, method, candidates, swaps))
    if apart is not None:
        apart.expect(3 + len(rivals))
    try:
        _run(report, losses, method, candidates, swaps, visible)
        if apart is not None:
            _compare(report, apart, rivals)
    except KeyboardInterrupt:
        report.stopped = "interrupted"
    except SwaaError as error:
        if not journal.records:
            raise
        report.stopped = error
    return report


def periodic(n_layers: int, keep: int) -> dict[str, frozenset[int]]:
    """Every k-th layer, for each offset, by its --fa-layers text; k is the period that keeps about `keep` layers."""
    period = max(1, round(n_layers / keep))
    return {f"{first}::{period}": frozenset(range(first, n_layers, period)) for first in range(period)}


def given(swaa: SwaaConfig, n_layers: int) -> dict[str, frozenset[int]]:
    """The FA layers that `swaa` has itself, if any."""
    layers = selected_layers("fa_layers", swaa.fa_layers, n_layers)
    return {label(layers, n_layers): layers} if layers else {}


def _choices(n_layers: int, keep: int, method: Method, candidates: int | None, swaps: int) -> int:
    """How many choices of layers the method measures; for greedy, if no exchange lowers the loss."""
    if method == "lazy":
        return 3
    if method != "greedy":
        return 3 + n_layers
    pool = candidates or n_layers
    count = 2 + (n_layers if candidates else 0) + sum(pool - chosen for chosen in range(keep))
    if keep > 1 and swaps:
        count += keep + min(swaps, keep) * (pool - keep + 1)
    return count


def _run(
    report: Report,
    losses: Losses,
    method: Method,
    candidates: int | None,
    swaps: int,
    visible: Callable[[], Sequence[float]] | None,
) -> None:
    report.full = losses.of(range(report.n_layers))
    report.sliding = losses.of(())
    if method == "lazy":
        assert visible is not None
        # The less of its attention a window sees, the more the layer needs full attention.
        report.add(Ranked(layer, 1 - fraction) for layer, fraction in enumerate(visible()))
    elif method == "greedy":
        _greedy(report, losses, candidates, swaps)
    else:
        _rank(report, losses, method)
    if method != "greedy":
        report.chosen = tuple(sorted(row.layer for row in report.ranking()[: report.keep]))
        report.loss = losses.of(report.chosen)


def _rank(report: Report, losses: Losses, method: Method) -> None:
    assert report.full is not None and report.sliding is not None
    layers = set(range(report.n_layers))
    for layer in sorted(layers):
        if method == "nll":
            gain, error = losses.of(layers - {layer}).above(report.full)
        else:
            gain, error = report.sliding.above(losses.of({layer}))
        report.add([Ranked(layer, gain, error)])


def _greedy(report: Report, losses: Losses, candidates: int | None, swaps: int) -> None:
    assert report.sliding is not None
    pool = list(range(report.n_layers))
    if candidates:
        alone = {layer: losses.of({layer}).loss for layer in pool}
        pool = sorted(pool, key=alone.__getitem__)[:candidates]
    chosen: list[int] = []
    current = report.sliding
    while len(chosen) < report.keep:
        rows, current = _best_addition(losses, chosen, pool, current)
        chosen.append(rows[0].layer)
        report.add(rows[:1] if len(chosen) < report.keep else rows)
    report.chosen, report.loss = tuple(sorted(chosen)), current
    if report.keep == 1:
        return  # nothing is better than the only layer chosen
    # Each exchange lowers the loss, so this ends.
    while found := _exchange(losses, chosen, pool, current, swaps):
        rest, rows, current = found
        report.exchanged(rest, rows)
        chosen = [*rest, rows[0].layer]
        report.chosen, report.loss = tuple(sorted(chosen)), current


def _exchange(
    losses: Losses, chosen: Sequence[int], pool: Iterable[int], current: Measured, swaps: int
) -> tuple[list[int], list[Ranked], Measured] | None:
    """The first exchange of one of the `swaps` weakest layers that lowers the loss, or None.

    Returns the layers that stay, all others beside them, best first, and the loss with the best.
    """
    if not swaps:
        return None
    without = {layer: losses.of(set(chosen) - {layer}) for layer in chosen}
    for weak in sorted(chosen, key=lambda layer: without[layer].loss)[:swaps]:
        rest = [layer for layer in chosen if layer != weak]
        rows, better = _best_addition(losses, rest, pool, without[weak])
        if better.loss < current.loss:
            return rest, rows, better
    return None


def _best_addition(
    losses: Losses, chosen: Sequence[int], pool: Iterable[int], current: Measured
) -> tuple[list[Ranked], Measured]:
    """The gain of each layer of the pool beside the chosen ones, best first, and the loss with the best."""
    found = {layer: losses.of({*chosen, layer}) for layer in pool if layer not in chosen}
    order = sorted(found, key=lambda layer: (found[layer].loss, layer))
    return [Ranked(layer, *current.above(found[layer])) for layer in order], found[order[0]]


def _compare(report: Report, losses: Losses, rivals: dict[str, frozenset[int]]) -> None:
    n_layers = report.n_layers
    ends = {"all": frozenset(range(n_layers)), "none": frozenset()}
    chosen = frozenset(report.chosen)
    choices = ends | rivals
    if chosen not in choices.values():
        choices[label(chosen, n_layers)] = chosen
    for name, layers in choices.items():
        report.compared.append(Choice(name, tuple(sorted(layers)), losses.of(layers), layers == chosen))
