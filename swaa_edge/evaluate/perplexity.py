"""Task `ppl`: how well a model predicts the user's own text under each configuration, and how far that is from full.

Retrieval tells whether a model still finds things; this tells, on any text and without questions, how much its
predictions change: perplexity, and per token the Kullback-Leibler divergence KL(full || configuration).

    report = measure(load, {"full": False, "fast": SwaaConfig.from_recipe("fast")}, tokens, 4096); report.rows()

Full attention and one configuration are loaded side by side and walk the text ubatch by ubatch, so what is held is
the logits of one ubatch of each. All tokens are prefill: nothing is generated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, GenerationError, SwaaError
from swaa_edge.evaluate.run import Compared, Load, Progress
from swaa_edge.support.journal import Journal, Record

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

Using = Callable[["SwaaLlama"], contextlib.AbstractContextManager[Any]]
# Logits turned into float64 at once, 32 MB of them.
_AT_ONCE = 1 << 22


@dataclasses.dataclass
class PerplexityReport:
    """What was measured so far. windows: how many the text has. stopped: None if the run is complete, "interrupted",
    or the error that ended it."""

    configs: dict[str, Compared]
    length: int
    windows: int
    records: list[Record]
    stopped: SwaaError | Literal["interrupted"] | None = None

    def of(self, config: str) -> list[Record]:
        """The records of a configuration, in the order of the windows."""
        found = {record["window"]: record for record in self.records if record["config"] == config}
        return [found[window] for window in sorted(found) if window < self.windows]

    def rows(self) -> list[dict[str, Any]]:
        """One row per configuration of which a window is done: plain JSON values.

        tokens: predicted ones. nll: mean of -log p, natural logarithm; ppl: its exponential. kl: mean of
        KL(full || configuration). same_top: share of tokens whose most likely next token is that of full attention.
        nll_increase: over full attention, on the same tokens. ..._error: standard error of a mean, over windows; None
        for a single one. past_window: the same of the positions that don't see all before them (only there can
        anything differ); None for full attention, and if there are none.
        """
        return [self._row(name, records) for name in self.configs if (records := self.of(name))]

    def _row(self, name: str, records: list[Record]) -> dict[str, Any]:
        config = self.configs[name]
        past = [record["past_window"] for record in records if record["past_window"]]
        return {
            "config": name,
            "swaa": config.to_dict() if config else None,
            "windows": len(records),
            **_means([record["all"] for record in records]),
            "past_window": _means(past) if past else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {
            "perplexity": self.rows(),
            "length": self.length,
            "windows": self.windows,
            "stopped": str(self.stopped) if self.stopped else None,
        }


def measure(
    load: Load,
    configs: Mapping[str, Compared],
    tokens: Sequence[int],
    length: int,
    *,
    windows: int | None = None,
    journal: Journal | None = None,
    using: Using = contextlib.nullcontext,
    on_progress: Callable[[Progress], object] | None = None,
) -> PerplexityReport:
    """Measure each of `configs` (by name) on the text `tokens`, cut into windows of `length` tokens.

    tokens: of the text alone. The first token of a window is never predicted; if the model wants a start token, that
    takes its place. What doesn't fill a window at the end is left out. windows: how many at most, from the first.
    load, using: as in `evaluate`; contexts get `length` tokens. journal: where each window's figures are kept, and
    those of an earlier run found. on_progress: after each ubatch; `Progress.answers` counts windows.

    KeyboardInterrupt, or an error once a window is done, ends the run early: `PerplexityReport.stopped` says so.
    Raises `ConfigError` if the text is shorter than a window, and what loading and running a model raises.
    """
    if not configs:
        raise ConfigError("there is nothing to measure; give at least one configuration")
    if length < 2:
        raise ConfigError(f"length = {length} must be at least 2, one token to read and one to predict")
    if windows is not None and windows < 1:
        raise ConfigError(f"windows = {windows} must be at least 1")
    count = min(len(tokens) // length, windows or len(tokens))
    if count == 0:
        raise ConfigError(f"the text has {len(tokens)} tokens, fewer than a window of {length}; take a longer text")
    parts = [list(tokens[at * length : (at + 1) * length]) for at in range(count)]
    journal = journal or Journal(None, {})
    walk = _Walk(load, dict(configs), parts, journal, using, on_progress)
    stopped: SwaaError | Literal["interrupted"] | None = None
    try:
        walk.run()
    except KeyboardInterrupt:
        stopped = "interrupted"
    except SwaaError as error:
        if not journal.records:
            raise
        stopped = error
    return PerplexityReport(dict(configs), length, count, journal.records, stopped)


class _Walk:
    """One run over all configurations and windows."""

    def __init__(
        self,
        load: Load,
        configs: dict[str, Compared],
        parts: list[list[int]],
        journal: Journal,
        using: Using,
        on_progress: Callable[[Progress], object] | None,
    ) -> None:
        self._load, self._configs, self._parts = load, configs, parts
        self._journal, self._using, self._report = journal, using, on_progress
        self._length = len(parts[0])
        done = {(record["config"], record["window"]) for record in journal.records}
        self._left = {name: [at for at in range(len(parts)) if (name, at) not in done] for name in configs}
        self._seconds = 0.0
        self._tokens = 0  # that these seconds went into, of both models

    def run(self) -> None:
        full = [name for name, config in self._configs.items() if not config]
        sliding = [name for name, config in self._configs.items() if config]
        if not any(self._left.values()):
            return
        with contextlib.closing(self._load(False, self._length)) as base:
            for name in sliding:
                if self._left[name]:
                    with contextlib.closing(self._load(self._configs[name], self._length)) as other:
                        self._compare(name, base, other, full)
            # Each comparison measured full attention too; what it did not get to is measured alone.
            for name in full:
                for window in list(self._left[name]):
                    self._window(window, base, None, {name: None})

    def _compare(self, name: str, base: SwaaLlama, other: SwaaLlama, full: Sequence[str]) -> None:
        config = self._configs[name]
        assert config
        for window in list(self._left[name]):
            also = {other_name: None for other_name in full if window in self._left[other_name]}
            self._window(window, base, other, {**also, name: config})

    def _window(
        self, window: int, base: SwaaLlama, other: SwaaLlama | None, configs: Mapping[str, SwaaConfig | None]
    ) -> None:
        """Measure a window and keep the record of each of `configs`; None is full attention."""
        name = list(configs)[-1]
        part = list(self._parts[window])
        if base._model.add_bos_token():
            part[0] = base.token_bos()
        llms = [base] if other is None else [base, other]
        # What both compute at once, so that each has the rows of the same tokens, all of them.
        step = min(min(llm.context_params.n_ubatch, llm.n_batch) for llm in llms)
        for llm in llms:
            llm.reset()
        figures: dict[str, list[np.ndarray]] = {}
        for start in range(0, self._length - 1, step):
            self._tell(name)
            began = time.perf_counter()
            chunk = part[start : min(start + step, self._length - 1)]
            for key, values in self._chunk(llms, chunk, part[start + 1 : start + 1 + len(chunk)]).items():
                figures.setdefault(key, []).append(values)
            self._seconds += time.perf_counter() - began
            self._tokens += len(chunk) * len(llms)
        whole = {key: np.concatenate(values) for key, values in figures.items()}
        if not all(np.isfinite(values).all() for values in whole.values()):
            raise GenerationError(f"the logits of {name} are not numbers in window {window}; is the model file sound?")
        for measured, config in configs.items():
            self._journal.add(_record(measured, window, whole, config))
            self._left[measured].remove(window)
        self._tell(name)

    def _chunk(self, llms: Sequence[SwaaLlama], chunk: Sequence[int], targets: Sequence[int]) -> dict[str, np.ndarray]:
        """Evaluate one ubatch after those before on each, full attention first, and compare."""
        kept: list[np.ndarray] = []
        found: list[dict[str, np.ndarray]] = []
        self._eval(llms[0], chunk, lambda rows: kept.append(rows.copy()))
        if len(llms) == 1:
            return compare(kept[0], kept[0], targets)
        self._eval(llms[1], chunk, lambda rows: found.append(compare(kept[0], rows, targets)))
        return found[0]

    def _eval(self, llm: SwaaLlama, chunk: Sequence[int], on_logits: Callable[[np.ndarray], object]) -> None:
        from swaa_edge.native import Phase

        with self._using(llm):
            llm.eval(chunk, phase=Phase.PREFILL, on_logits=on_logits)

    def _tell(self, name: str) -> None:
        if self._report:
            left = sum(map(len, self._left.values()))
            total = len(self._configs) * len(self._parts)
            self._report(Progress(name, total - left, total, self._seconds_left()))

    def _seconds_left(self) -> float | None:
        if not self._tokens:
            return None
        sliding = [left for name, left in self._left.items() if self._configs[name]]
        alone = {at for name, left in self._left.items() if not self._configs[name] for at in left}.difference(*sliding)
        passes = 2 * sum(map(len, sliding)) + len(alone)
        return passes * self._length * self._seconds / self._tokens


def compare(full: np.ndarray, other: np.ndarray, targets: Sequence[int]) -> dict[str, np.ndarray]:
    """Per position, from logits [positions, n_vocab] and the tokens that came next; float64 [positions] each.

    nll, full_nll: -log p of the next token. kl: KL(full || other), in nats. same: 1 where both have the same most
    likely token, else 0.
    """
    found: list[tuple[np.ndarray, ...]] = []
    size = max(1, _AT_ONCE // full.shape[1])
    for at in range(0, len(full), size):
        p, q = full[at : at + size], other[at : at + size]
        log_p = _log_softmax(p)
        log_q = log_p if other is full else _log_softmax(q)
        row = np.arange(len(p))
        target = np.asarray(targets[at : at + size])
        share = np.exp(log_p)
        # A token of no probability counts nothing, and its logarithm is no number.
        with np.errstate(invalid="ignore"):
            kl = np.multiply(share, log_p - log_q, out=np.zeros_like(share), where=share > 0).sum(axis=1)
        same = (p.argmax(axis=1) == q.argmax(axis=1)).astype(np.float64)
        found.append((-log_q[row, target], -log_p[row, target], np.maximum(kl, 0.0), same))
    return dict(zip(("nll", "full_nll", "kl", "same"), map(np.concatenate, zip(*found, strict=True)), strict=True))


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def _record(name: str, window: int, figures: Mapping[str, np.ndarray], config: SwaaConfig | None) -> Record:
    if config is None:
        full, count = figures["full_nll"], len(figures["full_nll"])
        own = {"nll": full, "full_nll": full, "kl": np.zeros(count), "same": np.ones(count)}
        return {"config": name, "window": window, "all": _sums(own), "past_window": None}
    # The first position from which a key is hidden: it lies behind the sinks, and the window doesn't reach it.
    first = config.window_size + config.sink_count
    past = {key: values[first:] for key, values in figures.items()}
    return {
        "config": name,
        "window": window,
        "all": _sums(figures),
        "past_window": _sums(past) if len(past["nll"]) else None,
    }


def _sums(figures: Mapping[str, np.ndarray]) -> dict[str, Any]:
    sums = {key: math.fsum(values) for key, values in figures.items()}
    return {"tokens": len(figures["nll"]), **sums}


def _means(sums: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one entry per window: means over all tokens, and their standard errors over windows of equal size."""
    tokens = sum(entry["tokens"] for entry in sums)

    def of(value: Callable[[Mapping[str, Any]], float]) -> tuple[float, float | None]:
        each = [value(entry) / entry["tokens"] for entry in sums]
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
        return math.fsum(map(value, sums)) / tokens, error

    nll, nll_error = of(lambda entry: entry["nll"])
    kl, kl_error = of(lambda entry: entry["kl"])
    increase, increase_error = of(lambda entry: entry["nll"] - entry["full_nll"])
    return {
        "tokens": tokens,
        "nll": nll,
        "nll_error": nll_error,
        "ppl": math.exp(min(nll, 700.0)),
        "nll_increase": increase,
        "nll_increase_error": increase_error,
        "kl": kl,
        "kl_error": kl_error,
        "same_top": math.fsum(entry["same"] for entry in sums) / tokens,
    }
