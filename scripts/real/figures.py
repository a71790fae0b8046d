"""Computes the figures of docs/results-real.md from the raw results: means with bootstrap intervals.

    figures = Figures(document); figures.excess(2048, "sinks + FA decode @ 256", 128, "passages")

Questions about one document are not independent. Bootstrap samples therefore draw whole documents, with replacement.
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
    """A value with a 95 % interval."""

    value: float
    low: float
    high: float


class Figures:
    """The figures of one JSON document from measure.py."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.rows = {(row["length"], row["row"]): row for row in document["rows"]}
        self._cells = {(c["length"], c["row"], c["tail"], c["task"]): c for c in document["cells"]}
        self._scored = {(each["length"], each["task"]): each["scored"] for each in document["asked"]}
        texts = document.get("perplexity", {})
        self._texts = {(int(length), row["row"]): row for length, rows in texts.items() for row in rows}

    @property
    def lengths(self) -> list[int]:
        """The prompt lengths that have results."""
        return sorted({length for length, _ in self.rows if self.windows(length)})

    def windows(self, length: int) -> list[int]:
        """Return the windows that have results. Every figure needs full attention and the bare window."""
        found = {row["window"] for (at, _), row in self.rows.items() if at == length and row["window"]}
        needed = {window: ((length, FULL), (length, f"naive @ {window}")) for window in found}
        return sorted(window for window in found if all(row in self.rows for row in needed[window]))

    def documents(self, length: int) -> int:
        return len(self._scored[length, "passages"])

    def tails(self, length: int, row: str) -> list[int]:
        return [int(tail) for tail in self.rows[length, row]["pairs"]]

    def cells(self, length: int, window: int) -> list[tuple[str, int]]:
        """Return the row and tail of each line of the table for a window.

        Full attention comes first, and calibrated rows come last. Other rows are sorted by the number of strategies.
        """
        rows = [row for (at, row), about in self.rows.items() if at == length and about["window"] == window]
        rows.sort(key=lambda row: (row.startswith("calibrated"), row.count(" + "), not row.startswith("naive")))
        return [(row, tail) for row in (FULL, *rows) for tail in self.tails(length, row)]

    def decodes(self, length: int, row: str) -> bool:
        """Return whether the row has FA decode. Without FA decode, a tail has no effect."""
        swaa = self.rows[length, row]["swaa"]
        return bool(swaa and swaa["fa_decode"])

    def has(self, length: int, row: str, tail: int) -> bool:
        """Return whether the row was measured with this tail."""
        about = self.rows.get((length, row))
        return about is not None and about["window"] in self.windows(length) and tail in self.tails(length, row)

    def untrained(self, length: int, row: str) -> bool:
        """Return whether the row has SWAA but no adapter."""
        about = self.rows[length, row]
        return row != FULL and not about.get("adapter")

    def named(self, length: int, config: str, window: int | None) -> str | None:
        """Return the key of a row, or None if the row was not measured."""
        row = f"{config} @ {window}"
        return row if (length, row) in self.rows else None

    def loss(self, length: int, row: str, tail: int, task: str) -> Value:
        """Return the mean loss in nats per token."""
        nll, tokens = self._nll(length, row, tail, task), self._tokens(length, task)
        draws = _draws(len(nll))
        return _value(nll.sum() / tokens.sum(), nll[draws].sum(axis=1) / tokens[draws].sum(axis=1))

    def excess(self, length: int, row: str, tail: int, task: str) -> Value:
        """Return the loss that a row adds, as a fraction of the loss that a bare window adds.

        Both losses are added to the loss of full attention. Row and bare window have the same window size.
        """
        naive = f"naive @ {self.rows[length, row]['window']}"
        full, bare, own = (self._nll(length, name, at, task) for name, at in ((FULL, 0), (naive, 0), (row, tail)))
        draws = _draws(len(full))
        over = (own - full)[draws].sum(axis=1) / (bare - full)[draws].sum(axis=1)
        return _value((own - full).sum() / (bare - full).sum(), over)

    def apart(self, length: int, one: tuple[str, int], other: tuple[str, int], task: str) -> Value:
        """Return the loss of `one` minus the loss of `other`, in nats per token. one, other: row and tail."""
        over, tokens = self._nll(length, *one, task) - self._nll(length, *other, task), self._tokens(length, task)
        draws = _draws(len(over))
        return _value(over.sum() / tokens.sum(), over[draws].sum(axis=1) / tokens[draws].sum(axis=1))

    def exact(self, length: int, row: str, tail: int, task: str) -> Value:
        """Return the fraction of scored tokens that are predicted correctly."""
        hits, tokens = (
            np.array([sum(each) for each in self._cell(length, row, tail, task)["hits"]]),
            self._tokens(length, task),
        )
        draws = _draws(len(hits))
        return _value(hits.sum() / tokens.sum(), hits[draws].sum(axis=1) / tokens[draws].sum(axis=1))

    def facts(self, length: int, row: str, tail: int) -> tuple[int, int, Value]:
        """Score a row on the facts that full attention gets right.

        Returns the number of facts that the row gets right, the number of facts, and the fraction. The interval is
        Wilson's.
        """
        known = self._right(length, FULL, 0)
        own = [mine for mine, full in zip(self._right(length, row, tail), known, strict=True) if full]
        low, high = wilson(sum(own), len(own))
        return sum(own), len(own), Value(sum(own) / max(len(own), 1), low, high)

    def asked(self, length: int, task: str) -> int:
        return sum(map(len, self._scored[length, task]))

    def prefill(self, length: int, row: str) -> float:
        """Return the prefill's speed-up over full attention (median over the documents)."""
        return statistics.median(self.rows[length, row]["prefill"])

    def pairs(self, length: int, row: str, tail: int) -> float:
        return self.rows[length, row]["pairs"][str(tail)]

    def text(self, length: int, row: str) -> dict[str, Any] | None:
        """Return the row's perplexity and KL divergence, or None if nothing was measured.

        All tokens of the text are prompt tokens, so FA decode has no effect. The values are from the same row without
        FA decode.
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
        """Return each document's loss in nats, summed over the questions."""
        return np.array([sum(each) for each in self._cell(length, row, tail, task)["nll"]])

    def _tokens(self, length: int, task: str) -> np.ndarray:
        return np.array([sum(each) for each in self._scored[length, task]])


@functools.cache
def _draws(count: int) -> np.ndarray:
    """Draw bootstrap samples of document numbers, [DRAWS, count], with replacement. The seed is fixed."""
    return np.random.default_rng(0).integers(0, count, (DRAWS, count))


def _value(value: float, drawn: np.ndarray) -> Value:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Value(float(value), float(low), float(high))
