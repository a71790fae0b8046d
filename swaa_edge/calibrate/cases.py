"""The samples of a calibration: prompts and their reference answers, in tokens.

with Prompts("model.gguf") as prompts: cases = from_samples(build(tasks, prompts), prompts)
cases, held_out = from_text(tokens, head=[1], length=4096, answer=64, count=8)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swaa_edge.errors import ConfigError

if TYPE_CHECKING:
    from swaa_edge.evaluate.samples import Sample
    from swaa_edge.generate.prompts import Prompts


@dataclasses.dataclass(frozen=True)
class Case:
    """A sample to measure.

    id: name that is unique within a run, and the same in every run.
    prompt: tokens of the prompt.
    answer: tokens of the reference answer.
    """

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("prompt", "answer"):
            if not getattr(self, name):
                raise ConfigError(f"the {name} of {self.id} is empty; give it at least one token")

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def from_samples(samples: Sequence[Sample], prompts: Prompts) -> list[Case]:
    """Convert samples to cases. Raises `ConfigError` for a sample without an ideal response."""
    cases = []
    for sample in samples:
        response = sample.response
        if response is None and sample.answers:
            response = " " + sample.answers[0]
        if not response:
            raise ConfigError(f"{sample.id} has no ideal response to measure the loss on; give each sample one")
        cases.append(Case(sample.id, tuple(sample.prompt), tuple(prompts.tokenize(response))))
    return cases


def from_text(
    tokens: Sequence[int], *, head: Sequence[int] = (), length: int, answer: int, count: int, held_out: bool = False
) -> tuple[list[Case], list[Case]]:
    """Cut a text into windows. Return cases, and with held_out the same number of held-out cases.

    The windows are spread over the text. Each held-out case follows one of the other cases.

    head: start tokens of every window.
    length: number of tokens in a window, including `head`.
    answer: number of tokens at the end of a window that are the reference answer.
    count: maximum number of cases.

    Raises `ConfigError` if the text is too short for one window (two with held_out). Also raises `ConfigError` if
    `answer` is less than 1 or leaves no text for the prompt.
    """
    if not 1 <= answer < length - len(head):
        raise ConfigError(f"answer_tokens = {answer} must be from 1 to {length - len(head) - 1} in windows of {length}")
    size, parts = length - len(head), 2 if held_out else 1
    windows = len(tokens) // size
    if windows < parts:
        raise ConfigError(
            f"the text has {len(tokens)} tokens, too few for {parts} window{'s' * (parts > 1)} of {length}; "
            "give a longer text or shorter windows"
        )
    chosen = min(windows, count * parts)
    chosen -= chosen % parts
    starts = [size * (number * windows // chosen) for number in range(chosen)]
    cases = []
    for start in starts:
        middle, end = start + size - answer, start + size
        cases.append(Case(f"text/{start}", (*head, *tokens[start:middle]), tuple(tokens[middle:end])))
    return cases[::parts], cases[1::2] if held_out else []
