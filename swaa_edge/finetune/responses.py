"""Self-distillation data: the model's own correct responses to long prompts, under full attention.

Training should teach a model to work with a sliding window, and nothing else. The model's own responses don't change
the model's style. The authors of SWAA (arXiv 2512.10411) make their data this way.

    load = lambda n_ctx: LlamaAnswerer(SwaaLlama("model.gguf", swaa=False, n_ctx=n_ctx), max_tokens=1024, sampling={})
    collected = collect(load, read_samples("questions.jsonl", prompts), contains, DistillSettings())
    collected.lines

The model answers each record until `keep` responses are correct, but at most `samples` times. The first correct
responses are kept, so an easy record costs few responses. Keeping the shortest responses would teach the model to be
brief. Responses are sampled, because greedy responses of reasoning models tend to repeat themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from swaa_edge.errors import ConfigError
from swaa_edge.evaluate.samples import Sample
from swaa_edge.evaluate.scoring import Scorer, final
from swaa_edge.finetune.answerers import Answerer
from swaa_edge.finetune.settings import DistillSettings
from swaa_edge.support.interrupt import Stopped, ends_early
from swaa_edge.support.journal import Journal, Record
from swaa_edge.support.progress import OnProgress, Progress


@dataclasses.dataclass
class Collected:
    """The kept responses and the counts.

    lines: the training data, one dictionary per kept response, in the order of the records.
    records: number of records done.
    without_correct: number of records without a correct response.
    responses: number of all responses.
    incorrect: number of responses that the scorer rejected.
    truncated: number of responses that did not end within the token limit.
    duplicates: number of correct responses that equal a kept response.
    stopped: the reason why the run ended early, or None if it is complete.
    """

    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    records: int = 0
    without_correct: int = 0
    responses: int = 0
    incorrect: int = 0
    truncated: int = 0
    duplicates: int = 0
    stopped: Stopped = None

    def to_dict(self) -> dict[str, Any]:
        """The counts, as plain JSON values."""
        return {
            "records": self.records,
            "kept": len(self.lines),
            "without_correct": self.without_correct,
            "responses": self.responses,
            "incorrect": self.incorrect,
            "truncated": self.truncated,
            "duplicates": self.duplicates,
            "stopped": None if self.stopped is None else str(self.stopped),
        }


def collect(
    load: Callable[[int], Answerer],
    records: Sequence[Sample],
    scorer: Scorer,
    settings: DistillSettings,
    *,
    journal: Journal | None = None,
    on_progress: OnProgress | None = None,
) -> Collected:
    """Ask a model for responses to `records`, and keep the responses that `scorer` accepts.

    load(n_ctx): loads the model with room for `n_ctx` tokens. Called only if the journal lacks a response. The model is
        closed at the end.
    settings: the fields `samples`, `keep`, `max_tokens`, `seed` and `scored_by` are used.
    journal: saves responses, and supplies the responses of an earlier run. That run may have had other values of
        `samples` and `keep`. If `scored_by` differs, a response is judged again.

    The seed of each response depends on `seed`, the record's name and the response's number. A resumed run therefore
    gives the same responses as an uninterrupted run.

    KeyboardInterrupt ends the run early, and so does an error after the first response. `Collected.stopped` then has
    the reason. Raises `ConfigError` if there are no records. Loading and running the model can raise other errors.
    """
    if not records:
        raise ConfigError("there is nothing to ask; give at least one record")
    journal = journal or Journal(None, {})
    n_ctx = max(len(record.prompt) for record in records) + settings.max_tokens
    found = Collected()
    kept: set[str] = set()
    with ends_early(found, lambda: journal.records), contextlib.ExitStack() as stack:
        run = _Run(lambda: stack.enter_context(contextlib.closing(load(n_ctx))), scorer, settings, journal)
        for record in records:
            for number in _until_correct(run, record, settings, kept, found):
                if on_progress:
                    text = f"{found.records:,}/{len(records):,} records, {len(found.lines):,} kept"
                    on_progress(Progress(found.records + number / settings.samples, len(records), text))
    return found


def _until_correct(
    run: _Run, record: Sample, settings: DistillSettings, kept: set[str], found: Collected
) -> Iterator[int]:
    """Collect a record's responses in `found`. Yield the number of each response before asking the model.

    kept: hashes of the responses kept so far.
    """
    new = correct = 0
    digest = prompt_digest(record)
    for number in range(settings.samples):
        yield number
        entry = run.response(record, digest, number)
        identity = hashlib.sha256(record.prompt.tobytes() + entry["response"].strip().encode()).hexdigest()
        found.responses += 1
        if not entry["ended"]:
            found.truncated += 1
        elif not entry["correct"]:
            found.incorrect += 1
        elif identity in kept:
            correct += 1
            found.duplicates += 1
        else:
            correct += 1
            kept.add(identity)
            found.lines.append(_line(record, entry["response"], number))
            new += 1
            if new == settings.keep:
                break
    found.without_correct += not correct
    found.records += 1


def _line(record: Sample, response: str, number: int) -> dict[str, Any]:
    question = {"question": record.question} if record.question else {}
    line = {"id": record.name, "sample": number, "prompt": record.document, **question}
    return line | {"answer": response, "reference": list(record.answers)}


def seed_of(seed: int, name: str, number: int) -> int:
    """Return the seed of a response, from 0 to 2^32 - 2. llama.cpp takes 2^32 - 1 as a request for a random seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()[:8], "big") % (2**32 - 1)


def prompt_digest(record: Sample) -> str:
    """Return a hash that identifies a record by name, prompt, question and reference answers."""
    found = hashlib.sha256(json.dumps([record.name, record.answers, record.question]).encode())
    found.update(record.prompt.tobytes())
    return found.hexdigest()[:16]


class _Run:
    """Supplies responses from the journal or the model. The model is loaded when the journal lacks a response."""

    def __init__(
        self, load: Callable[[], Answerer], scorer: Scorer, settings: DistillSettings, journal: Journal
    ) -> None:
        self._model, self._scorer, self._journal = functools.cache(load), scorer, journal
        self._seed, self._scored_by = settings.seed, settings.scored_by
        self._known = {(entry.get("record"), entry.get("sample")): entry for entry in journal.records}

    def response(self, record: Sample, digest: str, number: int) -> Record:
        """Return a response to `record`: a dictionary with "response", "ended", "correct" and more.

        digest: the digest of the record.
        number: the number of the response, from 0.
        """
        entry = self._known.get((digest, number))
        if entry is not None and entry.get("scored_by") == self._scored_by:
            return entry
        if entry is None:
            made = self._model().answer(record.prompt, seed_of(self._seed, record.name, number))
            entry = {"record": digest, "id": record.name, "sample": number, "response": made.text}
            entry |= {"ended": made.ended, "tokens": made.tokens}
        correct = entry["ended"] and bool(final(entry["response"])) and self._scorer(record, entry["response"])
        entry = entry | {"correct": correct, "scored_by": self._scored_by}
        self._journal.add(entry)
        return entry


def write_lines(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return the training data as JSON Lines, in the form that `finetune` reads."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
