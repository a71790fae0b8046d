"""Ask a model the same questions under each configuration, and score the responses.

def load(swaa, n_ctx): return SwaaLlama("model.gguf", swaa=swaa, n_ctx=n_ctx)
report = evaluate(load, dict(full=False, fast=SwaaConfig.from_recipe("fast")), samples)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from swaa_edge.config import Configuration
from swaa_edge.errors import ConfigError
from swaa_edge.evaluate.report import Report
from swaa_edge.evaluate.samples import Sample
from swaa_edge.evaluate.scoring import Scorer, in_order
from swaa_edge.support.interrupt import Stopped, ends_early, interruptible
from swaa_edge.support.journal import Journal, Record
from swaa_edge.support.progress import OnProgress, Progress

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

#: load(swaa, n_ctx): returns the model under a configuration. The caller closes the model.
Load = Callable[[Configuration, int], "SwaaLlama"]

#: Default for the maximum length of an answer, in tokens.
MAX_TOKENS = 64
# Number of tokens for warming up. The first use of a new context is slow, and must not count as prefill time.
_WARM_UP = 512


def evaluate(
    load: Load,
    configs: Mapping[str, Configuration],
    samples: Sequence[Sample],
    *,
    scorer: Scorer = in_order,
    max_tokens: int = MAX_TOKENS,
    journal: Journal | None = None,
    together: bool = False,
    on_progress: OnProgress | None = None,
) -> Report:
    """Ask every sample under each of `configs` (by name), decode greedily, and score the responses.

    load: function that loads the model under a configuration.
    journal: stores each answer. Questions with an answer in the journal are not asked again.
    together: load all configurations at once, and ask each sample under all of them in turn. Times then stay comparable
        if the machine's speed changes. If false, the configurations run one after the other.
    on_progress: called before and after each answer. The unit of work is a prompt token.

    KeyboardInterrupt, or an error after the first answer, ends the run early. `Report.stopped` then holds
    the reason.

    Raises `ConfigError` if there are no questions or no configurations, and the errors of loading and running a model.
    """
    if not configs or not samples:
        raise ConfigError("there is nothing to evaluate; give at least one configuration and one sample")
    run = _Run(load, configs, samples, scorer, max_tokens, journal or Journal(None, {}), on_progress)
    with ends_early(run, lambda: run.journal.records):
        for group in [list(configs)] if together else [[name] for name in configs]:
            run.ask_all(group)
    return Report(dict(configs), list(samples), run.journal.records, run.stopped)


@dataclasses.dataclass
class _Run:
    load: Load
    configs: Mapping[str, Configuration]
    samples: Sequence[Sample]
    scorer: Scorer
    max_tokens: int
    journal: Journal
    on_progress: OnProgress | None
    stopped: Stopped = None

    def __post_init__(self) -> None:
        self._done = {(record["config"], record["sample"]) for record in self.journal.records}
        self._work = sum(len(s.prompt) for name in self.configs for s in self.samples if (name, s.id) in self._done)

    def ask_all(self, names: Sequence[str]) -> None:
        """Load the configurations `names` together, and ask the questions without an answer in the journal."""
        left = [(sample, name) for sample in self.samples for name in names if (name, sample.id) not in self._done]
        n_ctx = max(len(sample.prompt) for sample in self.samples) + self.max_tokens
        with contextlib.ExitStack() as stack:
            llms: dict[str, SwaaLlama] = {}
            for name in names:
                if any(name == other for _, other in left):
                    llms[name] = stack.enter_context(contextlib.closing(self.load(self.configs[name], n_ctx)))
                    with interruptible(llms[name]):
                        llms[name].eval(left[0][0].prompt[:_WARM_UP])
                    llms[name].reset()
            for sample, name in left:
                self._report(name)
                with interruptible(llms[name]):
                    record = self._ask(llms[name], sample)
                if (config := self.configs[name]) and config.tail_count:
                    # The tail saw the whole prompt. No other prompt may reuse the tail, or the order would matter.
                    llms[name].n_tokens = max(len(sample.prompt) - config.tail_count, 0)
                correct = self.scorer(sample, record["reply"])
                self.journal.add(record | {"config": name, "sample": sample.id, "correct": correct})
                self._done.add((name, sample.id))
                self._work += len(sample.prompt)
                self._report(name)

    def _ask(self, llm: SwaaLlama, sample: Sample) -> Record:
        answer = llm.create_completion(list(sample.prompt), max_tokens=self.max_tokens, temperature=0.0)
        timings = llm.last_timings
        return {
            "reply": answer["choices"][0]["text"],
            "prompt_tokens": len(sample.prompt),
            "reused_tokens": timings.reused_tokens,
            "prefill_seconds": timings.prefill_seconds,
            "generated_tokens": timings.generated_tokens,
            "decode_seconds": timings.decode_seconds,
        }

    def _report(self, name: str) -> None:
        if self.on_progress:
            total = sum(len(sample.prompt) for sample in self.samples) * len(self.configs)
            text = f"{len(self._done):,}/{len(self.samples) * len(self.configs):,} {name}"
            self.on_progress(Progress(self._work, total, text))
