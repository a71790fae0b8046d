"""Read samples from the user's own file in JSON Lines or Parquet.

The fields have the same names as in the SWAA authors' data sets. A LongMemEval-style file works unchanged.

    with Prompts("model.gguf") as prompts: samples = read_samples("questions.jsonl", prompts)
    samples = check_lengths(samples, context=32768, max_tokens=64)

A record is a line with a JSON object, or a row of a Parquet file. The fields are:

- prompt: the long text, a string. The prompt may contain the question, as in the SWAA authors' files.
- question: a string, optional. If the end of the prompt does not contain the question, the question is appended (see
  `SEEN`). A judge sees the question in both cases.
- answer: a string, a number, or a list of strings and numbers. The scorers `contains`, `in-order` and `regex` require
  all answers of a list. The scorer `exact` requires one of the answers.
- id: a string or a whole number, unique in the file, optional. The default is the number of the line or row,
  starting at 1.

Other fields are ignored.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from swaa_edge.errors import ConfigError, DataFileError
from swaa_edge.evaluate.samples import Sample
from swaa_edge.files.records import present, read_records, sound, text
from swaa_edge.layers import shown

#: Maximum number of characters after the question in a prompt, for example instructions and options. The same words
#: much earlier in the text are not the question.
SEEN = 4000

_FIELDS = ("id", "prompt", "question", "answer")


class Asks(Protocol):
    """The part of `Prompts` that `read_samples` uses."""

    def ask(self, document: str, question: str) -> Any: ...


def read_samples(path: str | os.PathLike[str], prompts: Asks, *, limit: int | None = None) -> list[Sample]:
    """Read the samples of a file, in file order. The engine can then reuse a prefix that adjacent prompts share.

    limit: maximum number of samples. The rest of the file is not read.

    A sample's task is the name of the file without extension. A sample's id is "<task>/<id of the record>".

    Raises `DataFileError` with the line of an invalid record. Raises `ConfigError` if `limit` is less than 1, or if
    pyarrow is missing for a Parquet file.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit} must be at least 1")
    samples: list[Sample] = []
    sources: dict[str, str] = {}
    with contextlib.closing(read_records(path, _FIELDS, ("prompt", "answer"))) as records:
        for number, source, record in itertools.islice(records, limit):
            sample = _sample(path.stem, number, source, record, prompts)
            if other := sources.get(sample.id):
                raise DataFileError(f'{source}: the id "{sample.id}" is already used in {other}; make it unique')
            sources[sample.id] = source
            samples.append(sample)
    if not samples:
        raise DataFileError(f"{path} contains no samples; write one object with the fields prompt and answer per line")
    return samples


def check_lengths(samples: Sequence[Sample], context: int, max_tokens: int, *, skip_long: bool = False) -> list[Sample]:
    """Check that each prompt and `max_tokens` for the answer fit into `context` tokens, and return the samples.

    skip_long: drop the samples that don't fit.

    Raises `DataFileError` with the first sample that doesn't fit. With skip_long, the error is raised only if no sample
    fits.
    """
    fits = [sample for sample in samples if len(sample.prompt) + max_tokens <= context]
    if len(fits) == len(samples) or (skip_long and fits):
        return fits
    long = next(sample for sample in samples if len(sample.prompt) + max_tokens > context)
    where = long.source or long.id
    needed = len(long.prompt) + max_tokens
    short = f"raise --ctx to {needed} if the model allows it, or shorten the prompt"
    if skip_long:
        raise DataFileError(f"no sample fits the context of {context} tokens; {where} needs {needed}; {short}")
    count = len(samples) - len(fits)
    raise DataFileError(
        f"{where}: a prompt of {len(long.prompt)} tokens and {max_tokens} for the answer don't fit the context of "
        f"{context}; {short}, or skip such samples ({count} of {len(samples)}) with --skip-long"
    )


def _sample(task: str, number: int, source: str, record: Any, prompts: Asks) -> Sample:
    if not isinstance(record, dict):
        raise DataFileError(f"{source}: {shown(record)} must be an object with the fields prompt and answer")
    prompt = text(source, record, "prompt")
    question = text(source, record, "question") if record.get("question") not in (None, "") else ""
    name = record.get("id")
    if name is None:
        name = number
    elif not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
        raise DataFileError(f"{source}: id = {shown(name)} must be a string or a whole number")
    tokens = prompts.ask(prompt, to_ask(prompt, question))
    answers = _answers(source, record)
    return Sample(f"{task}/{name}", task, tokens, answers, question, source=source, document=prompt, name=str(name))


def to_ask(prompt: str, question: str) -> str:
    """Return `question`, or "" if the end of the prompt already contains the question."""
    return "" if question.strip() in prompt[-SEEN - len(question) :] else question


def _answers(source: str, record: dict[str, Any]) -> tuple[str, ...]:
    value = present(source, record, "answer")
    if value == []:
        raise DataFileError(f"{source}: answer is an empty list; give at least one answer")
    return tuple(_answer(source, one) for one in (value if isinstance(value, list) else [value]))


def _answer(source: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)  # a column of whole numbers with missing values is read as floats
    finite = isinstance(value, float) and math.isfinite(value)
    if isinstance(value, bool) or not (finite or isinstance(value, (str, int))):
        raise DataFileError(f"{source}: answer = {shown(value)} must be a string, a number or a list of these")
    return sound(source, "answer", str(value))
