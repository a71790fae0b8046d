"""One question to a model, and what its answer must hold; every task and data file is turned into these.

Sample("needle/2048/7", "needle", prompt=tokens, answers=("47",))
"""

from __future__ import annotations

import dataclasses
from array import array

from swaa_edge.evaluate.facts import Style


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """id: unique in a run, and the same in the next one. task: a task's name, or that of the data file.

    prompt: all tokens the model reads, chat template included. answers: what is looked for in its answer.
    question: for a judge, and people. reply: an ideal answer, where the task knows one.
    length: of the prompt, as asked for; None where the data decides. depth: where a needle of a grid of depths stands
    in the document, from 0 to 1. style: how a built question wants its answer.
    """

    id: str
    task: str
    prompt: array[int]
    answers: tuple[str, ...]
    question: str = ""
    reply: str | None = None
    length: int | None = None
    depth: float | None = None
    style: Style | None = None
