"""Chooses among configurations that `swaa-edge eval` measured: the most accurate that is fast enough, or the reverse.

choice = recommend(read_table("eval.json"), target_speedup=2.0); choice.config
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError
from swaa_edge.evaluate.report import pareto


@dataclasses.dataclass(frozen=True)
class Measured:
    """A row of an evaluation's table. config: None for full attention. interval: of the accuracy, 95 %.

    speedup: full attention's prefill time over this one's.
    """

    name: str
    config: SwaaConfig | None
    accuracy: float
    interval: tuple[float, float]
    speedup: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """why: one sentence. front: those that no other beats in both, fastest first."""

    chosen: Measured
    why: str
    front: list[Measured]


def read_table(path: str | os.PathLike[str]) -> list[Measured]:
    """The configurations of a document of `swaa-edge eval --json` of which speed and accuracy are known.

    Raises `ConfigError` for a file that is no such document, or in which no row has both.
    """
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}; give a file of swaa-edge eval --json") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not a JSON file: {error}") from error
    table = document.get("table") if isinstance(document, Mapping) else None
    if not isinstance(table, list):
        raise ConfigError(f'{name} has no "table"; give a file of swaa-edge eval --json')
    found = [_measured(name, number, row) for number, row in enumerate(table)]
    rows = [row for row in found if row is not None]
    if not rows:
        raise ConfigError(f"{name} has no configuration with accuracy and prefill ratio; evaluate full attention, too")
    return rows


def _measured(path: str, number: int, row: Any) -> Measured | None:
    where = f"{path}: row {number + 1} of the table"
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} is no JSON object; give a file of swaa-edge eval --json")
    values = {}
    for key in ("config", "accuracy", "prefill_ratio"):
        if key not in row:
            raise ConfigError(f"{where} lacks {key}; give a file of swaa-edge eval --json")
        values[key] = row[key]
    if values["accuracy"] is None or values["prefill_ratio"] is None:
        return None
    for key in ("accuracy", "prefill_ratio"):
        if isinstance(values[key], bool) or not isinstance(values[key], int | float):
            raise ConfigError(f"{where}: {key} = {values[key]!r} must be a number")
    interval = row.get("interval") or [values["accuracy"]] * 2
    settings = row.get("swaa")
    try:
        config = None if settings is None else SwaaConfig.from_dict(settings)
        low, high = map(float, interval)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: interval = {interval!r} must be two numbers") from None
    return Measured(str(values["config"]), config, values["accuracy"], (low, high), values["prefill_ratio"])


def recommend(
    rows: Sequence[Measured], *, target_speedup: float | None = None, min_accuracy: float | None = None
) -> Choice:
    """The most accurate of those at least `target_speedup` times as fast as full attention in prefill; or the fastest
    of those with at least `min_accuracy` (0 to 1); with both, the most accurate that meets both.

    Raises `ConfigError` if neither is given, or none qualifies.
    """
    if target_speedup is None and min_accuracy is None:
        raise ConfigError("there is no aim; give a target speedup, or the least accuracy")
    if not rows:
        raise ConfigError("there is nothing to choose from; give at least one configuration")
    names = pareto({str(at): (-row.speedup, row.accuracy) for at, row in enumerate(rows)})
    front = sorted((rows[int(at)] for at in names), key=lambda row: (-row.speedup, -row.accuracy))
    # Whatever meets an aim is matched or beaten by one of the front, so the rest needn't be looked at.
    fit = [
        row
        for row in front
        if (target_speedup is None or row.speedup >= target_speedup)
        and (min_accuracy is None or row.accuracy >= min_accuracy)
    ]
    if not fit:
        raise ConfigError(_none_fits(front, target_speedup, min_accuracy))
    if target_speedup is not None:
        chosen = max(fit, key=lambda row: (row.accuracy, row.speedup))
        aim = f"at least {target_speedup:.2f}x as fast in prefill"
        if min_accuracy is not None:
            aim += f" and {min_accuracy:.1%} accurate"
        why = f"{_told(chosen)}: the most accurate of {_of(len(rows))} that is {aim}"
    else:
        chosen = max(fit, key=lambda row: (row.speedup, row.accuracy))
        why = f"{_told(chosen)}: the fastest of {_of(len(rows))} that is at least {min_accuracy:.1%} accurate"
    return Choice(chosen, why + _doubt(chosen, min_accuracy), front)


def _told(row: Measured) -> str:
    return f"{row.name}, {row.accuracy:.1%} accurate, {row.speedup:.2f}x in prefill"


def _of(count: int) -> str:
    return f"{count} configurations" if count > 1 else "1 configuration"


def _doubt(row: Measured, min_accuracy: float | None) -> str:
    if min_accuracy is None or row.interval[0] >= min_accuracy:
        return ""
    return f" (its 95% interval, {row.interval[0]:.1%} to {row.interval[1]:.1%}, leaves doubt: take more samples)"


def _none_fits(front: Sequence[Measured], target_speedup: float | None, min_accuracy: float | None) -> str:
    aims = [] if target_speedup is None else [f"reaches {target_speedup:.2f}x in prefill"]
    if min_accuracy is not None:
        aims.append(f"is {min_accuracy:.1%} accurate")
    ends = f"the fastest is {_told(front[0])}, the most accurate {_told(front[-1])}"
    return f"no configuration {' and '.join(aims)}; {ends}"
