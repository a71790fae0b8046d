"""Scorers decide whether a response is correct: by words, by equality, or by a pattern.

score = SCORERS["contains"]; score(sample, "The code of fox is 47.")
"""

from __future__ import annotations

import re
from collections.abc import Callable

from swaa_edge.evaluate.samples import Sample

# A letter or digit of a script with spaces between words. Not included: Thai, Lao, Burmese, Khmer, Chinese and Japanese
# (no spaces between words), and Korean (endings are joined to words).
_LETTER = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"

#: scorer(sample, response): returns whether the response is correct. A judge may raise `GenerationError`.
Scorer = Callable[[Sample, str], bool]


def final(response: str) -> str:
    """Return the response without reasoning and without surrounding white space."""
    return response.rpartition("</think>")[2].strip()


def contains(sample: Sample, response: str) -> bool:
    """Return whether the response contains every answer as whole words. Ignores case and order."""
    text = _words(final(response))
    return all(_word(answer).search(text) for answer in sample.answers)


def in_order(sample: Sample, response: str) -> bool:
    """Like `contains`, but the answers must come in the given order."""
    at, text = 0, _words(final(response))
    for answer in sample.answers:
        found = _word(answer).search(text, at)
        if not found:
            return False
        at = found.end()
    return True


def exact(sample: Sample, response: str) -> bool:
    """Return whether the response equals one of the answers. Ignores white space, case and a final full stop."""
    text = _words(final(response)).rstrip(".")
    return any(text == _words(answer).rstrip(".") for answer in sample.answers)


def regex(sample: Sample, response: str) -> bool:
    """Return whether every answer, a regular expression for `re.search`, matches the response."""
    return all(re.search(answer, final(response)) for answer in sample.answers)


def _word(answer: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!{_LETTER}){re.escape(_words(answer))}(?!{_LETTER})")


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


SCORERS: dict[str, Scorer] = {"contains": contains, "in-order": in_order, "exact": exact, "regex": regex}
