"""Results of an evaluation as rows: accuracy, times, and speed-up over full attention.

report.rows(); report.cells(); report.to_dict()
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from swaa_edge.config import Configuration
from swaa_edge.engine.configurations import FULL
from swaa_edge.evaluate.samples import Sample
from swaa_edge.support.interrupt import Stopped
from swaa_edge.support.journal import Record

# Quantile of the standard normal distribution for a two-sided 95% interval.
_Z = 1.959964
# Maximum fraction of reused tokens. Prefill times of prompts with a larger fraction are ignored.
_REUSED = 0.1


@dataclasses.dataclass
class Report:
    """The results of an evaluation so far.

    stopped: None if the run is complete, otherwise "interrupted" or the error.
    """

    configs: dict[str, Configuration]
    samples: Sequence[Sample]
    records: list[Record]
    stopped: Stopped = None

    def __post_init__(self) -> None:
        self._samples = {sample.id: sample for sample in self.samples}
        self._records = {
            (record["config"], record["sample"]): record
            for record in self.records
            if record["config"] in self.configs and record["sample"] in self._samples
        }

    def of(self, config: str) -> list[Record]:
        """Return the records of a configuration, in the order of the samples."""
        found = (self._records.get((config, sample.id)) for sample in self.samples)
        return [record for record in found if record is not None]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row of plain JSON values for each configuration that has answers.

        accuracy: fraction of correct answers over all tasks.
        interval: Wilson's 95% interval of the accuracy.
        prefill_seconds: median prefill time. Prompts with more than a tenth of reused tokens don't count.
        prefill_ratio: median speed-up over full attention on the same prompts (None without full attention).
        """
        return [self._row(name, records) for name in self.configs if (records := self.of(name))]

    def _row(self, name: str, records: list[Record]) -> dict[str, Any]:
        config = self.configs[name]
        whole = [record for record in records if not _reused(record)]
        seconds = [record["prefill_seconds"] for record in whole]
        decoded = sum(record["generated_tokens"] for record in records)
        spent = sum(record["decode_seconds"] for record in records)
        tasks = dict.fromkeys(self._samples[record["sample"]].task for record in records)
        return {
            "config": name,
            "swaa": config.to_dict() if config else None,
            **counted(records),
            "tasks": {task: counted(r for r in records if self._samples[r["sample"]].task == task) for task in tasks},
            "prompt_tokens": statistics.median(record["prompt_tokens"] for record in records),
            "prefill_seconds": statistics.median(seconds) if seconds else None,
            "prefill_ratio": self._ratio(name, whole),
            "decode_tok_s": decoded / spent if spent > 0 else None,
        }

    def _ratio(self, name: str, whole: Iterable[Record]) -> float | None:
        pairs = ((self._records.get((FULL, record["sample"])), record) for record in whole)
        ratios = [
            full["prefill_seconds"] / record["prefill_seconds"]
            for full, record in pairs
            if full and not _reused(full) and record["prefill_seconds"] > 0
        ]
        return statistics.median(ratios) if ratios else None

    def cells(self) -> list[dict[str, Any]]:
        """Return accuracy by configuration, task, length, depth and style (None where a task has no such value)."""
        found: dict[tuple[Any, ...], list[Record]] = {}
        for (name, sample_id), record in self._records.items():
            sample = self._samples[sample_id]
            key = (name, sample.task, sample.length, sample.depth, sample.style)
            found.setdefault(key, []).append(record)
        names = ("config", "task", "length", "depth", "style")
        return [dict(zip(names, key, strict=True)) | counted(records) for key, records in found.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return rows, cells and all answers as plain JSON values."""
        return {
            "table": self.rows(),
            "cells": self.cells(),
            "answers": [record for name in self.configs for record in self.of(name)],
            "stopped": str(self.stopped) if self.stopped else None,
        }


def _reused(record: Mapping[str, Any]) -> bool:
    return record["reused_tokens"] > _REUSED * record["prompt_tokens"]


def counted(records: Iterable[Record]) -> dict[str, Any]:
    """Return the counts `samples` and `correct`, and the `accuracy` with its `interval`."""
    correct = [bool(record["correct"]) for record in records]
    low, high = wilson(sum(correct), len(correct))
    return {
        "samples": len(correct),
        "correct": sum(correct),
        "accuracy": sum(correct) / len(correct),
        "interval": [low, high],
    }


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95% score interval of a proportion. The interval stays within 0 and 1, even for few samples.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if total == 0:
        return 0.0, 1.0
    fraction = correct / total
    spread = _Z * math.sqrt(fraction * (1 - fraction) / total + _Z**2 / (4 * total**2))
    centre, scale = fraction + _Z**2 / (2 * total), 1 + _Z**2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names on the Pareto front of low cost and high gain.

    points: pairs (cost, gain) by name.
    """
    return [
        name
        for name, (cost, gain) in points.items()
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points.values())
    ]
