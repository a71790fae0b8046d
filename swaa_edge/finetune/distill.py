"""Self-distillation data: the model's own right replies to long prompts, given under full attention.

What a model is trained on under a sliding window should teach it the window and nothing else. Its own replies do: they
are in its words already. This is how the authors of SWAA (arXiv 2512.10411) make their data.

    load = lambda n_ctx: LlamaAnswerer(SwaaLlama("model.gguf", swaa=False, n_ctx=n_ctx), max_tokens=1024, sampling={})
    result = distill(load, read_samples("questions.jsonl", prompts), contains, n_ctx=32768)
    lines = result.lines

A record is asked again, up to `samples` times, until `keep` replies of it are right. The first right ones are kept: so
a kept reply is what the model says when it is right, where the shortest would teach it to be brief, and an easy record
costs one reply. All are sampled, none is greedy: greedy replies of models that think tend to go in circles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from swaa_edge.errors import ConfigError, SwaaError
from swaa_edge.evaluate.datafile import FileSample
from swaa_edge.evaluate.scoring import Scorer, final
from swaa_edge.finetune.answerers import Answerer
from swaa_edge.support.journal import Journal, Record

#: Replies to a record at most; tokens of a reply at most; how it is sampled.
SAMPLES, MAX_TOKENS, TEMPERATURE = 4, 1024, 0.7


@dataclasses.dataclass(frozen=True)
class Progress:
    """Of `total` records, `done` are through and gave `kept` replies; the next reply is number `sample`, from 0.

    seconds_left: None while nothing is known.
    """

    done: int
    total: int
    kept: int
    sample: int
    seconds_left: float | None


@dataclasses.dataclass
class Distilled:
    """lines: the data, a dictionary per kept reply, in the order of the records.

    done: records that are through; without: those of them that have no right reply. asked: replies there were, of
    which `wrong` were judged so, `cut_off` didn't end within the limit of tokens, and `duplicates` were right, but
    the same as one that is kept. stopped: why it ended early, if it did.
    """

    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    done: int = 0
    without: int = 0
    asked: int = 0
    wrong: int = 0
    cut_off: int = 0
    duplicates: int = 0
    stopped: SwaaError | Literal["interrupted"] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The counts, as plain JSON values."""
        return {
            "records": self.done,
            "kept": len(self.lines),
            "without": self.without,
            "replies": self.asked,
            "wrong": self.wrong,
            "cut_off": self.cut_off,
            "duplicates": self.duplicates,
            "stopped": None if self.stopped is None else str(self.stopped),
        }


def distill(
    load: Callable[[int], Answerer],
    records: Sequence[FileSample],
    scorer: Scorer,
    *,
    n_ctx: int,
    samples: int = SAMPLES,
    keep: int = 1,
    seed: int = 0,
    scored_by: str = "",
    journal: Journal | None = None,
    on_progress: Callable[[Progress], object] | None = None,
) -> Distilled:
    """Ask for replies to `records`, and keep those that are right by `scorer`.

    load(n_ctx): the model, with room for `n_ctx` tokens; called only if something is left to ask, and closed at the
    end. samples: replies to a record at most. keep: how many right ones are kept of it. journal: where replies are
    kept, and those of an earlier run found; they are not asked for again, whatever `samples` and `keep` were then.
    scored_by: names the scorer; a verdict of another one in the journal is not taken over. seed: each reply has its
    own, made of this, the record's name and the reply's number, so an interrupted run goes on as if it had not been.

    KeyboardInterrupt, or an error once something is answered, ends the run early: `Distilled.stopped` says so.
    Raises `ConfigError` for numbers that make no sense, and what loading and running a model raises.
    """
    if not records:
        raise ConfigError("there is nothing to ask; give at least one record")
    if not 1 <= keep <= samples:
        raise ConfigError(f"keep = {keep} must be from 1 to samples = {samples}")
    journal = journal or Journal(None, {})
    run = _Run(load, scorer, n_ctx, seed, scored_by, journal)
    result, clock = Distilled(), _Clock(len(records), on_progress)
    seen: set[str] = set()
    try:
        with run:
            for record in records:
                clock.start(run.asked)
                _replies(run, record, samples, keep, seen, result, clock)
                clock.finish(run.asked)
    except KeyboardInterrupt:
        result.stopped = "interrupted"
    except SwaaError as error:
        if not journal.records:
            raise
        result.stopped = error
    return result


def _replies(
    run: _Run, record: FileSample, samples: int, keep: int, seen: set[str], result: Distilled, clock: _Clock
) -> None:
    """Add a record's replies to `result`. seen: those kept so far, of all records."""
    kept = right = 0
    told = prompt_digest(record)
    for number in range(samples):
        clock.tell(len(result.lines), number)
        reply = run.reply(record, told, number)
        same = hashlib.sha256(record.prompt.tobytes() + reply["reply"].strip().encode()).hexdigest()
        result.asked += 1
        if not reply["ended"]:
            result.cut_off += 1
        elif not reply["right"]:
            result.wrong += 1
        else:
            right += 1
            if same in seen:
                result.duplicates += 1
                continue
            seen.add(same)
            result.lines.append(_line(record, reply["reply"], number))
            kept += 1
            if kept == keep:
                break
    result.without += not right
    result.done += 1


def _line(record: FileSample, reply: str, number: int) -> dict[str, Any]:
    question = {"question": record.question} if record.question else {}
    told = {"id": record.name, "sample": number, "prompt": record.document, **question}
    return told | {"answer": reply, "reference": list(record.answers)}


def seed_of(seed: int, name: str, number: int) -> int:
    """The seed of a record's reply: from 0, and never the one that llama.cpp takes for "any"."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()[:8], "big") % (2**32 - 1)


def prompt_digest(record: FileSample) -> str:
    """Changes with what is asked in a record or held to be right."""
    found = hashlib.sha256(json.dumps([record.name, record.answers, record.question]).encode())
    found.update(record.prompt.tobytes())
    return found.hexdigest()[:16]


class _Run:
    """The replies: those in the journal, and those of a model that is loaded when the first is missing."""

    def __init__(
        self, load: Callable[[int], Answerer], scorer: Scorer, n_ctx: int, seed: int, scored_by: str, journal: Journal
    ) -> None:
        self._load, self._scorer, self._n_ctx, self._seed, self._by = load, scorer, n_ctx, seed, scored_by
        self._journal, self._stack = journal, contextlib.ExitStack()
        self._model: Answerer | None = None
        self._known = {(kept.get("record"), kept.get("sample")): kept for kept in journal.records}
        #: Replies that were asked for in this run.
        self.asked = 0

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def reply(self, record: FileSample, told: str, number: int) -> Record:
        """Reply `number` to a record, with "reply", "ended" and "right". told: the record's digest."""
        known = self._known.get((told, number))
        if known is not None and known.get("by") == self._by:
            return known
        if known is None:
            if self._model is None:
                self._model = self._stack.enter_context(contextlib.closing(self._load(self._n_ctx)))
            self.asked += 1
            answer = self._model.answer(record.prompt, seed_of(self._seed, record.name, number))
            known = {"record": told, "id": record.name, "sample": number, "reply": answer.text}
            known |= {"ended": answer.ended, "tokens": answer.tokens}
        right = known["ended"] and bool(final(known["reply"])) and self._scorer(record, known["reply"])
        known = known | {"right": right, "by": self._by}
        self._journal.add(known)
        return known


class _Clock:
    """Tells `on_progress` where the run stands, and guesses the time left from the records that were asked."""

    def __init__(self, total: int, on_progress: Callable[[Progress], object] | None) -> None:
        self._total, self._report = total, on_progress
        self._done = self._timed = self._asked = 0
        self._seconds = self._started = 0.0

    def start(self, asked: int) -> None:
        self._asked, self._started = asked, time.perf_counter()

    def tell(self, kept: int, number: int) -> None:
        if self._report:
            left = self._seconds / self._timed * (self._total - self._done) if self._timed else None
            self._report(Progress(self._done, self._total, kept, number, left))

    def finish(self, asked: int) -> None:
        self._done += 1
        if asked > self._asked:  # one that was in the journal tells nothing
            self._timed += 1
            self._seconds += time.perf_counter() - self._started


def write_lines(lines: Iterable[Mapping[str, Any]]) -> str:
    """The data as JSON Lines, as `finetune` reads it."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
