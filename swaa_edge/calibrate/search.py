"""Finds the layers that should keep full attention (FA): by a ranking of single layers, or greedily.

    report = calibrate(load, SwaaConfig(2048, 100, fa_decode=True), 28, cases, method="greedy", keep=7)
    report.chosen            # (2, 5, 9, ...)

nll asks what it costs that a layer alone slides, after arXiv 2606.27791. keep asks the reverse: what it brings that a
layer alone keeps FA while all others slide; a model that makes do without any one layer shows nothing to the first.
greedy starts with all layers sliding, gives FA to the layer that lowers the loss most, and again, so that it sees how
layers work together; at last it takes layers back and adds others, as long as that lowers the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from swaa_edge.calibrate.cases import Case
from swaa_edge.calibrate.losses import Clock, Load, Losses, Measured, Progress, label
from swaa_edge.calibrate.report import Compared, Ranked, Report
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, SwaaError
from swaa_edge.layers import selected_layers
from swaa_edge.support.journal import Journal

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

Method = Literal["nll", "keep", "greedy", "lazy"]


def calibrate(
    load: Load,
    swaa: SwaaConfig,
    n_layers: int,
    cases: Sequence[Case],
    *,
    keep: int | None = None,
    method: Method = "nll",
    candidates: int | None = None,
    swaps: int = 1,
    shares: Callable[[], Sequence[float]] | None = None,
    held_out: Sequence[Case] = (),
    journal: Journal | None = None,
    using: Callable[[SwaaLlama], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    on_progress: Callable[[Progress], object] | None = None,
) -> Report:
    """Choose `keep` FA layers of a model of `n_layers` (None: a quarter), for `swaa` with those instead of its own.

    candidates: with greedy, only so many layers take part, the best by the ranking of `keep`; None: all.
    swaps: with greedy, the last step tries to exchange each of so many chosen layers, those worth least.
    shares: with lazy, measures how much of each layer's attention a window sees (`lazy.shares`).
    held_out: cases on which the choice, its rivals of equal size (periodic patterns, the layers that `swaa` names) and
    the two ends are compared; none: no comparison.
    journal: where losses are kept, and those of an earlier run found; see `Losses` for `using`.

    KeyboardInterrupt, or an error once something is measured, ends the run early: `Report.stopped` says so.
    Raises `ConfigError` for numbers that don't fit, and what loading and running a model raises.
    """
    keep = quarter(n_layers) if keep is None else keep
    if not 1 <= keep < n_layers:
        raise ConfigError(f"keep = {keep} must be from 1 to {n_layers - 1} of the model's {n_layers} layers")
    if candidates is not None and not keep <= candidates <= n_layers:
        raise ConfigError(f"candidates = {candidates} must be from {keep} (the layers to keep) to {n_layers}")
    if method == "lazy" and shares is None:
        raise ConfigError("the method lazy needs the shares of attention; give shares")
    if swaps < 0:
        raise ConfigError(f"swaps = {swaps} must be 0 or more")
    clock, journal = Clock(on_progress), journal or Journal(None, {})
    losses = Losses(load, swaa, n_layers, cases, journal=journal, using=using, clock=clock)
    apart = Losses(load, swaa, n_layers, held_out, journal=journal, using=using, clock=clock) if held_out else None
    report = Report(swaa, n_layers, method, keep, sum(len(case.answer) for case in cases), len(cases), len(held_out))
    rivals = periodic(n_layers, keep) | given(swaa, n_layers) if apart else {}
    losses.expect(_configurations(n_layers, keep, method, candidates, swaps))
    if apart is not None:
        apart.expect(3 + len(rivals))
    try:
        _run(report, losses, method, candidates, swaps, shares)
        if apart is not None:
            _compare(report, apart, rivals)
    except KeyboardInterrupt:
        report.stopped = "interrupted"
    except SwaaError as error:
        if not journal.records:
            raise
        report.stopped = error
    return report


def quarter(n_layers: int) -> int:
    """How many layers keep FA by default."""
    return max(1, n_layers // 4)


def periodic(n_layers: int, keep: int) -> dict[str, frozenset[int]]:
    """Every k-th layer, from each offset, by the text --fa-layers takes; k is the period that keeps about `keep`."""
    period = max(1, round(n_layers / keep))
    return {f"{first}::{period}": frozenset(range(first, n_layers, period)) for first in range(period)}


def given(swaa: SwaaConfig, n_layers: int) -> dict[str, frozenset[int]]:
    """The FA layers that `swaa` names itself, if any."""
    layers = selected_layers("fa_layers", swaa.fa_layers, n_layers)
    return {label(layers, n_layers): layers} if layers else {}


def _configurations(n_layers: int, keep: int, method: Method, candidates: int | None, swaps: int) -> int:
    """How many the method asks for; greedy, if its last step finds nothing better."""
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
    shares: Callable[[], Sequence[float]] | None,
) -> None:
    report.full = losses.of(range(report.n_layers))
    report.sliding = losses.of(())
    if method == "lazy":
        assert shares is not None
        # The smaller the share a window sees, the more the layer needs the rest.
        report.add(Ranked(layer, 1 - share) for layer, share in enumerate(shares()))
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
    now = report.sliding
    while len(chosen) < report.keep:
        rows, now = _best_addition(losses, chosen, pool, now)
        chosen.append(rows[0].layer)
        report.add(rows[:1] if len(chosen) < report.keep else rows)
    report.chosen, report.loss = tuple(sorted(chosen)), now
    if report.keep == 1:
        return  # what would be taken back was the best there is
    # Each exchange lowers the loss, so this ends.
    while found := _exchange(losses, chosen, pool, now, swaps):
        rest, rows, now = found
        report.exchanged(rest, rows)
        chosen = [*rest, rows[0].layer]
        report.chosen, report.loss = tuple(sorted(chosen)), now


def _exchange(
    losses: Losses, chosen: Sequence[int], pool: Iterable[int], now: Measured, swaps: int
) -> tuple[list[int], list[Ranked], Measured] | None:
    """The first exchange of one of the `swaps` weakest layers that lowers the loss: who stays, all others, the loss."""
    if not swaps:
        return None
    fewer = {layer: losses.of(set(chosen) - {layer}) for layer in chosen}
    for weak in sorted(chosen, key=lambda layer: fewer[layer].loss)[:swaps]:
        rest = [layer for layer in chosen if layer != weak]
        rows, better = _best_addition(losses, rest, pool, fewer[weak])
        if better.loss < now.loss:
            return rest, rows, better
    return None


def _best_addition(
    losses: Losses, chosen: Sequence[int], pool: Iterable[int], now: Measured
) -> tuple[list[Ranked], Measured]:
    """What each layer of the pool would bring beside the chosen ones, best first, and the loss with the best."""
    found = {layer: losses.of({*chosen, layer}) for layer in pool if layer not in chosen}
    order = sorted(found, key=lambda layer: (found[layer].loss, layer))
    return [Ranked(layer, *now.above(found[layer])) for layer in order], found[order[0]]


def _compare(report: Report, losses: Losses, rivals: dict[str, frozenset[int]]) -> None:
    n_layers = report.n_layers
    ends = {"all": frozenset(range(n_layers)), "none": frozenset()}
    chosen = frozenset(report.chosen)
    choices = ends | rivals
    if chosen not in choices.values():
        choices[label(chosen, n_layers)] = chosen
    for name, layers in choices.items():
        report.compared.append(Compared(name, tuple(sorted(layers)), losses.of(layers), layers == chosen))
