"""The built-in retrieval tasks: prompts of an exact length with hidden facts.

    samples = build(TaskSettings(tasks=("needle", "kv"), lengths=(4096,), samples=50), prompts)

- needle hides one fact in prose.
- multi-needle hides several facts and asks for two of them.
- kv hides a JSON object and asks for one value.
- chain hides a series of facts and asks for the number at the end. Each fact names the next fact.

The task needle follows the needle-in-a-haystack test. The tasks multi-needle and chain follow RULER (arXiv 2404.06654),
and kv follows "Lost in the Middle" (arXiv 2307.03172).
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from swaa_edge.errors import ConfigError
from swaa_edge.evaluate import facts
from swaa_edge.evaluate.facts import STYLES, WORDS, Question, Style
from swaa_edge.evaluate.haystack import Haystack
from swaa_edge.evaluate.samples import Sample
from swaa_edge.support.sample_text import real_text

if TYPE_CHECKING:
    from swaa_edge.generate.prompts import Prompts


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """Settings for the questions to build.

    lengths: prompt lengths in tokens, including the chat template.
    samples: number of questions per task and length, spread over depths and styles. Each document gets one question
        per style. These questions are adjacent, so that the engine can reuse the document's prefix.
    depths: positions of the needle, from 0 (start of the document) to 1 (end). Documents use the depths in turn.
        In other tasks, or without depths, positions are random.
    beyond: minimum distance in tokens from each fact to the end of the prompt. A window of this size or smaller then
        hides the facts from the last token. A needle too near to the end moves towards the start.
    needles: number of facts in a multi-needle document.
    pairs: number of pairs in a kv document.
    hops: number of facts in a chain.
    haystack: the text of the prose (default: `sample_text.real_text`).

    Raises `ConfigError` if a value is invalid. The message contains the field, the value and the limit.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int = 50
    seed: int = 0
    depths: tuple[float, ...] | None = None
    styles: tuple[Style, ...] = STYLES
    beyond: int = 0
    needles: int = 4
    pairs: int = 64
    hops: int = 2
    haystack: str | None = None

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError(f"there is no task {task}; there are {', '.join(TASKS)}, or give a .jsonl file")
        for name in ("tasks", "lengths", "styles"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give at least one")
        for style in self.styles:
            if style not in STYLES:
                raise ConfigError(f"there is no style {style}; there are {', '.join(STYLES)}")
        if self.beyond < 0:
            raise ConfigError(f"beyond = {self.beyond} must be at least 0")
        limits = {"samples": (1, 10**6), "needles": (2, len(WORDS)), "pairs": (1, len(WORDS)), "hops": (1, 32)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name} = {getattr(self, name)} must be from {least} to {most}")
        for depth in self.depths or ():
            if not 0 <= depth <= 1:
                raise ConfigError(f"depth {depth} must be from 0 (the document's start) to 1 (its end)")


@dataclasses.dataclass(frozen=True)
class _Case:
    """The contents of one document.

    pieces: the texts to hide. The pieces that the question is about come first.
    asked: number of pieces that the question is about.
    ask: function that returns the question in a given style.
    together: hide all pieces at the same place.
    behind: the end of the piece that the question is about, after the answer.
    """

    pieces: list[str]
    asked: int
    ask: Callable[[Style], Question]
    together: bool = False
    behind: str = ""


def build(settings: TaskSettings, prompts: Prompts) -> list[Sample]:
    """Return the samples in the order to run. Raises `ConfigError` if a prompt length is too small."""
    hay = Haystack(settings.haystack or real_text(), prompts.tokenize)
    samples: list[Sample] = []
    for task in settings.tasks:
        for length in settings.lengths:
            made: list[Sample] = []
            for number in range(-(-settings.samples // len(settings.styles))):
                made += _document(settings, task, length, number, hay, prompts)
            samples += made[: settings.samples]
    return samples


def _document(
    settings: TaskSettings, task: str, length: int, number: int, hay: Haystack, prompts: Prompts
) -> list[Sample]:
    """Build one document, and return one sample per style."""
    name = f"{task}/{length}/{number}"
    rng = random.Random(f"{settings.seed}/{name}")
    case = TASKS[task](rng, settings)
    questions = {style: case.ask(style) for style in settings.styles}
    sides = {style: prompts.around(question.text) for style, question in questions.items()}
    around = {style: sum(tokens) for style, tokens in sides.items()}
    hidden = [prompts.tokenize(text) for text in case.pieces]
    room = length - max(around.values()) - sum(map(len, hidden))
    if room < 0:
        raise ConfigError(f"{task} doesn't fit into a prompt of {length} tokens; give at least {length - room}")
    # Maximum number of prose tokens before the pieces in question. At least `beyond` tokens must follow.
    most = length - max(head for head, _ in sides.values()) - sum(map(len, hidden)) - settings.beyond
    most += max(0, len(prompts.tokenize(case.behind)) - 1) if case.behind else 0
    if most < 0:
        raise ConfigError(
            f"beyond = {settings.beyond} must be at most {settings.beyond + most} in {task} prompts of {length} tokens"
            "; lower it, or use longer prompts"
        )
    # Upper limit of random places. The template's tokens before the document count as tokens after the document.
    high = max(0, room - max(0, settings.beyond - min(around.values())))
    depth = settings.depths[number % len(settings.depths)] if settings.depths and task == "needle" else None
    places = _places(rng, case, len(hidden), depth, room, high, most)
    if depth is not None and places[0] < depth * room:
        depth = round(places[0] / room, 2)  # the heat map needs the actual depth
    pieces = list(zip(places, hidden, strict=True))
    seed = rng.random()
    samples = []
    for style, question in questions.items():
        # With the same seed, the documents of all styles differ only at the end.
        document = hay.bury(random.Random(seed), length - around[style], pieces)
        prompt, expected = prompts.ask(document, question.text), (question.answers, question.text, question.response)
        samples.append(Sample(f"{name}/{style}", task, prompt, *expected, length, depth, style))
    return samples


def _places(
    rng: random.Random, case: _Case, count: int, depth: float | None, room: int, high: int, most: int
) -> list[float]:
    """Return the places of `count` pieces among `room` prose tokens. `most` limits the first `case.asked` places."""
    if depth is None:
        depths = [rng.random() * high / max(room, 1) for _ in range(case.asked)]
    else:
        depths = [min(depth, high / max(room, 1))] * case.asked
    if case.together:
        depths = [depths[0]] * count
    depths += [rng.random() for _ in range(count - len(depths))]
    return [min(part * room, most) if at < case.asked else part * room for at, part in enumerate(depths)]


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10, 100))


def _needle(rng: random.Random, settings: TaskSettings) -> _Case:
    name, code = rng.choice(WORDS), _number(rng)
    return _Case([facts.code_fact(name, code)], 1, lambda style: facts.ask_codes({name: code}, style))


def _multi_needle(rng: random.Random, settings: TaskSettings) -> _Case:
    codes = {name: _number(rng) for name in rng.sample(WORDS, settings.needles)}
    asked = dict(list(codes.items())[:2])
    return _Case([facts.code_fact(*item) for item in codes.items()], 2, lambda style: facts.ask_codes(asked, style))


def _chain(rng: random.Random, settings: TaskSettings) -> _Case:
    """Build the chain that the question is about, and a second chain as a distractor."""
    names = rng.sample(WORDS, 2 * settings.hops)
    asked, other = ([*part, _number(rng)] for part in (names[: settings.hops], names[settings.hops :]))
    pieces = [facts.code_fact(*link) for links in (asked, other) for link in itertools.pairwise(links)]
    return _Case(pieces, settings.hops, lambda style: facts.ask_chain(asked, style))


def _kv(rng: random.Random, settings: TaskSettings) -> _Case:
    pairs = {key: _number(rng) for key in rng.sample(WORDS, settings.pairs)}
    key = rng.choice(list(pairs))
    pieces = facts.json_pairs(pairs)
    behind = "".join(pieces[list(pairs).index(key) + 1 :])
    return _Case(
        ["".join(pieces)], 1, lambda style: facts.ask_value(key, pairs[key], style), together=True, behind=behind
    )


#: Functions that build the contents of a document, by task.
TASKS: dict[str, Callable[[random.Random, TaskSettings], _Case]] = {
    "needle": _needle,
    "multi-needle": _multi_needle,
    "kv": _kv,
    "chain": _chain,
}
