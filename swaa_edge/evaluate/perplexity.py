"""The task `ppl`: perplexity of a text under each configuration, and divergence from full attention.

Retrieval tasks show whether a model still finds facts. The task `ppl` shows how much SWAA changes the predictions for a
text. The divergence is the mean Kullback-Leibler divergence KL(full || configuration) per token.

    report = measure(load, {"full": False, "fast": SwaaConfig.from_recipe("fast")}, tokens, 4096); report.rows()

Full attention and one configuration are loaded together. Both evaluate the text ubatch by ubatch, so memory holds only
one ubatch of logits per model. All tokens are evaluated as prefill. Nothing is generated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from swaa_edge.config import FULL_ATTENTION, Configuration
from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.evaluate.run import Load
from swaa_edge.support.interrupt import Stopped, ends_early, interruptible
from swaa_edge.support.journal import Journal, Record
from swaa_edge.support.progress import OnProgress, Progress

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

# Number of logits that are converted to float64 together (32 MB).
_CHUNK = 1 << 22


@dataclasses.dataclass
class PerplexityReport:
    """The results of a perplexity measurement so far.

    length: tokens per window.
    windows: number of windows per configuration in a complete run.
    stopped: None if the run is complete, otherwise "interrupted" or the error.
    """

    configs: dict[str, Configuration]
    length: int
    windows: int
    records: list[Record]
    stopped: Stopped = None

    def of(self, config: str) -> list[Record]:
        """Return the records of a configuration, one per window, in order."""
        found = {record["window"]: record for record in self.records if record["config"] == config}
        return [found[window] for window in sorted(found) if window < self.windows]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row of plain JSON values for each configuration with a complete window.

        tokens: number of predicted tokens.
        nll: mean negative log likelihood in nats.
        ppl: perplexity, the exponential of nll.
        kl: mean of KL(full || configuration) in nats.
        same_top: fraction of positions with the same most likely next token as full attention.
        nll_increase: nll minus the nll under full attention, on the same tokens.
        nll_error, nll_increase_error, kl_error: standard errors over the windows (None for a single window).
        past_window: the same fields for the positions beyond window and sinks (None if there are none). At
            earlier positions, predictions are the same as under full attention.
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
        """Return `rows` and the state of the run as plain JSON values."""
        return {
            "perplexity": self.rows(),
            "length": self.length,
            "windows": self.windows,
            "stopped": str(self.stopped) if self.stopped else None,
        }


def measure(
    load: Load,
    configs: Mapping[str, Configuration],
    tokens: Sequence[int],
    length: int,
    *,
    windows: int | None = None,
    journal: Journal | None = None,
    on_progress: OnProgress | None = None,
) -> PerplexityReport:
    """Measure the perplexity of a text under each of `configs` (by name).

    load: function that loads the model, as in `evaluate`. The context has `length` tokens.
    tokens: the text, without a start token.
    length: number of tokens per window. The text is split into windows, and a shorter remainder is dropped. The first
        token of a window is not predicted. If the model uses a start token, the start token replaces the first token.
    windows: maximum number of windows, taken from the start of the text.
    journal: stores the results of each window. Windows in the journal are not measured again.
    on_progress: called before each ubatch and after each window. The unit of work is a token evaluated by one model.

    KeyboardInterrupt, or an error after the first window, ends the run early. `PerplexityReport.stopped` then holds
    the reason.

    Raises `ConfigError` if the text is shorter than a window, and the errors of loading and running a model.
    """
    if not configs:
        raise ConfigError("there is nothing to measure; give at least one configuration")
    if length < 2:
        raise ConfigError(f"length = {length} must be at least 2: one token to evaluate and one to predict")
    if windows is not None and windows < 1:
        raise ConfigError(f"windows = {windows} must be at least 1")
    count = min(len(tokens) // length, windows or len(tokens))
    if count == 0:
        raise ConfigError(f"the text has {len(tokens)} tokens, fewer than a window of {length}; use a longer text")
    parts = [list(tokens[at * length : (at + 1) * length]) for at in range(count)]
    journal = journal or Journal(None, {})
    report = PerplexityReport(dict(configs), length, count, journal.records)
    with ends_early(report, lambda: journal.records):
        _Run(load, dict(configs), parts, journal, on_progress).measure_all()
    return report


class _Run:
    def __init__(
        self,
        load: Load,
        configs: dict[str, Configuration],
        parts: list[list[int]],
        journal: Journal,
        on_progress: OnProgress | None,
    ) -> None:
        self._load, self._configs, self._parts = load, configs, parts
        self._journal, self._on_progress = journal, on_progress
        self._length = len(parts[0])
        done = {(record["config"], record["window"]) for record in journal.records}
        self._left = {name: [at for at in range(len(parts)) if (name, at) not in done] for name in configs}
        sliding = [left for name, left in self._left.items() if configs[name]]
        alone = {at for name, left in self._left.items() if not configs[name] for at in left}.difference(*sliding)
        # Numbers of tokens over both models: evaluated so far, and at the end.
        self._tokens, self._total = 0, (2 * sum(map(len, sliding)) + len(alone)) * (self._length - 1)

    def measure_all(self) -> None:
        if not any(self._left.values()):
            return
        full = [name for name, config in self._configs.items() if not config]
        with contextlib.closing(self._load(FULL_ATTENTION, self._length)) as base:
            for name, config in self._configs.items():
                if not config or not self._left[name]:
                    continue
                with contextlib.closing(self._load(config, self._length)) as other:
                    for window in list(self._left[name]):
                        also = [also for also in full if window in self._left[also]]
                        self._window(window, base, other, [*also, name])
            # Each comparison also measured full attention. The other windows have no comparison.
            for name in full:
                for window in list(self._left[name]):
                    self._window(window, base, None, [name])

    def _window(self, window: int, base: SwaaLlama, other: SwaaLlama | None, names: Sequence[str]) -> None:
        """Measure a window and store a record for each of `names`. The last name belongs to `other`."""
        name = names[-1]
        part = list(self._parts[window])
        if base._model.add_bos_token():
            part[0] = base.token_bos()
        llms = [base] if other is None else [base, other]
        # Both models must evaluate the same tokens per call, so the smaller ubatch counts.
        step = min(min(llm.context_params.n_ubatch, llm.n_batch) for llm in llms)
        for llm in llms:
            llm.reset()
        figures: dict[str, list[np.ndarray]] = {}
        for start in range(0, self._length - 1, step):
            self._report(name)
            chunk = part[start : min(start + step, self._length - 1)]
            for key, values in self._chunk(llms, chunk, part[start + 1 : start + 1 + len(chunk)]).items():
                figures.setdefault(key, []).append(values)
            self._tokens += len(chunk) * len(llms)
        whole = {key: np.concatenate(values) for key, values in figures.items()}
        if not all(np.isfinite(values).all() for values in whole.values()):
            raise GenerationError(
                f"the logits of {name} are NaN or infinite in window {window}; the model file may be damaged"
            )
        for measured in names:
            self._journal.add(_record(measured, window, whole, self._configs[measured]))
            self._left[measured].remove(window)
        self._report(name)

    def _chunk(self, llms: Sequence[SwaaLlama], chunk: Sequence[int], targets: Sequence[int]) -> dict[str, np.ndarray]:
        """Evaluate the next ubatch with each model, and compare the logits. The first model has full attention."""
        kept: list[np.ndarray] = []
        found: list[dict[str, np.ndarray]] = []
        self._eval(llms[0], chunk, lambda rows: kept.append(rows.copy()))
        if len(llms) == 1:
            return divergence(kept[0], kept[0], targets)
        self._eval(llms[1], chunk, lambda rows: found.append(divergence(kept[0], rows, targets)))
        return found[0]

    def _eval(self, llm: SwaaLlama, chunk: Sequence[int], on_logits: Callable[[np.ndarray], object]) -> None:
        from swaa_edge.native import NEVER

        with interruptible(llm):
            llm.eval(chunk, decode_from=NEVER, on_logits=on_logits)

    def _report(self, name: str) -> None:
        if self._on_progress:
            windows = len(self._configs) * len(self._parts)
            left = sum(map(len, self._left.values()))
            self._on_progress(Progress(self._tokens, self._total, f"{windows - left:,}/{windows:,} windows, {name}"))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log softmax of each row of logits as float64 [n, n_vocab]."""
    rows = np.asarray(logits).astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows


def nll(logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Return the negative log likelihoods of n tokens in nats. Row i of logits [n, n_vocab] predicts token i."""
    return -_log_softmax(logits)[np.arange(len(logits)), np.asarray(tokens, np.intp)]


def divergence(full: np.ndarray, other: np.ndarray, targets: Sequence[int]) -> dict[str, np.ndarray]:
    """Compare the logits of two models at each position.

    full, other: logits [positions, n_vocab].
    targets: the actual next tokens [positions].

    Returns float64 arrays [positions] with these keys:
    - `nll`: negative log likelihood of the target under `other`, in nats.
    - `full_nll`: negative log likelihood of the target under `full`, in nats.
    - `kl`: KL(full || other) in nats.
    - `same`: 1 where both models have the same most likely token, else 0.
    """
    found: list[tuple[np.ndarray, ...]] = []
    size = max(1, _CHUNK // full.shape[1])
    for at in range(0, len(full), size):
        p, q = full[at : at + size], other[at : at + size]
        log_p = _log_softmax(p)
        log_q = log_p if other is full else _log_softmax(q)
        row = np.arange(len(p))
        target = np.asarray(targets[at : at + size])
        probability = np.exp(log_p)
        # A token of probability 0 has an infinite logarithm but contributes 0.
        with np.errstate(invalid="ignore"):
            terms = np.multiply(probability, log_p - log_q, out=np.zeros_like(probability), where=probability > 0)
        kl = np.maximum(terms.sum(axis=1), 0.0)
        same = (p.argmax(axis=1) == q.argmax(axis=1)).astype(np.float64)
        found.append((-log_q[row, target], -log_p[row, target], kl, same))
    return dict(zip(("nll", "full_nll", "kl", "same"), map(np.concatenate, zip(*found, strict=True)), strict=True))


def _record(name: str, window: int, figures: Mapping[str, np.ndarray], config: Configuration) -> Record:
    if not config:
        full, count = figures["full_nll"], len(figures["full_nll"])
        own = {"nll": full, "full_nll": full, "kl": np.zeros(count), "same": np.ones(count)}
        return {"config": name, "window": window, "all": _sums(own), "past_window": None}
    past = {key: values[config.reach :] for key, values in figures.items()}
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
    """Return the means over all tokens and the standard errors of the means.

    sums: the sums of each window.
    """
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
