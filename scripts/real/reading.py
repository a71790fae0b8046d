"""Runs the engine for measure.py: prefills a document once per configuration, then asks all questions.

    measure_stage(stage, documents, load, journal, on_progress)

All rows of a stage stay loaded. A document is measured under every row before the next document, so that times are
comparable. The journal gets one record per document and row. An interrupted run loses at most one record.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from real.cells import FULL, Row, Stage
from real.tasks import Document
from swaa_edge.calibrate.losses import read_answers
from swaa_edge.evaluate.perplexity import nll
from swaa_edge.support.interrupt import Stopped, interruptible
from swaa_edge.support.journal import Journal, Record

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

#: load(row, n_ctx): returns the model for a row. The caller closes the model.
LoadRow = Callable[[Row, int], "SwaaLlama"]
#: on_document(record): called for each new record.
OnDocument = Callable[[Record], object]


def finished(stopped: Stopped) -> None:
    """Raise the reason for which a run ended early, if it did. stopped: as in the reports of swaa_edge."""
    if stopped == "interrupted":
        raise KeyboardInterrupt
    if stopped:
        raise stopped


def answers_of(records: Sequence[Record], length: int, row: Row, document: Document) -> Record | None:
    """Return the record of this row and document, or None if it lacks a tail of the row or has other settings."""
    about = {"length": length, "row": row.key, "identity": row.identity, "document": document.name}
    for each in reversed(records):
        if about.items() <= each.items() and set(map(str, row.tails)) <= each["answers"].keys():
            return each
    return None


def measure_stage(
    stage: Stage,
    documents: Sequence[Document],
    load: LoadRow,
    journal: Journal,
    on_document: OnDocument | None = None,
    threads: int = 1,
) -> None:
    """Measure each row on each document, except for records in the journal. Raises KeyboardInterrupt on Ctrl-C.

    threads: number of CPU threads of the models, for the records.
    """
    with contextlib.ExitStack() as stack:
        llms: dict[str, SwaaLlama] = {}
        for document in documents:
            left = [row for row in stage.rows if not answers_of(journal.records, stage.length, row, document)]
            # An earlier stage already asked full attention. Another prefill gives a time to compare the rows with.
            if left and left[0] is not FULL:
                left.insert(0, FULL)
            for row in left:
                if row.key not in llms:
                    llms[row.key] = stack.enter_context(contextlib.closing(load(row, stage.length)))
                asked = not answers_of(journal.records, stage.length, row, document)
                with interruptible(llms[row.key]):
                    record = _read(llms[row.key], row, document, asked)
                about = {"length": stage.length, "row": row.key, "identity": row.identity, "document": document.name}
                record |= {**about, "threads": threads}
                journal.add(record)
                if on_document:
                    on_document(record)


def _read(llm: SwaaLlama, row: Row, document: Document, asked: bool) -> Record:
    """Prefill the document. Return the seconds of the prefill, and the results of all questions for each tail.

    asked: whether to ask the questions.
    """
    from swaa_edge.native import NEVER

    llm.reset()
    started = time.perf_counter()
    llm.eval(document.tokens, decode_from=NEVER)
    seconds = time.perf_counter() - started
    answers = {str(tail): ask(llm, document, tail) for tail in row.tails} if asked else {}
    return {"seconds": round(seconds, 3), "answers": answers}


def ask(llm: SwaaLlama, document: Document, tail_count: int) -> list[tuple[float, int]]:
    """Return two figures per question: the loss in nats, and the number of correct predictions.

    Both figures are sums over the scored tokens.
    """
    losses: list[float] = []
    hits: list[bool] = []

    def score(rows: np.ndarray, tokens: Sequence[int]) -> None:
        losses.extend(nll(rows, tokens))
        hits.extend(rows.argmax(axis=1) == np.asarray(tokens))

    read_answers(llm, map(document.case, document.questions), score, tail_count)
    ends = itertools.accumulate(len(question.answer) for question in document.questions)
    scored = [slice(end - question.scored, end) for end, question in zip(ends, document.questions, strict=True)]
    return [(round(float(sum(losses[each])), 3), int(sum(hits[each]))) for each in scored]
