"""Makes the demo model's training sequences: a document with facts in prose, then questions with answers.

    tokens, weights, tags = Data(tokenizer, text, seed=1).batch(2048, 4, Mix(copy=0.03, hops=0.03, again=0.12))

`swaa_edge.evaluate.facts` makes the facts, questions and answers, as for `eval`. The tasks are also the same: needle,
multi (several needles), chain and kv. Training and `eval` have unrelated samples, even with the same seed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence

import torch

from demo.tokenizer import ASSISTANT, BOS, END, USER
from swaa_edge.evaluate import facts
from swaa_edge.evaluate.haystack import Haystack

#: Categories of predictions in the log: repeated values, derived values, and answers by task and style.
ASKED = [f"{task}/{style}" for task in ("needle", "multi", "chain", "kv") for style in facts.STYLES]
TAGS = ["recital", "derived", *ASKED]
#: Loss weight of a prose token. A token of an answer has weight 1.
PROSE_WEIGHT = 0.05

Ask = tuple[str, Callable[[facts.Style], facts.Question]]
Piece = tuple[float, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Mix:
    """Probabilities of the kinds of sequences.

    copy: probability of a sequence that only repeats names and numbers.
    hops: probability of a sequence of linked facts without prose.
    again: probability that a document repeats its facts. Such a document has a value to learn every few tokens.
    """

    copy: float
    hops: float
    again: float


class Row:
    """The tokens of one training sequence, with the loss weight and the tag of each token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.weights: list[float] = []
        self.tags: list[int] = []

    def add(self, tokens: Sequence[int], weight: float | Sequence[float] = 0.0, tag: int | Sequence[int] = 0) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens) if isinstance(weight, float) else weight
        self.tags += [tag] * len(tokens) if isinstance(tag, int) else tag

    def extend(self, other: Row) -> None:
        self.add(other.tokens, other.weights, other.tags)

    def cut(self, length: int) -> Row:
        self.tokens, self.weights, self.tags = self.tokens[:length], self.weights[:length], self.tags[:length]
        return self


class Data:
    """Generates training sequences from a seed. The random generator `rng` is the only state."""

    def __init__(self, tokenizer, text: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.encode = functools.cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self.hay = Haystack(text, lambda part: list(self.encode(part)))
        self.special = {name: tokenizer.convert_tokens_to_ids(name) for name in (BOS, USER, ASSISTANT, END)}
        self.numbers = {self.encode(f" {number}")[0] for number in range(10, 100)}
        self.names = {self.encode(f" {word}")[0] for word in facts.WORDS}
        #: {(name, final number): facts that determine the number}.
        self._derived: dict[tuple[int, int], set[tuple[int, int]]] = {}
        # Tokens before a value, in a fact and in a JSON object.
        self._before = {self.encode(" is")[0], self.encode('{"fox": 4')[2]}

    def batch(self, length: int, count: int, mix: Mix) -> tuple[torch.Tensor, ...]:
        """Return `count` sequences of `length` tokens as three tensors [count, length]: tokens, weights and tags."""
        rows = [self.sequence(length, mix) for _ in range(count)]
        return tuple(torch.tensor([getattr(row, name) for row in rows]) for name in ("tokens", "weights", "tags"))

    def sequence(self, length: int, mix: Mix) -> Row:
        """Return one sequence of a random kind. Most documents that repeat their facts have no questions."""
        rng = self.rng
        drawn = rng.random()
        if drawn < mix.copy:
            return self._copying(length)
        if drawn < mix.copy + mix.hops:
            return self._hops(length)
        again = rng.random() < mix.again
        kind = rng.choices(("codes", "json", "prose"), (0.62, 0.33, 0.05))[0]
        recite = again and rng.random() < 0.6
        fraction = 0.9 if recite else 0.5
        self._derived = {}
        write = {"codes": self._codes, "json": self._json, "prose": lambda *_: ([], [])}[kind]
        pieces, asks = write(length, again, fraction)
        rounds = self._rounds([] if recite else asks, length // 4 if again else length // 2)
        room = length - 2 - len(rounds.tokens)
        free = room - sum(len(tokens) for _, tokens in pieces)
        document = self.hay.bury(rng, room, [(depth * free, tokens) for depth, tokens in pieces])
        row = self._begun()
        row.add(document, *self._document_weights(document, kind))
        row.extend(rounds)
        return row

    def _begun(self) -> Row:
        row = Row()
        row.add([self.special[BOS], self.special[USER]])
        return row

    def _rounds(self, asks: Sequence[Ask], limit: int) -> Row:
        """Return questions and answers that follow a document.

        The first question is always added. Further questions must fit into `limit` tokens.
        """
        rng, rounds = self.rng, Row()
        asked: set[str] = set()
        while asks:
            task, make = asks[rng.randrange(len(asks))]
            # Direct answers are harder to learn.
            style = rng.choices(facts.STYLES, (3, 1))[0]
            question, turn = make(style), Row()
            # The first question belongs to the turn of the document.
            start = [] if not asked else [self.special[USER]]
            text = question.text if asked else f"\n\n{question.text}"
            turn.add([*start, *self.encode(text), self.special[END], self.special[ASSISTANT]])
            turn.add([*self.encode(question.response), self.special[END]], 1.0, TAGS.index(f"{task}/{style}"))
            if asked and len(rounds.tokens) + len(turn.tokens) > limit:
                break
            asked.add(question.text)
            rounds.extend(turn)
            if len(rounds.tokens) > 700 or rng.random() < 0.25 / len(asked):
                break
        return rounds

    def _copying(self, length: int) -> Row:
        """Return a sequence that repeats pairs of name and number. Half of the sequences change the order each time."""
        rng, row = self.rng, self._begun()
        names, numbers = sorted(self.names), sorted(self.numbers)
        chosen = rng.sample(names, min(len(names), rng.randint(3, length // 5)))
        pairs = [(name, rng.choice(numbers)) for name in chosen]
        mixed = rng.random() < 0.5
        known = 0.0
        while len(row.tokens) < length:
            if mixed:
                rng.shuffle(pairs)
            for name, number in pairs:
                row.add([name], 0.0 if mixed else known)
                row.add([number], known)
            known = 1.0
        return row.cut(length)

    def _hops(self, length: int) -> Row:
        """Return a sequence that gives each name a code and then states each name's code or final number.

        For half of the names, the code and the final number are the same number. For the other names, the code is a
        name from the first half. The code of that name is then the final number. Each statement has four tokens.
        """
        rng, row = self.rng, self._begun()
        code, number, is_ = (self.encode(text)[0] for text in (" code", " number", " is"))
        names = rng.sample(sorted(self.names), min(len(self.names), max(2, length // 8)))
        half = len(names) // 2
        codes = dict(zip(names[:half], names[half:], strict=False))
        codes |= {name: rng.choice(sorted(self.numbers)) for name in names[half:]}
        for name in rng.sample(names, len(names)):
            row.add([code, name, is_, codes[name]])
        for name in rng.sample(names, len(names)):
            found, again = codes[name], rng.random() < 0.25
            derived = not again and found in codes
            row.add([code if again else number, name, is_])
            row.add([codes[found] if derived else found], 1.0, TAGS.index("derived" if derived else "recital"))
        row.add([self.special[END]] * max(0, length - len(row.tokens)))
        return row.cut(length)

    def _document_weights(self, document: Sequence[int], kind: str) -> tuple[list[float], list[int]]:
        """Return loss weights and tags. A value has weight 1 only if earlier facts determine the value."""
        weights, tags = [PROSE_WEIGHT] * len(document), [0] * len(document)
        seen: set[tuple[int, int]] = set()
        for place in range(2, len(document)):
            name, before, token = document[place - 2 : place + 1]
            if token not in self.numbers and token not in self.names:
                continue
            if before in self._before:
                pair = (name, token)
                follows = pair in self._derived and self._derived[pair] <= seen
                weights[place] = 1.0 if pair in seen or follows else 0.0
                tags[place] = TAGS.index("derived") if pair not in seen and follows else 0
                seen.add(pair)
            elif kind != "prose":
                weights[place] = 0.0
        return weights, tags

    def _amount(self, most: int) -> int:
        """Return a random number from 1 to `most`, uniform on a logarithmic scale."""
        return max(1, round(math.exp(self.rng.uniform(0, math.log(max(most, 1) + 0.5)))))

    def _place(self, pieces: Sequence[Sequence[int]]) -> list[Piece]:
        """Return each piece with a random depth. The depths may be limited to one part of the document."""
        low = self.rng.random() * 0.9 if self.rng.random() < 0.3 else 0.0
        high = 1.0 if low == 0 else min(1.0, low + self.rng.uniform(0.02, 0.5))
        return [(self.rng.uniform(low, high), piece) for piece in pieces]

    def _codes(self, length: int, again: bool, fraction: float) -> tuple[list[Piece], list[Ask]]:
        """Return facts of seven tokens each, and questions about the facts. Some facts may form chains."""
        rng = self.rng
        times = rng.choice((2, 3)) if again else 1
        derive = again and rng.random() < 0.6
        most = max(2, min(120, length // 20))
        each = 18 if derive else 7 * times
        count = max(2, int(length * fraction / each)) if again else self._amount(most)
        names = rng.sample(facts.WORDS, min(count, 200))
        codes = {name: str(rng.randrange(10, 100)) for name in names}
        chains = self._chains(codes, derive) if count >= 2 and (derive or rng.random() < 0.75) else []
        plain = [name for name in names if codes[name].isdigit()]
        pieces = [list(self.encode(facts.code_fact(*item))) for item in codes.items()]
        if derive:
            placed = self._with_numbers(codes, pieces)
        else:
            pieces *= times
            rng.shuffle(pieces)
            placed = self._place(pieces)

        def codes_of(count: int) -> Callable[[facts.Style], facts.Question]:
            return lambda style: facts.ask_codes({name: codes[name] for name in rng.sample(plain, count)}, style)

        asks: list[Ask] = [("needle", codes_of(1))] * 2
        asks += [("multi", codes_of(2))] * 2 if len(plain) > 1 else []
        asks += [("multi", codes_of(3))] if len(plain) > 2 else []
        asks += [("chain", lambda style: facts.ask_chain(rng.choice(chains), style))] * 4 if chains else []
        return placed, asks

    def _with_numbers(self, codes: dict[str, str], pieces: Sequence[Sequence[int]]) -> list[Piece]:
        """Place the facts in the first half of a document, and the final number of each name in the second half.

        Every few tokens, the second half then has a value that follows from several facts.
        """
        rng, one = self.rng, lambda text: self.encode(f" {text}")[0]
        placed: list[Piece] = [(rng.uniform(0, 0.5), piece) for piece in pieces]
        for name in codes:
            links = [name]
            while links[-1] in codes:
                links.append(codes[links[-1]])
            needed = {(one(a), one(b)) for a, b in itertools.pairwise(links)}
            self._derived[one(name), one(links[-1])] = needed
            placed.append((rng.uniform(0.5, 1), list(self.encode(facts.number_fact(name, links[-1])))))
        return placed

    def _chains(self, codes: dict[str, str], many: bool) -> list[list[str]]:
        """Replace some codes by names that have codes. Return the resulting chains, from first name to number."""
        rng, spare, chains = self.rng, list(codes), []
        rng.shuffle(spare)
        quarter = max(1, len(codes) // 4)
        for _ in range(rng.randint(quarter, 2 * quarter) if many else rng.randint(1, quarter)):
            links = spare[: rng.choice((2, 2, 2, 3))]
            del spare[: len(links)]
            if len(links) < 2:
                break
            for name, target in itertools.pairwise(links):
                codes[name] = target
            chains.append([*links, codes[links[-1]]])
        return chains

    def _json(self, length: int, again: bool, fraction: float) -> tuple[list[Piece], list[Ask]]:
        """Return a JSON object with five tokens per pair, and questions. `again` adds a reordered copy."""
        rng = self.rng
        count = max(2, min(256, int(length * fraction / 11) if again else self._amount(length // 14)))
        keys = rng.sample(facts.WORDS, count)
        pairs = {key: str(rng.randrange(10, 100)) for key in keys}

        def pairs_in_any_order() -> list[int]:
            order = list(pairs)
            rng.shuffle(order)
            parts = facts.json_pairs({key: pairs[key] for key in order})
            return [token for part in parts for token in self.encode(part)]

        def ask(style: facts.Style) -> facts.Question:
            key = rng.choice(keys)
            return facts.ask_value(key, pairs[key], style)

        return [(rng.random(), pairs_in_any_order()) for _ in range(2 if again else 1)], [("kv", ask)]
