"""Whether a reply is right: by what it contains, by what it is, by a pattern, or by another model's verdict.

    score = SCORERS["contains"]; score(sample, "The code of fox is 47.")
"""

from __future__ import annotations

import re
from collections.abc import Callable

from swaa_edge.evaluate.samples import Sample

#: What a scorer is: the sample and the reply, and whether it is right. A judge may raise `GenerationError`.
Scorer = Callable[[Sample, str], bool]


def final(reply: str) -> str:
    """A reply without the thinking that a reasoning model puts before it, and without white space around it."""
    return reply.rpartition("</think>")[2].strip()


def contains(sample: Sample, reply: str) -> bool:
    """Every answer stands in the reply, as whole words, in any case, in the order of the answers."""
    at, text = 0, _words(final(reply))
    for answer in sample.answers:
        found = re.compile(rf"(?<!\w){re.escape(_words(answer))}(?!\w)").search(text, at)
        if not found:
            return False
        at = found.end()
    return True


def exact(sample: Sample, reply: str) -> bool:
    """The reply is one of the answers: white space, case and a full stop at the end don't count."""
    told = _words(final(reply)).rstrip(".")
    return any(told == _words(answer).rstrip(".") for answer in sample.answers)


def regex(sample: Sample, reply: str) -> bool:
    """Every answer, a regular expression of Python's `re`, is found in the reply."""
    return all(re.search(answer, final(reply)) for answer in sample.answers)


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


SCORERS: dict[str, Scorer] = {"contains": contains, "exact": exact, "regex": regex}
