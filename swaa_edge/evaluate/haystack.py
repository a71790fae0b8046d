"""Prose of an exact number of tokens, with hidden pieces of text.

Each sentence is tokenized on its own. So a prompt can have an exact number of tokens, and a hidden sentence stands
between two other sentences.

    hay = Haystack(text, tokenize); document = hay.bury(rng, 2000, [(950, tokenize(" The code of fox is 47."))])
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Sequence

Tokenize = Callable[[str], list[int]]

# The end of a sentence or a line. White space belongs to the sentence after it.
_SEAM = re.compile(r"(?<=[.!?:;])(?= )|(?<=\S)(?=\n)")


class Haystack:
    """The sentences of a text, as tokens.

    tokenize: function that returns the tokens of a text without a start token.
    """

    def __init__(self, text: str, tokenize: Tokenize) -> None:
        self.sentences = [tokens for part in _SEAM.split(text) if part.strip() and (tokens := tokenize(part))]
        if not self.sentences:
            raise ValueError("the text has no sentences")

    def prose(self, rng: random.Random, count: int) -> list[list[int]]:
        """Return consecutive sentences from a random place, `count` tokens in total. The last sentence may be cut.

        After the last sentence of the text, the prose continues with the first sentence. With the same seed, a larger
        `count` only adds tokens at the end.
        """
        place = rng.randrange(len(self.sentences))
        run: list[list[int]] = []
        while count > 0:
            run.append(self.sentences[place % len(self.sentences)][:count])
            count -= len(run[-1])
            place += 1
        return run

    def bury(self, rng: random.Random, count: int, pieces: Sequence[tuple[float, Sequence[int]]]) -> list[int]:
        """Return a document of exactly `count` tokens: prose with the pieces inserted between sentences.

        pieces: pairs (place, tokens). A place is a number of prose tokens. The piece goes before the sentence at this
            place. Pieces with the same place keep their order.

        Raises `ValueError` if the pieces alone are longer than `count`.
        """
        room = count - sum(len(tokens) for _, tokens in pieces)
        if room < 0:
            raise ValueError(f"{count - room} tokens of hidden text don't fit into a document of {count}")
        document: list[int] = []
        written = 0
        waiting = deque(sorted(pieces, key=lambda piece: piece[0]))
        for sentence in self.prose(rng, room):
            while waiting and written + len(sentence) > waiting[0][0]:
                document += waiting.popleft()[1]
            document += sentence
            written += len(sentence)
        for _, tokens in waiting:
            document += tokens
        return document
