"""The built-in retrieval tasks: prompts of an exact length, made of real prose and hidden facts, from a seed.

    samples = build(Plan(tasks=("needle", "kv"), lengths=(4096,), samples=50), prompts)

needle: one fact in prose. multi-needle: several, of which two are asked for. kv: a JSON object in prose, one key is
asked for. chain: facts that name each other, to be followed to a number. The idea of each is known from the
literature: needle in a haystack; RULER (arXiv 2404.06654) for several needles and variable tracking; "Lost in the
Middle" (arXiv 2307.03172) for JSON pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

from swaa_edge.errors import ConfigError
from swaa_edge.evaluate import facts
from swaa_edge.evaluate.facts import STYLES, WORDS, Question, Style
from swaa_edge.evaluate.haystack import Haystack
from swaa_edge.evaluate.prompts import Prompts
from swaa_edge.evaluate.samples import Sample
from swaa_edge.support.sample_text import real_text


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to ask; lengths in tokens, of whole prompts.

    samples: per task and length, spread over depths and styles. A document is asked about once in each style, one
    after the other, so that an engine can reuse its prefix. depths: where a needle stands, in turns, 0 is the start;
    None, and in other tasks: anywhere. beyond: at least so many tokens follow what is asked for, so that no window up
    to that size shows it to the prompt's last token; needles wanted deeper stand as deep as that lets them.
    needles: in a multi-needle document, of which two are asked for. pairs: in a kv document. hops: of a chain, up to
    its number. haystack: the prose; None: `prose.real_text`.
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
    """What one document holds. pieces: the texts to hide, in order; those before `asked` may stand anywhere.

    asked: how many of the pieces, from the first, the questions are about. ask: the question in a style.
    together: all pieces stand side by side. behind: what of the asked piece follows what is asked for.
    """

    pieces: list[str]
    asked: int
    ask: Callable[[Style], Question]
    together: bool = False
    behind: str = ""


def build(plan: Plan, prompts: Prompts) -> list[Sample]:
    """The samples of a plan, in the order in which they should run. Raises `ConfigError` if a prompt is too short."""
    hay = Haystack(plan.haystack or real_text(), prompts.tokenize)
    samples: list[Sample] = []
    for task in plan.tasks:
        for length in plan.lengths:
            for number in range(-(-plan.samples // len(plan.styles))):
                samples += _document(plan, task, length, number, hay, prompts)
            del samples[len(samples) - _excess(plan) :]
    return samples


def _excess(plan: Plan) -> int:
    return -plan.samples % len(plan.styles)


def _document(plan: Plan, task: str, length: int, number: int, hay: Haystack, prompts: Prompts) -> list[Sample]:
    """One document, asked about in each style."""
    name = f"{task}/{length}/{number}"
    rng = random.Random(f"{plan.seed}/{name}")
    case = TASKS[task](rng, plan)
    questions = {style: case.ask(style) for style in plan.styles}
    sides = {style: prompts.around(question.text) for style, question in questions.items()}
    around = {style: sum(tokens) for style, tokens in sides.items()}
    hidden = [prompts.tokenize(text) for text in case.pieces]
    room = length - max(around.values()) - sum(map(len, hidden))
    if room < 0:
        least = length - room
        raise ConfigError(f"{task} doesn't fit into a prompt of {length} tokens; it takes at least {least}")
    # How much prose may stand before what is asked for, so that `beyond` tokens follow it.
    most = length - max(head for head, _ in sides.values()) - sum(map(len, hidden)) - plan.beyond
    most += max(0, len(prompts.tokenize(case.behind)) - 1) if case.behind else 0
    if most < 0:
        raise ConfigError(
            f"beyond = {plan.beyond}: in {task} prompts of {length} tokens, what is asked for stands at most "
            f"{plan.beyond + most} tokens before the end; lower it to that, or ask for longer prompts"
        )
    # Random places are drawn below `high`, which takes what the template puts before the document for following it.
    high = max(0, room - max(0, plan.beyond - min(around.values())))
    depth = plan.depths[number % len(plan.depths)] if plan.depths and task == "needle" else None
    if depth is None:
        depths = [rng.random() * high / max(room, 1) for _ in hidden[: case.asked]]
    else:
        depths = [min(depth, high / max(room, 1))] * case.asked
    if case.together:
        depths = [depths[0]] * len(hidden)
    depths += [rng.random() for _ in hidden[len(depths) :]]
    places = [min(share * room, most) if at < case.asked else share * room for at, share in enumerate(depths)]
    if depth is not None and places[0] < depth * room:
        depth = round(places[0] / room, 2)  # not where it was wanted, so that no row of a heat map tells a lie
    pieces = list(zip(places, hidden, strict=True))
    seed = rng.random()
    made = []
    for style, question in questions.items():
        # Equal seeds: what the styles have of different length is the document's end only.
        document = hay.bury(random.Random(seed), length - around[style], pieces)
        prompt = prompts.ask(document, question.text)
        made.append(
            Sample(
                f"{name}/{style}",
                task,
                prompt,
                question.answers,
                question.text,
                question.reply,
                length,
                depth,
                style,
            )
        )
    return made


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10, 100))


def _needle(rng: random.Random, plan: Plan) -> _Case:
    name, code = rng.choice(WORDS), _number(rng)
    return _Case([facts.code_fact(name, code)], 1, lambda style: facts.ask_codes({name: code}, style))


def _multi_needle(rng: random.Random, plan: Plan) -> _Case:
    codes = {name: _number(rng) for name in rng.sample(WORDS, plan.needles)}
    asked = dict(list(codes.items())[:2])
    return _Case([facts.code_fact(*item) for item in codes.items()], 2, lambda style: facts.ask_codes(asked, style))


def _chain(rng: random.Random, plan: Plan) -> _Case:
    """The chain that is asked for and another one, so that the only number isn't the answer."""
    names = rng.sample(WORDS, 2 * plan.hops)
    asked, other = ([*part, _number(rng)] for part in (names[: plan.hops], names[plan.hops :]))
    pieces = [facts.code_fact(*link) for links in (asked, other) for link in itertools.pairwise(links)]
    return _Case(pieces, plan.hops, lambda style: facts.ask_chain(asked, style))


def _kv(rng: random.Random, plan: Plan) -> _Case:
    pairs = {key: _number(rng) for key in rng.sample(WORDS, plan.pairs)}
    key = rng.choice(list(pairs))
    pieces = facts.json_pairs(pairs)
    behind = "".join(pieces[list(pairs).index(key) + 1 :])
    return _Case(
        ["".join(pieces)], 1, lambda style: facts.ask_value(key, pairs[key], style), together=True, behind=behind
    )


#: By name: what makes the contents of one document.
TASKS: dict[str, Callable[[random.Random, Plan], _Case]] = {
    "needle": _needle,
    "multi-needle": _multi_needle,
    "kv": _kv,
    "chain": _chain,
}
