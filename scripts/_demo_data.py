"""What the demo model learns from: documents with facts in prose, then questions about them and the right answers.

    tokens, weights, tags = Data(tokenizer, text, seed=1).batch(2048, 4, copy=0.03, warm=0.12)

The texts of facts, questions and answers are those of `swaa_edge.evaluate.facts`, which `eval` asks too, and so are
the tasks: needle, multi (several needles), chain and kv. What a seed makes here and there has nothing in common.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence

import torch
from _demo_tokenizer import ASSISTANT, BOS, END, USER

from swaa_edge.evaluate import facts
from swaa_edge.evaluate.haystack import Haystack

#: What a token's prediction belongs to, for the log: 0 is a value told again in a document.
TAGS = ["recital", *(f"{task}/{style}" for task in ("needle", "multi", "chain", "kv") for style in facts.STYLES)]
#: Of the loss, for each token of prose; an answer's token has 1.
PROSE_WEIGHT = 0.05

Ask = tuple[str, Callable[[facts.Style], facts.Question]]
Piece = tuple[float, Sequence[int]]


class Row:
    """Tokens of one training sequence, each with the weight of its loss and its tag."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.weights: list[float] = []
        self.tags: list[int] = []

    def add(self, tokens: Sequence[int], weight: float | Sequence[float] = 0.0, tag: int = 0) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens) if isinstance(weight, float) else weight
        self.tags += [tag] * len(tokens)

    def extend(self, other: Row) -> None:
        self.tokens += other.tokens
        self.weights += other.weights
        self.tags += other.tags


class Data:
    """Training sequences from a seed; `rng` is all the state there is."""

    def __init__(self, tokenizer, text: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.encode = functools.cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self.hay = Haystack(text, lambda part: list(self.encode(part)))
        self.special = {name: tokenizer.convert_tokens_to_ids(name) for name in (BOS, USER, ASSISTANT, END)}
        self.numbers = {self.encode(f" {number}")[0] for number in range(10, 100)}
        self.names = {self.encode(f" {word}")[0] for word in facts.WORDS}
        # What stands before a value: in a fact, and in the JSON object.
        self._before = {self.encode(" is")[0], self.encode('{"fox": 4')[2]}

    def batch(self, length: int, count: int, copy: float, warm: float) -> tuple[torch.Tensor, ...]:
        """`count` sequences of `length` tokens: tokens, weights and tags, [count, length] each; see `sequence`."""
        rows = [self.sequence(length, copy, warm) for _ in range(count)]
        return tuple(torch.tensor([getattr(row, name) for row in rows]) for name in ("tokens", "weights", "tags"))

    def sequence(self, length: int, copy: float, warm: float) -> Row:
        """copy: how likely it is mere copying. warm: how likely else that a document tells its facts again, which
        gives an answer to learn from every few tokens; most of those have no questions."""
        rng = self.rng
        if rng.random() < copy:
            return self._copying(length)
        again = rng.random() < warm
        kind = rng.choices(("codes", "json", "prose"), (0.62, 0.33, 0.05))[0]
        recite = again and rng.random() < 0.6
        share = 0.9 if recite else 0.5
        write = {"codes": self._codes, "json": self._json, "prose": lambda *_: ([], [])}[kind]
        pieces, asks = write(length, again, share)
        rounds = self._rounds([] if recite else asks, length // 4 if again else length // 2)
        room = length - 2 - len(rounds.tokens)
        free = room - sum(len(tokens) for _, tokens in pieces)
        document = self.hay.bury(rng, room, [(depth * free, tokens) for depth, tokens in pieces])
        row = Row()
        row.add([self.special[BOS], self.special[USER]])
        row.add(document, self._document_weights(document, kind))
        row.extend(rounds)
        return row

    def _rounds(self, asks: Sequence[Ask], limit: int) -> Row:
        """Questions and answers after a document, at least one and up to `limit` tokens."""
        rng, rounds = self.rng, Row()
        asked: set[str] = set()
        while asks:
            task, make = asks[rng.randrange(len(asks))]
            style = rng.choice(facts.STYLES)
            question = make(style)
            turn = Row()
            # The first question stands in the document's own turn.
            start = [] if not asked else [self.special[USER]]
            text = question.text if asked else f"\n\n{question.text}"
            turn.add([*start, *self.encode(text), self.special[END], self.special[ASSISTANT]])
            turn.add([*self.encode(question.reply), self.special[END]], 1.0, TAGS.index(f"{task}/{style}"))
            if asked and len(rounds.tokens) + len(turn.tokens) > limit:
                break
            asked.add(question.text)
            rounds.extend(turn)
            if len(rounds.tokens) > 700 or rng.random() < 0.25 / len(asked):
                break
        return rounds

    def _copying(self, length: int) -> Row:
        """Names and numbers over and over: in the same order, or in pairs whose order changes."""
        rng, row = self.rng, Row()
        row.add([self.special[BOS], self.special[USER]])
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
        row.tokens, row.weights, row.tags = row.tokens[:length], row.weights[:length], row.tags[:length]
        return row

    def _document_weights(self, document: Sequence[int], kind: str) -> list[float]:
        """A value that is told for the second time can be known; for the first time it can't, and doesn't count."""
        weights = [PROSE_WEIGHT] * len(document)
        seen = set()
        for place in range(2, len(document)):
            name, before, token = document[place - 2 : place + 1]
            if token not in self.numbers and token not in self.names:
                continue
            if before in self._before:
                weights[place] = 1.0 if (name, token) in seen else 0.0
                seen.add((name, token))
            elif kind != "prose":
                weights[place] = 0.0
        return weights

    def _amount(self, most: int) -> int:
        """From 1 to `most`, small numbers as likely as large ones are together."""
        return max(1, round(math.exp(self.rng.uniform(0, math.log(max(most, 1) + 0.5)))))

    def _place(self, pieces: Sequence[Sequence[int]]) -> list[Piece]:
        """Pieces at depths: spread over the document, or together in a part of it."""
        low = self.rng.random() * 0.9 if self.rng.random() < 0.3 else 0.0
        high = 1.0 if low == 0 else min(1.0, low + self.rng.uniform(0.02, 0.5))
        return [(self.rng.uniform(low, high), piece) for piece in pieces]

    def _codes(self, length: int, again: bool, share: float) -> tuple[list[Piece], list[Ask]]:
        """Facts of seven tokens, some of them chains, and questions about them."""
        rng = self.rng
        times = rng.choice((2, 3)) if again else 1
        most = max(2, min(120, length // 20))
        count = max(2, int(length * share / 7 / times)) if again else self._amount(most)
        names = rng.sample(facts.WORDS, min(count, 200))
        codes = {name: str(rng.randrange(10, 100)) for name in names}
        chains = self._chains(codes) if count >= 2 and rng.random() < 0.6 else []
        plain = [name for name in names if codes[name].isdigit()]
        pieces = [list(self.encode(facts.code_fact(*item))) for item in codes.items()] * times
        rng.shuffle(pieces)

        def codes_of(count: int) -> Callable[[facts.Style], facts.Question]:
            return lambda style: facts.ask_codes({name: codes[name] for name in rng.sample(plain, count)}, style)

        asks: list[Ask] = [("needle", codes_of(1))] * 2
        asks += [("multi", codes_of(2))] * 2 if len(plain) > 1 else []
        asks += [("multi", codes_of(3))] if len(plain) > 2 else []
        asks += [("chain", lambda style: facts.ask_chain(rng.choice(chains), style))] * 3 if chains else []
        return self._place(pieces), asks

    def _chains(self, codes: dict[str, str]) -> list[list[str]]:
        """Make some codes the names of others; the chains, from their first name to their number."""
        rng, spare, chains = self.rng, list(codes), []
        rng.shuffle(spare)
        for _ in range(rng.randint(1, max(1, len(codes) // 4))):
            links = spare[: rng.choice((2, 2, 2, 3))]
            del spare[: len(links)]
            if len(links) < 2:
                break
            for name, target in itertools.pairwise(links):
                codes[name] = target
            chains.append([*links, codes[links[-1]]])
        return chains

    def _json(self, length: int, again: bool, share: float) -> tuple[list[Piece], list[Ask]]:
        """A JSON object of five tokens a pair, told twice in another order if `again`."""
        rng = self.rng
        count = max(2, min(256, int(length * share / 11) if again else self._amount(length // 14)))
        keys = rng.sample(facts.WORDS, count)
        pairs = {key: str(rng.randrange(10, 100)) for key in keys}

        def told() -> list[int]:
            order = list(pairs)
            rng.shuffle(order)
            parts = facts.json_pairs({key: pairs[key] for key in order})
            return [token for part in parts for token in self.encode(part)]

        def ask(style: facts.Style) -> facts.Question:
            key = rng.choice(keys)
            return facts.ask_value(key, pairs[key], style)

        return [(rng.random(), told()) for _ in range(2 if again else 1)], [("kv", ask)]
