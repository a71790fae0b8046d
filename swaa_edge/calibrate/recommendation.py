"""Recommends one of the configurations that `swaa-edge eval` measured.

choice = recommend("eval.json", target_speedup=2.0, output="settings.json"); print(choice.why)
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
from swaa_edge.support.atomic import check_outputs, write_json


@dataclasses.dataclass(frozen=True)
class Row:
    """A configuration that `swaa-edge eval` measured.

    config: the SWAA settings, or None for full attention.
    interval: 95% interval of the accuracy.
    speedup: prefill time of full attention, divided by the configuration's prefill time.
    """

    name: str
    config: SwaaConfig | None
    accuracy: float
    interval: tuple[float, float]
    speedup: float


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The result of `recommend`.

    why: the reason for the choice, in one sentence.
    front: the Pareto front of speed and accuracy, fastest first.
    """

    chosen: Row
    why: str
    front: list[Row]

    def __str__(self) -> str:
        return self.why

    def to_dict(self) -> dict[str, Any]:
        """Return the recommendation as plain JSON values."""
        chosen = self.chosen
        return {
            "config": chosen.name,
            "swaa": chosen.config.to_dict() if chosen.config else None,
            "accuracy": chosen.accuracy,
            "interval": list(chosen.interval),
            "prefill_ratio": chosen.speedup,
            "why": self.why,
            "front": [
                {"config": row.name, "accuracy": row.accuracy, "prefill_ratio": row.speedup} for row in self.front
            ],
        }


def recommend(
    measured: str | os.PathLike[str],
    *,
    target_speedup: float | None = None,
    min_accuracy: float | None = None,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Recommendation:
    """Choose a configuration from `measured`, a document written by `swaa-edge eval --json`.

    With target_speedup, the most accurate configuration that fits is chosen. Otherwise, the fastest is chosen.

    target_speedup: minimum prefill speed-up over full attention.
    min_accuracy: minimum accuracy, from 0 to 1.
    output: path of a file for the chosen settings. The option --config can read the file.
    force: replace an existing file.

    Raises `ConfigError` if the document is invalid, if no minimum is given, or if no configuration fits. Also raises
    `ConfigError` if `output` is given but full attention was chosen.
    Raises `OutputError` if `output` can't be written.
    """
    if target_speedup is None and min_accuracy is None:
        raise ConfigError("give a target speed-up, a minimum accuracy or both")
    if output is not None:
        check_outputs((os.fspath(output),), force=force, others=(measured,))
    choice = _choose(_read_table(measured), target_speedup, min_accuracy)
    if output is not None:
        if choice.chosen.config is None:
            raise ConfigError(f"full attention was chosen, which has no settings to write to {output}: {choice.why}")
        write_json(output, choice.chosen.config.to_dict(), force=force)
    return choice


def _read_table(path: str | os.PathLike[str]) -> list[Row]:
    """Read the configurations with known speed and accuracy. Raise `ConfigError` if there are none."""
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise ConfigError(
            f"cannot read {name}: {error.strerror}; give a file written by swaa-edge eval --json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not a JSON file: {error}") from error
    table = document.get("table") if isinstance(document, Mapping) else None
    if not isinstance(table, list):
        raise ConfigError(f'{name} has no "table"; give a file written by swaa-edge eval --json')
    found = [_measured(name, number, row) for number, row in enumerate(table)]
    rows = [row for row in found if row is not None]
    if not rows:
        raise ConfigError(f"{name} has no configuration with accuracy and prefill ratio; evaluate full attention too")
    return rows


def _measured(path: str, number: int, row: Any) -> Row | None:
    where = f"{path}: row {number + 1} of the table"
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} is not a JSON object; give a file written by swaa-edge eval --json")
    for key in ("config", "accuracy", "prefill_ratio"):
        if key not in row:
            raise ConfigError(f"{where} lacks {key}; give a file written by swaa-edge eval --json")
    if row["accuracy"] is None or row["prefill_ratio"] is None:
        return None
    for key in ("accuracy", "prefill_ratio"):
        if isinstance(row[key], bool) or not isinstance(row[key], int | float):
            raise ConfigError(f"{where}: {key} = {row[key]!r} must be a number")
    interval = row.get("interval") or [row["accuracy"]] * 2
    settings = row.get("swaa")
    try:
        config = None if settings is None else SwaaConfig.from_dict(settings)
        low, high = map(float, interval)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: interval = {interval!r} must be two numbers") from None
    return Row(str(row["config"]), config, row["accuracy"], (low, high), row["prefill_ratio"])


def _choose(rows: Sequence[Row], target_speedup: float | None, min_accuracy: float | None) -> Recommendation:
    names = pareto({str(at): (-row.speedup, row.accuracy) for at, row in enumerate(rows)})
    front = sorted((rows[int(at)] for at in names), key=lambda row: (-row.speedup, -row.accuracy))
    # For each configuration off the front, some configuration on the front is at least as fast and as accurate.
    fit = [row for row in front if row.speedup >= (target_speedup or 0) and row.accuracy >= (min_accuracy or 0)]
    if not fit:
        aims = [] if target_speedup is None else [f"a prefill speed-up of {target_speedup:.2f}x"]
        aims += [] if min_accuracy is None else [f"{min_accuracy:.1%} accuracy"]
        ends = f"the fastest is {_shown(front[0])}; the most accurate is {_shown(front[-1])}"
        raise ConfigError(f"no configuration has {' and '.join(aims)}; {ends}")
    aims = [] if target_speedup is None else [f"a prefill speed-up of at least {target_speedup:.2f}x"]
    aims += [] if min_accuracy is None else [f"at least {min_accuracy:.1%} accuracy"]
    best = max(fit, key=lambda row: row.accuracy)
    chosen, what = (fit[0], "fastest") if target_speedup is None else (best, "most accurate")
    count = f"{len(rows)} configuration{'s' * (len(rows) > 1)}"
    why = f"{_shown(chosen)}: the {what} of {count} with {' and '.join(aims)}"
    if min_accuracy is not None and chosen.interval[0] < min_accuracy:
        low, high = chosen.interval
        why += f" (uncertain: its 95% interval is {low:.1%} to {high:.1%}; take more samples)"
    return Recommendation(chosen, why, front)


def _shown(row: Row) -> str:
    return f"{row.name}, {row.accuracy:.1%} accurate, prefill {row.speedup:.2f}x"
