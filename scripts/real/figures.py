"""Computes the figures of docs/results-real.md from the raw results: means, with bootstrap intervals over documents.

    figures = Figures(document); figures.excess(2048, "sinks + FA decode @ 256", 128, "passages")

Questions about one document are not independent, so each bootstrap sample draws whole documents, with replacement.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any, NamedTuple

import numpy as np

from swaa_edge.evaluate.report import wilson

DRAWS = 2000
FULL = "full @ None"


class Value(NamedTuple):
    """A value, and the two ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Figures:
    """The figures of one JSON document of results that measure.py wrote."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.rows = {(row["length"], row["row"]): row for row in document["rows"]}
        self._cells = {(c["length"], c["row"], c["tail"], c["task"]): c for c in document["cells"]}
        self._scored = {(each["length"], each["task"]): each["scored"] for each in document["asked"]}
        texts = document.get("perplexity", {})
        self._texts = {(int(length), row["row"]): row for length, rows in texts.items() for row in rows}

    @property
    def lengths(self) -> list[int]:
        return sorted({length for length, _ in self.rows})

    def windows(self, length: int) -> list[int]:
        return sorted({row["window"] for (at, _), row in self.rows.items() if at == length and row["window"]})

    def documents(self, length: int) -> int:
        return len(self._scored[length, "passages"])

    def tails(self, length: int, row: str) -> list[int]:
        return [int(tail) for tail in self.rows[length, row]["pairs"]]

    def cells(self, length: int, window: int) -> list[tuple[str, int]]:
        """Return the row and tail of each line of the table for this window.

        Full attention comes first, then rows with fewer strategies before rows with more, and calibrated rows last.
        """
        rows = [row for (at, row), about in self.rows.items() if at == length and about["window"] == window]
        rows.sort(key=lambda row: (row.startswith("calibrated"), row.count(" + "), not row.startswith("naive")))
        return [(row, tail) for row in (FULL, *rows) for tail in self.tails(length, row)]

    def decodes(self, length: int, row: str) -> bool:
        """Return whether the row has FA decode, without which a tail has no effect."""
        swaa = self.rows[length, row]["swaa"]
        return bool(swaa and swaa["fa_decode"])

    def untrained(self, length: int, row: str) -> bool:
        """Return whether the row is a configuration of SWAA without an adapter."""
        about = self.rows[length, row]
        return row != FULL and not about.get("adapter")

    def named(self, length: int, config: str, window: int | None) -> str | None:
        """Return the row of this configuration and window, or None if it was not measured."""
        row = f"{config} @ {window}"
        return row if (length, row) in self.rows else None

    def loss(self, length: int, row: str, tail: int, task: str) -> Value:
        """Return the mean loss in nats per token."""
        nll, tokens = self._nll(length, row, tail, task), self._tokens(length, task)
        draws = _draws(len(nll))
        return _value(nll.sum() / tokens.sum(), nll[draws].sum(axis=1) / tokens[draws].sum(axis=1))

    def excess(self, length: int, row: str, tail: int, task: str) -> Value:
        """Return the loss that the row adds to full attention's, as a fraction of the loss that a bare window adds.

        The bare window has the same size as the row's.
        """
        naive = f"naive @ {self.rows[length, row]['window']}"
        full, bare, own = (self._nll(length, name, at, task) for name, at in ((FULL, 0), (naive, 0), (row, tail)))
        draws = _draws(len(full))
        over = (own - full)[draws].sum(axis=1) / (bare - full)[draws].sum(axis=1)
        return _value((own - full).sum() / (bare - full).sum(), over)

    def apart(self, length: int, one: tuple[str, int], other: tuple[str, int], task: str) -> Value:
        """Return the loss of `one` minus the loss of `other`, in nats per token; each is a row and a tail."""
        over, tokens = self._nll(length, *one, task) - self._nll(length, *other, task), self._tokens(length, task)
        draws = _draws(len(over))
        return _value(over.sum() / tokens.sum(), over[draws].sum(axis=1) / tokens[draws].sum(axis=1))

    def exact(self, length: int, row: str, tail: int, task: str) -> Value:
        """Return the fraction of the scored tokens that the model predicts correctly."""
        hits, tokens = (
            np.array([sum(each) for each in self._cell(length, row, tail, task)["hits"]]),
            self._tokens(length, task),
        )
        draws = _draws(len(hits))
        return _value(hits.sum() / tokens.sum(), hits[draws].sum(axis=1) / tokens[draws].sum(axis=1))

    def facts(self, length: int, row: str, tail: int) -> tuple[int, int, Value]:
        """Score the row on the facts for which full attention gives the correct value.

        Returns how many of these facts the row gets right, how many there are, and the fraction with Wilson's interval.
        """
        known = self._right(length, FULL, 0)
        own = [mine for mine, full in zip(self._right(length, row, tail), known, strict=True) if full]
        low, high = wilson(sum(own), len(own))
        return sum(own), len(own), Value(sum(own) / max(len(own), 1), low, high)

    def asked(self, length: int, task: str) -> int:
        return sum(map(len, self._scored[length, task]))

    def prefill(self, length: int, row: str) -> float:
        """Return the speed-up of the prefill over full attention: the median over the documents."""
        return statistics.median(self.rows[length, row]["prefill"])

    def pairs(self, length: int, row: str, tail: int) -> float:
        return self.rows[length, row]["pairs"][str(tail)]

    def text(self, length: int, row: str) -> dict[str, Any] | None:
        """Return the row's perplexity and KL divergence, or None if they were not measured.

        The text is all prompt, so FA decode has no effect, and the values are those of the same row without FA decode.
        """
        config, _, window = row.partition(" @ ")
        plain = " + ".join(part for part in config.split(" + ") if part != "FA decode") or "naive"
        return self._texts.get((length, f"{plain} @ {window}"))

    def _right(self, length: int, row: str, tail: int) -> list[bool]:
        hits = self._cell(length, row, tail, "facts")["hits"]
        scored = self._scored[length, "facts"]
        return [
            hit == all_ for mine, full in zip(hits, scored, strict=True) for hit, all_ in zip(mine, full, strict=True)
        ]

    def _cell(self, length: int, row: str, tail: int, task: str) -> dict[str, Any]:
        return self._cells[length, row, tail, task]

    def _nll(self, length: int, row: str, tail: int, task: str) -> np.ndarray:
        """Return the loss of each document in nats, summed over its questions."""
        return np.array([sum(each) for each in self._cell(length, row, tail, task)["nll"]])

    def _tokens(self, length: int, task: str) -> np.ndarray:
        return np.array([sum(each) for each in self._scored[length, task]])


@functools.cache
def _draws(count: int) -> np.ndarray:
    """Return the bootstrap samples: [DRAWS, count] document numbers, drawn with replacement from a fixed seed."""
    return np.random.default_rng(0).integers(0, count, (DRAWS, count))


def _value(value: float, drawn: np.ndarray) -> Value:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Value(float(value), float(low), float(high))
