"""Makes documents of real English text with questions, for measure.py.

    documents = build(2048, 20, prompts, texts); documents[0].case(documents[0].questions[0])

passages: the prompt ends with the first tokens of a passage from far back in the document. The passage's next tokens
    are scored.
shuffled: the same with a planted passage of shuffled tokens. The model can predict such a passage only by copying.
facts: the question is about a hidden sentence, and is asked through the chat template. In the response "The secret code
    of fence is 706", only the tokens of 706 are scored.

A prompt consists of the beginning of the chat template, a document and a question. All questions about a document share
the tokens before the question.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swaa_edge.calibrate.cases import Case
from swaa_edge.errors import ConfigError
from swaa_edge.evaluate.facts import WORDS
from swaa_edge.evaluate.haystack import Haystack

if TYPE_CHECKING:
    from swaa_edge.generate.prompts import Prompts

TASKS = ("passages", "shuffled", "facts")
#: Tokens of a passage: first those that the question repeats, then those that are scored.
CUE, SCORED = 24, 40
#: Tokens of a context for a question and its answer.
RESERVED = 96
#: Characters of text per token of a document. Prose needs about four.
CHARACTERS = 6
SEED = 71
_NAMES = (
    "Anna",
    "Bruno",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Henry",
    "Irene",
    "Jacob",
    "Karen",
    "Lucas",
    "Maria",
    "Noah",
    "Olga",
    "Peter",
)
_TOWNS = (
    "Bergen",
    "Dublin",
    "Geneva",
    "Lisbon",
    "Madrid",
    "Naples",
    "Prague",
    "Riga",
    "Seville",
    "Turin",
    "Vienna",
    "Warsaw",
)
_COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "brown", "black", "white", "pink")
_JOBS = ("baker", "teacher", "doctor", "farmer", "nurse", "lawyer", "pilot", "singer", "painter", "butcher")
_DOGS = ("Rufus", "Bella", "Max", "Luna", "Rocky", "Daisy", "Buddy", "Molly")
_NUMBERS = tuple(map(str, range(100, 1000)))
_YEARS = tuple(map(str, range(1700, 1990)))


@dataclass(frozen=True)
class Fact:
    """A kind of fact: a sentence with a name and a value, and the question about the value.

    lead: the sentence up to the value, with {} for the name. The response begins with the same words.
    end: the text after the value.
    question: the question, with {} for the name.
    names: the possible names.
    values: the possible values.
    """

    lead: str
    end: str
    question: str
    names: Sequence[str]
    values: Sequence[str]


#: A document has at most one fact of each kind. With two, the model confuses the names even under full attention.
FACTS = (
    Fact("The secret code of {} is", ".", "What is the secret code of {}?", WORDS, _NUMBERS),
    Fact("The price of the {} is", " dollars.", "What is the price of the {}?", WORDS, _NUMBERS),
    Fact("The favorite color of {} is", ".", "What is the favorite color of {}?", _NAMES, _COLORS),
    Fact("{} works as a", ".", "What does {} work as?", _NAMES, _JOBS),
    Fact("The bridge in {} was built in", ".", "When was the bridge in {} built?", _TOWNS, _YEARS),
    Fact("{} has a dog named", ".", "What is the name of {}'s dog?", _NAMES, _DOGS),
)


@dataclass(frozen=True)
class Question:
    """A question about a document.

    tail: the tokens of the prompt after the document.
    answer: the tokens of the correct response.
    scored: number of tokens at the end of the answer that are scored.
    """

    task: str
    tail: tuple[int, ...]
    answer: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Document:
    """A document with its questions.

    tokens: the beginning of the chat template, and then the document. All prompts begin with these tokens.
    """

    name: str
    tokens: tuple[int, ...]
    questions: tuple[Question, ...]

    def case(self, question: Question) -> Case:
        return Case(self.name, (*self.tokens, *question.tail), question.answer)


def build(
    length: int, count: int, prompts: Prompts, texts: Mapping[str, str], asked: int = 5, part: int = 0
) -> list[Document]:
    """Make `count` documents for contexts of `length` tokens, from `texts` in turn. Documents don't share any text.

    asked: number of passages, and of shuffled passages, per document. A document has `asked` + 1 facts, but no more
        than one of each kind.
    part: number of document-sized parts to skip at the start of each text.

    At least an eighth of the context lies between the text that a question is about and the end of the document.
    """
    documents = []
    for number, name in zip(range(count), itertools.cycle(texts), strict=False):
        start = (part + number // len(texts)) * length * CHARACTERS
        text = texts[name][start : start + length * CHARACTERS]
        documents.append(_document(f"{name}/{length}/{part}/{number}", text, length, prompts, asked))
    return documents


def digest(documents: Sequence[Document]) -> str:
    """Return a sha256 of all tokens of the documents and questions."""
    return hashlib.sha256(repr(documents).encode()).hexdigest()


def _document(name: str, text: str, length: int, prompts: Prompts, asked: int) -> Document:
    rng = random.Random(f"{SEED}/{name}")
    hay = Haystack(text, prompts.tokenize)
    facts = [_fact(rng, kind, prompts) for kind in rng.sample(FACTS, min(asked + 1, len(FACTS)))]
    shuffled = [_shuffled(rng, hay) for _ in range(asked)]
    pieces = [*shuffled, *(piece for piece, _ in facts)]
    head = prompts.ask([], "")[: prompts.around("")[0]]
    body, passages = _planted(rng, hay, length - len(head) - RESERVED, pieces, asked, beyond=length // 8)
    questions = [_passage("passages", tokens) for tokens in passages]
    questions += [_passage("shuffled", tokens) for tokens in shuffled]
    questions += [question for _, question in facts]
    assert all(len(question.tail) + len(question.answer) <= RESERVED for question in questions)
    return Document(name, (*head, *body), tuple(questions))


def _passage(task: str, tokens: Sequence[int]) -> Question:
    return Question(task, tuple(tokens[:CUE]), tuple(tokens[CUE:]), SCORED)


def _shuffled(rng: random.Random, hay: Haystack) -> list[int]:
    tokens = [token for sentence in hay.prose(rng, CUE + SCORED) for token in sentence]
    rng.shuffle(tokens)
    return tokens


def _fact(rng: random.Random, kind: Fact, prompts: Prompts) -> tuple[list[int], Question]:
    """Return the tokens of a sentence to hide, and the question about the sentence."""
    name, value = rng.choice(kind.names), rng.choice(kind.values)
    lead, scored = prompts.tokenize(kind.lead.format(name)), prompts.tokenize(f" {value}")
    question = kind.question.format(name)
    prompt = prompts.ask([], question)
    tail = tuple(prompt[prompts.around(question)[0] :])
    piece = prompts.tokenize(f" {kind.lead.format(name)} {value}{kind.end}")
    return piece, Question("facts", tail, (*lead, *scored), len(scored))


def _planted(
    rng: random.Random, hay: Haystack, count: int, pieces: Sequence[Sequence[int]], passages: int, beyond: int
) -> tuple[list[int], list[list[int]]]:
    """Return a document of `count` tokens with `pieces` between the sentences, and passages of the document's prose.

    Pieces and passages don't overlap. At least `beyond` tokens follow each piece and each passage.
    """
    sentences = hay.prose(rng, count - sum(map(len, pieces)))
    starts = [0, *itertools.accumulate(map(len, sentences))]
    flat = [token for sentence in sentences for token in sentence]
    size = CUE + SCORED
    allowed = [at for at, start in enumerate(starts) if start + size <= len(flat) - beyond]
    inside: set[int] = set()
    taken: list[int] = []
    for at in rng.sample(allowed, len(allowed)):
        if len(taken) < passages and all(abs(starts[at] - other) >= size for other in taken):
            taken.append(starts[at])
            inside |= {seam for seam in allowed if starts[at] < starts[seam] < starts[at] + size}
    seams = [at for at in allowed if at not in inside]
    if len(taken) < passages or len(seams) < len(pieces):
        raise ConfigError(f"a text with {len(sentences)} sentences has no room for {passages} passages")
    planted = dict(zip(rng.sample(seams, len(pieces)), pieces, strict=True))
    body = [token for at, sentence in enumerate(sentences) for token in (*planted.get(at, ()), *sentence)]
    return body, [flat[start : start + size] for start in taken]
