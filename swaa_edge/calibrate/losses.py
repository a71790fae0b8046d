"""The loss of right answers under any choice of layers that keep full attention, measured by the engine.

    losses = Losses(load, SwaaConfig(2048, 100, fa_decode=True), n_layers=28, cases=cases)
    losses.of([]).loss - losses.of(range(28)).loss      # what it costs that all layers slide

The loss is the negative log likelihood of the answers' tokens, in nats per token. A prompt is prefill and its answer is
decode, so the loss sees what a user sees: FA decode helps the answer's tokens, and not the first one, which comes out
of the prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from swaa_edge.calibrate.cases import Case
from swaa_edge.config import CUSTOM, SwaaConfig
from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.support.journal import Journal

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

#: load(swaa, n_ctx): the model under these settings, False for full attention. It is closed by who asked for it.
Load = Callable[[SwaaConfig | Literal[False], int], "SwaaLlama"]


@dataclasses.dataclass(frozen=True)
class Progress:
    """what: the layers with full attention that are measured. done, total: prompts; total may be an estimate.

    seconds_left: None while nothing is known.
    """

    what: str
    done: int
    total: int
    seconds_left: float | None


@dataclasses.dataclass(frozen=True)
class Measured:
    """nll: of each case's whole answer, in nats; tokens: of all answers together."""

    nll: tuple[float, ...]
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per answer token."""
        return math.fsum(self.nll) / self.tokens

    def above(self, other: Measured) -> tuple[float, float | None]:
        """How much more the loss is than that of `other` on the same cases, and the standard error of that.

        The error is that of a sum of independent differences, case by case; None for a single case.
        """
        differences = [mine - theirs for mine, theirs in zip(self.nll, other.nll, strict=True)]
        count, total = len(differences), math.fsum(differences)
        if count < 2:
            return total / self.tokens, None
        variance = math.fsum((d - total / count) ** 2 for d in differences) / (count - 1)
        return total / self.tokens, math.sqrt(count * variance) / self.tokens


class Clock:
    """Counts prompts over all that a run measures, and guesses the time left from their pace."""

    def __init__(self, on_progress: Callable[[Progress], object] | None = None) -> None:
        self._report, self._took, self._measured = on_progress, 0.0, 0
        self.done = self.total = 0

    def expect(self, prompts: int) -> None:
        self.total += prompts

    def advance(self, what: str, prompts: int, seconds: float | None = None) -> None:
        """seconds: what they took; None for those that were known already, or that now begin (0 of them)."""
        self.done += prompts
        if seconds is not None:
            self._took, self._measured = self._took + seconds, self._measured + prompts
        if self._report:
            left = max(0, self.total - self.done)
            pace = self._took / self._measured if self._measured else None
            self._report(Progress(what, self.done, max(self.total, self.done), None if pace is None else pace * left))


class Losses:
    """Losses of `cases` under `swaa` with any layers as FA layers; each is measured once.

    journal: where they are kept case by case, and those of an earlier run found. using(llm): what is held while `llm`
    works, such as a handler of Ctrl-C. Raises `ConfigError` for no cases; `of` what the engine raises.
    """

    def __init__(
        self,
        load: Load,
        swaa: SwaaConfig,
        n_layers: int,
        cases: Sequence[Case],
        *,
        journal: Journal | None = None,
        using: Callable[[SwaaLlama], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        clock: Clock | None = None,
    ) -> None:
        if not cases:
            raise ConfigError("there is nothing to measure the loss of; give at least one sample")
        self.n_layers, self.cases = n_layers, list(cases)
        self._load, self._swaa, self._using = load, swaa, using
        self._journal, self._clock = journal or Journal(None, {}), clock or Clock()
        self._known = {(frozenset(r["fa_layers"]), r["case"]): r["nll"] for r in self._journal.records}

    def expect(self, configurations: int) -> None:
        """Tell the clock that so many more will be asked for."""
        self._clock.expect(configurations * len(self.cases))

    def of(self, fa_layers: Iterable[int]) -> Measured:
        """The loss with full attention in these layers; the others slide. All of them: no SWAA at all."""
        kept = frozenset(fa_layers)
        what = label(kept, self.n_layers)
        left = [case for case in self.cases if (kept, case.id) not in self._known]
        self._clock.advance(what, len(self.cases) - len(left))
        if left:
            n_ctx = max(map(len, self.cases))
            with contextlib.closing(self._load(self._config(kept), n_ctx)) as llm:
                for case in left:
                    started = time.perf_counter()
                    with self._using(llm):
                        nll = answer_nll(llm, case)
                    if not math.isfinite(nll):
                        raise GenerationError(f"the loss of {case.id} is {nll}; the model's weights may be damaged")
                    self._journal.add({"fa_layers": sorted(kept), "case": case.id, "nll": nll})
                    self._known[kept, case.id] = nll
                    self._clock.advance(what, 1, time.perf_counter() - started)
        nll = tuple(self._known[kept, case.id] for case in self.cases)
        return Measured(nll, sum(len(case.answer) for case in self.cases))

    def _config(self, kept: Collection[int]) -> SwaaConfig | Literal[False]:
        return False if len(kept) == self.n_layers else with_layers(self._swaa, kept)


def with_layers(swaa: SwaaConfig, fa_layers: Iterable[int]) -> SwaaConfig:
    """`swaa` with these FA layers instead of its own."""
    return dataclasses.replace(swaa, fa_layers=sorted(fa_layers), recipe=CUSTOM)


def label(fa_layers: Collection[int], n_layers: int) -> str:
    """FA layers as --fa-layers takes them; all but one in words, since the list would hide which."""
    if len(fa_layers) in (0, n_layers):
        return "all" if fa_layers else "none"
    if n_layers > 2 and len(fa_layers) == n_layers - 1:
        return f"all but {next(layer for layer in range(n_layers) if layer not in fa_layers)}"
    return ",".join(map(str, sorted(fa_layers)))


def answer_nll(llm: SwaaLlama, case: Case) -> float:
    """The negative log likelihood of the answer after the prompt, in nats.

    What the engine still holds of the prompt is not computed again, so cases about one document should follow one
    another. The prompt is evaluated as prefill, the answer as decode.
    """
    from swaa_edge.native import Phase, can_continue

    shared = _shared(llm, case.prompt)
    if shared and can_continue(llm.ctx, 0, shared):
        llm.n_tokens = shared
    else:
        llm.reset()
        shared = 0
    found: list[float] = []

    def add(rows: np.ndarray) -> None:
        start = len(found)
        found.extend(nll(rows, case.answer[start : start + len(rows)]))

    # The prompt's logits are needed after its last token only.
    llm.eval(case.prompt[shared:-1], phase=Phase.PREFILL)
    llm.eval(case.prompt[-1:], phase=Phase.PREFILL, on_logits=add)
    llm.eval(case.answer[:-1], phase=Phase.DECODE, on_logits=add)
    # What was computed as decode is no part of any later prompt.
    llm.n_tokens = len(case.prompt)
    return math.fsum(found)


def _shared(llm: SwaaLlama, prompt: Sequence[int]) -> int:
    """How many tokens the engine holds already, all but the last of the prompt at most."""
    length = min(llm.n_tokens, len(prompt) - 1)
    differs = llm.input_ids[:length] != np.asarray(prompt[:length], np.intc)
    return int(differs.argmax()) if differs.any() else length


def nll(logits: np.ndarray, tokens: Sequence[int]) -> list[float]:
    """Negative log likelihoods in nats: logits [n, vocab], one row before each of the n tokens."""
    rows = np.asarray(logits, np.float64)
    rows = rows - rows.max(axis=1, keepdims=True)
    return (np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), list(tokens)]).tolist()
