"""A sample is one question with its reference answers. All tasks and data files produce samples.

Sample("needle/2048/7", "needle", prompt=tokens, answers=("47",))
"""

from __future__ import annotations

import dataclasses
from array import array

from swaa_edge.evaluate.facts import Style


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A prompt and its reference answers.

    id: unique name, the same in every run.
    task: name of the task or of the data file.
    prompt: all tokens of the prompt, chat template included.
    answers: the reference answers.
    question: the question without the document.
    response: an ideal response, if the task has one.
    length: requested length of the prompt in tokens (None for data files).
    depth: position of a needle in the document, from 0 to 1 (None for other tasks).
    style: requested style of the answer (None for data files).
    source: file and position of the record, such as "questions.jsonl:3" (empty for built-in tasks).
    document: the record's field "prompt" (empty for built-in tasks).
    name: the record's field "id" (empty for built-in tasks).
    """

    id: str
    task: str
    prompt: array[int]
    answers: tuple[str, ...]
    question: str = ""
    response: str | None = None
    length: int | None = None
    depth: float | None = None
    style: Style | None = None
    source: str = ""
    document: str = ""
    name: str = ""
