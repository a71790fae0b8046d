"""What `swaa-edge eval` asks: the questions of its tasks and files, the text for perplexity, and who scores.

samples, words, skipped = questions("model.gguf", asked, ["needle"], [], 4096, (2000,), text_of(None))
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from swaa_edge.cli.options.eval import BUILT_IN, PERPLEXITY, Asked
from swaa_edge.errors import ConfigError, DataFileError

if TYPE_CHECKING:
    from swaa_edge.evaluate.samples import Sample
    from swaa_edge.evaluate.scoring import Scorer


def questions(
    model: str, asked: Asked, names: list[str], files: list[str], context: int, lengths: tuple[int, ...], haystack: str
) -> tuple[list[Sample], list[int], int]:
    """The questions, the tokens of the text for perplexity, and how many questions were left out."""
    from swaa_edge.evaluate.datafile import check_lengths, read_samples
    from swaa_edge.evaluate.facts import STYLES
    from swaa_edge.evaluate.prompts import Prompts
    from swaa_edge.evaluate.tasks import TaskSettings, build

    built_in = tuple(name for name in names if name != PERPLEXITY)
    samples: list[Sample] = []
    words: list[int] = []
    with Prompts(model, chat=not asked.no_chat) as prompts:
        if built_in:
            styles = tuple(style for style in STYLES if asked.style in (style, "both"))
            plan = TaskSettings(
                built_in,
                lengths,
                asked.samples,
                asked.seed,
                asked.depths,
                styles,
                asked.beyond,
                asked.needles,
                asked.pairs,
                asked.hops,
                haystack,
            )
            samples += build(plan, prompts)
        skipped = 0
        for file in files:
            found = read_samples(file, prompts, limit=asked.limit)
            fit = check_lengths(found, context or 2**31, asked.max_tokens, skip_long=asked.skip_long)
            skipped += len(found) - len(fit)
            samples += fit
        if PERPLEXITY in names:
            words = prompts.tokenize(haystack if asked.text is None else text_of(asked.text))
    if asked.scorer == "regex":
        check_patterns(sample for sample in samples if sample.task not in BUILT_IN)
    return samples, words, skipped


def check_patterns(samples: Iterable[Sample]) -> None:
    """Raise `DataFileError` for the first answer that is no regular expression."""
    for sample in samples:
        for answer in sample.answers:
            try:
                re.compile(answer)
            except re.error as error:
                where = getattr(sample, "source", sample.id)
                raise DataFileError(f"{where}: answer {answer!r} is no regular expression: {error}") from None


def text_of(path: str | None) -> str:
    """A UTF-8 file's text, or without one the text that ships with Python. Raises `ConfigError`."""
    from swaa_edge.support.sample_text import real_text

    if path is None:
        return real_text()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise ConfigError(f"{path} is empty; give a text")
    return text


def scorer_of(asked: Asked) -> Scorer:
    """Built-in questions are scored by what the reply contains; those of files as the options say."""
    from swaa_edge.evaluate.scoring import in_order

    own = file_scorer(asked.scorer, asked.judge, asked.judge_model)
    return lambda sample, reply: (in_order if sample.task in BUILT_IN else own)(sample, reply)


def file_scorer(scorer: str | None, judge: str | None, judge_model: str | None) -> Scorer:
    """Who says whether replies to a file's questions are right; the options must have passed `check_judge`."""
    from swaa_edge.evaluate.judge import Judge
    from swaa_edge.evaluate.scoring import SCORERS

    return SCORERS[scorer or "contains"] if judge is None else Judge(judge, str(judge_model))


def digest(samples: list[Sample], words: list[int], lengths: tuple[int, ...]) -> str:
    """Of all that is asked: another prompt or answer, another run."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps([sample.id, sample.answers, sample.question]).encode())
        found.update(sample.prompt.tobytes())
    found.update(json.dumps([words, lengths if words else None]).encode())
    return found.hexdigest()
