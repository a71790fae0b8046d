"""Find the layers that should keep full attention (FA layers), by ranking single layers or by greedy search.

    settings = CalibrateSettings(method="greedy", keep=7)
    report = search(load, SwaaConfig(2048, 100, fa_decode=True), 28, cases, settings)
    report.chosen            # (2, 5, 9, ...)

The method nll ranks each layer by the loss added when only this layer slides (after arXiv 2606.27791). Some models can
compensate for any single sliding layer, so nll measures no difference. Use the method keep for such models: keep ranks
each layer by the loss saved when only this layer has full attention.

The method greedy starts with all layers sliding. In each step, greedy adds the FA layer that lowers the loss most.
Unlike the rankings, greedy accounts for layers that work together. Finally, greedy replaces chosen layers by others as
long as the loss falls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from swaa_edge.calibrate.cases import Case
from swaa_edge.calibrate.losses import Counter, Load, Losses, Measured, label
from swaa_edge.calibrate.report import Ranked, Report
from swaa_edge.calibrate.settings import CalibrateSettings
from swaa_edge.config import SwaaConfig
from swaa_edge.layers import selected_layers
from swaa_edge.support.interrupt import ends_early
from swaa_edge.support.journal import Journal
from swaa_edge.support.progress import OnProgress


def search(
    load: Load,
    swaa: SwaaConfig,
    n_layers: int,
    cases: Sequence[Case],
    settings: CalibrateSettings,
    *,
    held_out: Sequence[Case] = (),
    journal: Journal | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Choose the FA layers of a model with `n_layers` layers. Other settings come from `swaa`.

    settings: only method, keep, candidates and swaps are used.
    held_out: cases for a comparison of the chosen layers with other choices: `patterns`, the FA layers of `swaa`, all
        layers and no layer. If empty, nothing is compared.
    journal: stores losses, and supplies the losses of an earlier run.

    Ctrl-C, or an error after the first measurement, ends the search early. The report then has the results so far, and
    `Report.stopped` holds the reason.

    Raises `ConfigError` if the settings don't fit `n_layers`, and the errors of loading and running a model.
    """
    keep, journal = settings.layers_to_keep(n_layers), journal or Journal(None, {})
    rivals: dict[str, frozenset[int]] = {}
    if held_out:
        own = selected_layers("fa_layers", swaa.fa_layers, n_layers)
        rivals = patterns(n_layers, keep)
        if own and own not in rivals.values():
            rivals[label(own, n_layers)] = own
    prompts = _choices(n_layers, keep, settings) * len(cases) + (3 + len(rivals)) * len(held_out)
    counter = Counter(on_progress, prompts)
    losses = Losses(load, swaa, n_layers, cases, journal, counter)
    answer_tokens = sum(len(case.answer) for case in cases)
    report = Report(swaa, n_layers, settings.method, keep, answer_tokens, len(cases), len(held_out))
    with ends_early(report, lambda: journal.records):
        report.full, report.sliding = losses.of(range(n_layers)), losses.of(())
        if settings.method == "greedy":
            _greedy(report, losses, report.sliding, settings)
        else:
            _rank(report, losses, report.full, report.sliding)
        if held_out:
            _compare(report, Losses(load, swaa, n_layers, held_out, journal, counter), rivals)
    return report


def patterns(n_layers: int, keep: int) -> dict[str, frozenset[int]]:
    """Return choices of about `keep` layers that need no calibration, by --fa-layers value.

    The choices are the first `keep` layers, and every k-th layer from each possible first layer.
    """
    period = max(1, round(n_layers / keep))
    periodic = {
        f"{start}::{period}": frozenset(range(start, n_layers, period)) for start in range(period) if period > 1
    }
    first = frozenset(range(keep))
    return periodic if first in periodic.values() else {f":{keep}": first} | periodic


def _choices(n_layers: int, keep: int, settings: CalibrateSettings) -> int:
    """Count the choices of layers that the method measures, if greedy finds no replacement that lowers the loss."""
    if settings.method != "greedy":
        return 3 + n_layers
    pool = settings.candidates or n_layers
    count = 2 + (n_layers if settings.candidates else 0) + sum(pool - chosen for chosen in range(keep))
    if keep > 1 and settings.swaps:
        count += keep + min(settings.swaps, keep) * (pool - keep + 1)
    return count


def _rank(report: Report, losses: Losses, full: Measured, sliding: Measured) -> None:
    layers = set(range(report.n_layers))
    for layer in sorted(layers):
        if report.method == "nll":
            gain, error = losses.of(layers - {layer}).above(full)
        else:
            gain, error = sliding.above(losses.of({layer}))
        report.rows.append(Ranked(layer, gain, error))
    report.chosen = tuple(sorted(row.layer for row in report.ranking()[: report.keep]))
    report.loss = losses.of(report.chosen)


def _greedy(report: Report, losses: Losses, sliding: Measured, settings: CalibrateSettings) -> None:
    pool = list(range(report.n_layers))
    if settings.candidates:
        alone = {layer: losses.of({layer}).loss for layer in pool}
        pool = sorted(pool, key=alone.__getitem__)[: settings.candidates]
    chosen: list[int] = []
    current = sliding
    while len(chosen) < report.keep:
        rows, current = _best_addition(losses, chosen, pool, current)
        chosen.append(rows[0].layer)
        report.rows += rows[:1] if len(chosen) < report.keep else rows
    report.chosen, report.loss = tuple(sorted(chosen)), current
    if report.keep == 1:
        return  # the first step has already tried every single layer
    # Each exchange lowers the loss, so the loop ends.
    while found := _exchange(losses, chosen, pool, current, settings.swaps):
        rest, rows, current = found
        report.rows = [*(row for row in report.rows if row.layer in rest), *rows]
        chosen = [*rest, rows[0].layer]
        report.chosen, report.loss = tuple(sorted(chosen)), current


def _exchange(
    losses: Losses, chosen: Sequence[int], pool: Iterable[int], current: Measured, swaps: int
) -> tuple[list[int], list[Ranked], Measured] | None:
    """Replace one of the `swaps` weakest chosen layers. Return None if no replacement lowers the loss.

    Returns the layers that stay, the candidates for the replacement (best first), and the loss with the best candidate.
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
    """Add each layer of `pool` to the chosen layers. Return the gains, best first, and the loss with the best layer."""
    found = {layer: losses.of({*chosen, layer}) for layer in pool if layer not in chosen}
    order = sorted(found, key=lambda layer: (found[layer].loss, layer))
    return [Ranked(layer, *current.above(found[layer])) for layer in order], found[order[0]]


def _compare(report: Report, losses: Losses, rivals: dict[str, frozenset[int]]) -> None:
    chosen = frozenset(report.chosen)
    choices = {"all": frozenset(range(report.n_layers)), "none": frozenset()} | rivals
    if chosen not in choices.values():
        choices[label(chosen, report.n_layers)] = chosen
    full: Measured | None = None
    for name, layers in choices.items():
        measured = losses.of(layers)
        full = full or measured  # all layers come first
        added, error = measured.above(full)
        row = {"fa_layers": name, "layers": sorted(layers), "chosen": layers == chosen}
        report.compared.append(row | {"loss": measured.loss, "added": added, "error": error})
