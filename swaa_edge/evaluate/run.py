"""Asks a model every sample under every configuration, with the same tokens, and keeps what it answered.

load = lambda swaa, n_ctx: SwaaLlama("model.gguf", swaa=swaa, n_ctx=n_ctx)
report = evaluate(load, {"full": False, "fast": SwaaConfig.from_recipe("fast")}, samples)
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, SwaaError
from swaa_edge.evaluate.report import Report
from swaa_edge.evaluate.samples import Sample
from swaa_edge.evaluate.scoring import Scorer, in_order
from swaa_edge.support.journal import Journal, Record

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

#: What a configuration can be: settings, or False for full attention.
Compared = SwaaConfig | Literal[False]
#: load(swaa, n_ctx): the model under these settings. It is closed by who asked for it.
Load = Callable[[Compared, int], "SwaaLlama"]

#: Tokens of an answer at most.
MAX_TOKENS = 64
# A fresh context's pages and caches cost time that is none of the first prompt's.
_WARM_UP = 512


@dataclasses.dataclass(frozen=True)
class Progress:
    """answers: how many of `total` are in, earlier runs included. seconds_left: None while nothing is known."""

    config: str
    answers: int
    total: int
    seconds_left: float | None


def evaluate(
    load: Load,
    configs: Mapping[str, Compared],
    samples: Sequence[Sample],
    *,
    scorer: Scorer = in_order,
    max_tokens: int = MAX_TOKENS,
    journal: Journal | None = None,
    together: bool = False,
    using: Callable[[SwaaLlama], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    on_progress: Callable[[Progress], object] | None = None,
) -> Report:
    """Ask every sample under each of `configs` (by name), greedily, and score what comes back.

    together: hold the model once per configuration and ask them in turns, sample by sample, which is what makes their
    times comparable on a machine whose speed drifts; else one configuration after the other, the model once.
    journal: where answers are kept, and those of an earlier run found; they aren't asked again.
    using(llm): what is held while `llm` works, such as a handler of Ctrl-C.

    KeyboardInterrupt, or an error once something is answered, ends the run early: `Report.stopped` says so.
    Raises `ConfigError` if there is nothing to ask, and what loading and running a model raises.
    """
    if not configs or not samples:
        raise ConfigError("there is nothing to evaluate; give at least one configuration and one sample")
    journal = journal or Journal(None, {})
    done = {(record["config"], record["sample"]) for record in journal.records}
    n_ctx = max(len(sample.prompt) for sample in samples) + max_tokens
    stopped: SwaaError | Literal["interrupted"] | None = None
    clock = _Clock(configs, samples, done, on_progress)
    try:
        for group in [list(configs)] if together else [[name] for name in configs]:
            left = [(s, name) for s in samples for name in group if (name, s.id) not in done]
            if left:
                _ask_all(load, {n: configs[n] for n in group}, left, n_ctx, scorer, max_tokens, journal, using, clock)
    except KeyboardInterrupt:
        stopped = "interrupted"
    except SwaaError as error:
        if not journal.records:
            raise
        stopped = error
    return Report(dict(configs), list(samples), journal.records, stopped)


def _ask_all(
    load: Load,
    configs: Mapping[str, Compared],
    left: Sequence[tuple[Sample, str]],
    n_ctx: int,
    scorer: Scorer,
    max_tokens: int,
    journal: Journal,
    using: Callable[[SwaaLlama], contextlib.AbstractContextManager[Any]],
    clock: _Clock,
) -> None:
    with contextlib.ExitStack() as stack:
        llms: dict[str, SwaaLlama] = {}
        for name, config in configs.items():
            if any(name == other for _, other in left):
                llms[name] = stack.enter_context(contextlib.closing(load(config, n_ctx)))
                with using(llms[name]):
                    llms[name].eval(left[0][0].prompt[:_WARM_UP])
                llms[name].reset()
        for sample, name in left:
            clock.start(name)
            with using(llms[name]):
                record = _ask(llms[name], sample, max_tokens)
            record |= {"config": name, "sample": sample.id, "correct": scorer(sample, record["reply"])}
            journal.add(record)
            clock.finish(name)


def _ask(llm: SwaaLlama, sample: Sample, max_tokens: int) -> Record:
    answer = llm.create_completion(list(sample.prompt), max_tokens=max_tokens, temperature=0.0)
    timings = llm.last_timings
    return {
        "reply": answer["choices"][0]["text"],
        "prompt_tokens": len(sample.prompt),
        "reused_tokens": timings.reused_tokens,
        "prefill_seconds": timings.prefill_seconds,
        "generated_tokens": timings.generated_tokens,
        "decode_seconds": timings.decode_seconds,
    }


class _Clock:
    """Tells `on_progress` where the run stands, and guesses the time left from each configuration's pace."""

    def __init__(
        self,
        configs: Mapping[str, Compared],
        samples: Sequence[Sample],
        done: set[tuple[str, str]],
        on_progress: Callable[[Progress], object] | None,
    ) -> None:
        self._report = on_progress
        self._left = {name: sum((name, sample.id) not in done for sample in samples) for name in configs}
        self._took: dict[str, list[float]] = {name: [] for name in configs}
        self._total = len(configs) * len(samples)
        self._started = 0.0

    def start(self, name: str) -> None:
        self._started = time.perf_counter()
        self._tell(name)

    def finish(self, name: str) -> None:
        self._took[name].append(time.perf_counter() - self._started)
        self._left[name] -= 1
        self._tell(name)

    def _tell(self, name: str) -> None:
        if self._report:
            left = sum(self._left.values())
            self._report(Progress(name, self._total - left, self._total, self._seconds_left()))

    def _seconds_left(self) -> float | None:
        known = [seconds for took in self._took.values() for seconds in took]
        if not known:
            return None

        def pace(name: str) -> float:
            took = self._took[name] or known
            return sum(took) / len(took)

        return sum(count * pace(name) for name, count in self._left.items())
