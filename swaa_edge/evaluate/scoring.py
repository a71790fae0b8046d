"""Whether a reply is right: by what it contains, by what it is, by a pattern, or by another model's verdict.

score = SCORERS["contains"]; score(sample, "The code of fox is 47.")
"""

from __future__ import annotations

import re
from collections.abc import Callable

from swaa_edge.evaluate.samples import Sample

# A letter or digit of a script that puts spaces between words: Thai, Lao, Burmese, Khmer, Chinese and Japanese don't,
# and Korean puts endings right behind a word, so there the neighbours of a word tell nothing.
_LETTER = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"

#: What a scorer is: the sample and the reply, and whether it is right. A judge may raise `GenerationError`.
Scorer = Callable[[Sample, str], bool]


def final(reply: str) -> str:
    """A reply without the thinking that a reasoning model puts before it, and without white space around it."""
    return reply.rpartition("</think>")[2].strip()


def contains(sample: Sample, reply: str) -> bool:
    """Every answer stands in the reply, as whole words, in any case and any order."""
    text = _words(final(reply))
    return all(_word(answer).search(text) for answer in sample.answers)


def in_order(sample: Sample, reply: str) -> bool:
    """As `contains`, in the order of the answers: which code is whose must be right, too."""
    at, text = 0, _words(final(reply))
    for answer in sample.answers:
        found = _word(answer).search(text, at)
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


def _word(answer: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!{_LETTER}){re.escape(_words(answer))}(?!{_LETTER})")


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


SCORERS: dict[str, Scorer] = {"contains": contains, "in-order": in_order, "exact": exact, "regex": regex}
