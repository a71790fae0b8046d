"""The engine's part of measure.py: each document is read once per configuration and asked everything.

    measure_stage(stage, documents, load, journal, on_progress)

The rows of a stage are loaded together and take turns document by document, so that their times are comparable. One
record per document and row goes into the journal; an interrupted run loses at most the one that it was measuring.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from real.cells import FULL, Row, Stage
from real.tasks import Document, Question
from swaa_edge.calibrate.losses import Load, read_answer
from swaa_edge.evaluate.perplexity import nll
from swaa_edge.support.interrupt import interruptible
from swaa_edge.support.journal import Journal, Record

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

#: on_document(record): called for each record that is new.
OnDocument = Callable[[Record], object]


def place(length: int, row: Row, document: Document) -> tuple[int, str, str]:
    """What identifies a record."""
    return length, row.key, document.name


def measured(records: Sequence[Record]) -> dict[tuple[int, str, str], Record]:
    """The records with answers, by place."""
    return {(each["length"], each["row"], each["document"]): each for each in records if each["answers"]}


def measure_stage(
    stage: Stage, documents: Sequence[Document], load: Load, journal: Journal, on_document: OnDocument | None = None
) -> None:
    """Measure every row on every document unless the journal has it. Raises KeyboardInterrupt after Ctrl-C."""
    with contextlib.ExitStack() as stack:
        llms: dict[str, SwaaLlama] = {}
        for document in documents:
            known = measured(journal.records)
            left = [row for row in stage.rows if place(stage.length, row, document) not in known]
            # An earlier stage asked full attention; it is read again, for its time beside those of this stage.
            if left and left[0] is not FULL:
                left.insert(0, FULL)
            for row in left:
                if row.key not in llms:
                    llms[row.key] = stack.enter_context(contextlib.closing(load(row.swaa, stage.length)))
                asked = place(stage.length, row, document) not in known
                with interruptible(llms[row.key]):
                    record = _read(llms[row.key], row, document, asked)
                record |= {"length": stage.length, "row": row.key, "document": document.name}
                journal.add(record)
                if on_document:
                    on_document(record)


def _read(llm: SwaaLlama, row: Row, document: Document, asked: bool) -> Record:
    """Seconds of reading the document, and for each tail the figures of every question."""
    from swaa_edge.native import NEVER

    llm.reset()
    started = time.perf_counter()
    llm.eval(document.tokens, decode_from=NEVER)
    seconds = time.perf_counter() - started
    answers = {}
    for tail in row.tails if asked else ():
        answers[str(tail)] = [ask(llm, document, question, tail) for question in document.questions]
    return {"seconds": round(seconds, 3), "answers": answers}


def ask(llm: SwaaLlama, document: Document, question: Question, tail_count: int) -> tuple[float, int]:
    """The loss of the scored tokens in nats, and how many of them the model predicts."""
    losses: list[float] = []
    hits: list[bool] = []

    def score(rows: np.ndarray, tokens: Sequence[int]) -> None:
        losses.extend(nll(rows, tokens))
        hits.extend(rows.argmax(axis=1) == np.asarray(tokens))

    read_answer(llm, document.case(question), score, tail_count)
    return round(float(sum(losses[-question.scored :])), 3), int(sum(hits[-question.scored :]))
