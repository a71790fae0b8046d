"""The loss of reference answers under any choice of full-attention layers, measured by the engine.

    losses = Losses(load, SwaaConfig(2048, 100, fa_decode=True), n_layers=28, cases=cases)
    losses.of([]).loss - losses.of(range(28)).loss      # the loss that sliding in all layers adds

The loss is the negative log likelihood of the answers' tokens, in nats per token. A prompt is evaluated as prefill and
its answer as decode, so FA decode lowers the loss as in normal use. FA decode helps all answer tokens except the first.
The last prompt token predicts the first answer token. Only with a tail does the last prompt token see the whole prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from swaa_edge.calibrate.cases import Case
from swaa_edge.config import CUSTOM, FULL_ATTENTION, Configuration, SwaaConfig
from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.evaluate.perplexity import nll
from swaa_edge.support.interrupt import interruptible
from swaa_edge.support.journal import Journal
from swaa_edge.support.progress import OnProgress, Progress

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

#: load(swaa, n_ctx): returns a model. The caller closes the model.
Load = Callable[[Configuration, int], "SwaaLlama"]
OnRows = Callable[[np.ndarray, Sequence[int]], object]


@dataclasses.dataclass(frozen=True)
class Measured:
    """nll: negative log likelihood of each case's answer, in nats. tokens: total number of answer tokens."""

    nll: tuple[float, ...]
    tokens: int

    @property
    def loss(self) -> float:
        """Return the mean negative log likelihood per answer token, in nats."""
        return math.fsum(self.nll) / self.tokens

    def above(self, other: Measured) -> tuple[float, float | None]:
        """Return this loss minus the loss of `other` on the same cases, and the standard error of the difference.

        The standard error assumes independent cases. For a single case, the standard error is None.
        """
        differences = [mine - theirs for mine, theirs in zip(self.nll, other.nll, strict=True)]
        count, total = len(differences), math.fsum(differences)
        if count < 2:
            return total / self.tokens, None
        variance = math.fsum((d - total / count) ** 2 for d in differences) / (count - 1)
        return total / self.tokens, math.sqrt(count * variance) / self.tokens


class Counter:
    """Counts the prompts of a run that are done, and reports progress. total: expected number of prompts."""

    def __init__(self, on_progress: OnProgress | None = None, total: int = 0) -> None:
        self._report, self._done, self._total = on_progress, 0, total

    def advance(self, layers: str, prompts: int) -> None:
        """Count more prompts as done. layers: text from `label` for the choice of layers that is being measured."""
        self._done += prompts
        if self._report:
            self._report(Progress(self._done, max(self._total, self._done), f"full attention in layers: {layers}"))


class Losses:
    """Losses of `cases` under `swaa` for any choice of full-attention layers. Each choice is measured once.

    journal: stores the loss of each case, and supplies the losses of an earlier run.

    The constructor raises `ConfigError` if `cases` is empty. The method `of` raises the errors of loading and running a
    model. Ctrl-C stops a measurement within one ubatch.
    """

    def __init__(
        self,
        load: Load,
        swaa: SwaaConfig,
        n_layers: int,
        cases: Sequence[Case],
        journal: Journal | None = None,
        counter: Counter | None = None,
    ) -> None:
        if not cases:
            raise ConfigError("there are no samples to measure the loss on; give at least one")
        self.n_layers, self.cases = n_layers, list(cases)
        self._load, self._swaa = load, swaa
        self._journal, self._counter = journal or Journal(None, {}), counter or Counter()
        self._known = {(frozenset(r["fa_layers"]), r["case"]): r["nll"] for r in self._journal.records}

    def of(self, fa_layers: Iterable[int]) -> Measured:
        """Return the loss if only `fa_layers` keep full attention. If no layer slides, the model runs without SWAA."""
        kept = frozenset(fa_layers)
        layers = label(kept, self.n_layers)
        missing = [case for case in self.cases if (kept, case.id) not in self._known]
        self._counter.advance(layers, len(self.cases) - len(missing))
        if missing:
            config = FULL_ATTENTION if len(kept) == self.n_layers else with_layers(self._swaa, kept)
            with contextlib.closing(self._load(config, max(map(len, self.cases)))) as llm:
                for case in missing:
                    with interruptible(llm):
                        loss = answer_nll(llm, case)
                    if not math.isfinite(loss):
                        raise GenerationError(f"the loss of {case.id} is {loss}; the model's weights may be damaged")
                    self._journal.add({"fa_layers": sorted(kept), "case": case.id, "nll": loss})
                    self._known[kept, case.id] = loss
                    self._counter.advance(layers, 1)
        found = tuple(self._known[kept, case.id] for case in self.cases)
        return Measured(found, sum(len(case.answer) for case in self.cases))


def with_layers(swaa: SwaaConfig, fa_layers: Iterable[int]) -> SwaaConfig:
    """Return `swaa` with other full-attention layers."""
    return dataclasses.replace(swaa, fa_layers=sorted(fa_layers), recipe=CUSTOM)


def label(fa_layers: Collection[int], n_layers: int) -> str:
    """Return text for a choice of FA layers: "all", "none", "all but 3" or a list such as "1,3,5"."""
    if len(fa_layers) in (0, n_layers):
        return "all" if fa_layers else "none"
    if n_layers > 2 and len(fa_layers) == n_layers - 1:
        return f"all but {next(layer for layer in range(n_layers) if layer not in fa_layers)}"
    return ",".join(map(str, sorted(fa_layers)))


def answer_nll(llm: SwaaLlama, case: Case) -> float:
    """Return the negative log likelihood of the answer, given the prompt, in nats."""
    found: list[float] = []
    read_answers(llm, [case], lambda rows, tokens: found.extend(nll(rows, tokens)))
    return math.fsum(found)


def read_answers(llm: SwaaLlama, cases: Iterable[Case], on_rows: OnRows, tail_count: int | None = None) -> None:
    """Evaluate each prompt and its answer. `on_rows` gets the logits that predict the answer's tokens.

    on_rows(rows, tokens): called several times per case. Row i of the logits [n, n_vocab] predicts token i. The rows
        are overwritten after the call.
    tail_count: number of tail tokens (default: as in the model's settings).

    The cache must not hold a tail, so call `reset` first if the model evaluated anything else. After an error, the
    cache is empty.

    Cases about one document should follow one another: shared prompt tokens stay in the engine's cache and are not
    evaluated again. A tail can begin inside the document. Only prompts of equal length share this part of the document.
    """
    if tail_count is None:
        tail_count = llm.swaa.tail_count if llm.swaa else 0
    held = math.inf  # the decode boundary of the prompt in the cache; at first, the cache holds no tail
    try:
        for case in cases:
            boundary = max(len(case.prompt) - tail_count, 0)
            shared = _shared(llm, case.prompt)
            if boundary != held:
                shared = min(shared, boundary, held)
            _read_answer(llm, case, on_rows, boundary, shared)
            held = boundary
    except BaseException:
        llm.reset()
        raise
    # Tokens from the boundary on may have seen more than prompt tokens see. No later prompt may reuse these tokens.
    llm.n_tokens = min(llm.n_tokens, held)


def _read_answer(llm: SwaaLlama, case: Case, on_rows: OnRows, boundary: int, shared: int) -> None:
    """Evaluate a prompt and its answer.

    on_rows: as in `read_answers`.
    boundary: the prompt's decode boundary.
    shared: number of tokens at the start of the prompt that are in the engine's cache.
    """
    from swaa_edge.native import can_continue

    if shared and can_continue(llm.ctx, 0, shared):
        llm.n_tokens = shared
    else:
        llm.reset()
        shared = 0
    done = 0

    def add(rows: np.ndarray) -> None:
        nonlocal done
        on_rows(rows, case.answer[done : done + len(rows)])
        done += len(rows)

    # Of the prompt, only the last token's logits are needed.
    llm.eval(case.prompt[shared:-1], decode_from=boundary)
    llm.eval(case.prompt[-1:], decode_from=boundary, on_logits=add)
    llm.eval(case.answer[:-1], decode_from=boundary, on_logits=add)


def _shared(llm: SwaaLlama, prompt: Sequence[int]) -> int:
    """Count the tokens at the start of the prompt that are in the engine's cache. The last token never counts."""
    length = min(llm.n_tokens, len(prompt) - 1)
    differs = llm.input_ids[:length] != np.asarray(prompt[:length], np.intc)
    return int(differs.argmax()) if differs.any() else length
