"""Samples from the user's own file: JSON Lines or Parquet with the fields `prompt`, `question` and `answer`.

The field names are those of the SWAA authors' data sets, so a LongMemEval-style file works as it is.

    with Prompts("model.gguf") as prompts: samples = read_samples("questions.jsonl", prompts)
    samples = check_lengths(samples, context=32768, max_tokens=64)

A record is an object on a line of its own, or a row:

- prompt: the long text, a string. It may hold the question already, as in the authors' files.
- question: a string; may be absent. It is put behind the prompt, unless it stands in the prompt's last `SEEN`
  characters already; a judge is told of it either way.
- answer: a string, a number, or a list of these. Of a list, `contains`, `in-order` and `regex` want all; `exact` wants
  one of them.
- id: a string or a whole number, unique in the file; may be absent, then it is the number of the line or row, from 1.
- all else is ignored.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from swaa_edge.errors import ConfigError, DataFileError
from swaa_edge.evaluate.samples import Sample
from swaa_edge.layers import shown

#: How far before a prompt's end, in characters, a question is looked for that needs not be asked again. Instructions
#: and options may follow it; in a text much further ahead the same words are not meant as the question.
SEEN = 4000

_LINES, _PARQUET = (".jsonl", ".json"), ".parquet"
_FIELDS = ("id", "prompt", "question", "answer")


class Asks(Protocol):
    """What `read_samples` needs of `Prompts`."""

    def ask(self, document: str, question: str) -> Any: ...


@dataclasses.dataclass(frozen=True, eq=False)
class FileSample(Sample):
    """A sample that knows where it stands. source: "questions.jsonl:3", or "questions.parquet: row 3"."""

    source: str = ""


def read_samples(path: str | os.PathLike[str], prompts: Asks, *, limit: int | None = None) -> list[Sample]:
    """The samples of a file, in its order, so that an engine reuses the prefix of prompts that start alike.

    limit: how many, from the first; what comes after them is not read. A sample's task is the file's name without
    extension, its id "<task>/<id>". Raises `DataFileError` naming the line, `ConfigError` for a wrong `limit` or,
    if it is a Parquet file, when pyarrow is missing.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit} must be at least 1")
    reader = _reader(path)
    samples: list[Sample] = []
    sources: dict[str, str] = {}
    try:
        with contextlib.closing(reader(path)) as records:
            for number, source, record in itertools.islice(records, limit):
                sample = _sample(path.stem, number, source, record, prompts)
                if other := sources.get(sample.id):
                    raise DataFileError(f'{source}: the id "{sample.id}" is that of {other} too; make it unique')
                sources[sample.id] = source
                samples.append(sample)
    except OSError as error:  # pyarrow's own has no errno, and lines
        raise DataFileError(f"cannot read {path}: {' '.join((error.strerror or str(error)).split())}") from error
    if not samples:
        raise DataFileError(f"{path} holds no sample; write one object with prompt and answer per line")
    return samples


def check_lengths(samples: Sequence[Sample], context: int, max_tokens: int, *, skip_long: bool = False) -> list[Sample]:
    """The samples whose prompt, with `max_tokens` of answer, fits `context` tokens; all of them, or it is an error.

    skip_long: leave out the others; how many is told by the lengths of the lists. Raises `DataFileError` for the
    first that doesn't fit, and if none is left.
    """
    fits = [sample for sample in samples if len(sample.prompt) + max_tokens <= context]
    if len(fits) == len(samples) or (skip_long and fits):
        return fits
    long = next(sample for sample in samples if len(sample.prompt) + max_tokens > context)
    where = long.source if isinstance(long, FileSample) else long.id
    short = f"raise --ctx to {len(long.prompt) + max_tokens} if the model can, or shorten the prompt"
    if skip_long:
        raise DataFileError(f"no sample fits the context of {context} tokens, {where} has {len(long.prompt)}; {short}")
    count = len(samples) - len(fits)
    raise DataFileError(
        f"{where}: a prompt of {len(long.prompt)} tokens and {max_tokens} for the answer don't fit the context of "
        f"{context}; {short}, or leave out such samples ({count} of {len(samples)}) with --skip-long"
    )


def _sample(task: str, number: int, source: str, record: Any, prompts: Asks) -> FileSample:
    if not isinstance(record, dict):
        raise DataFileError(f"{source}: {shown(record)} must be an object with prompt and answer")
    prompt = _text(source, record, "prompt")
    question = _text(source, record, "question") if record.get("question") not in (None, "") else ""
    name = record.get("id")
    if name is None:
        name = number
    elif not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
        raise DataFileError(f"{source}: id = {shown(name)} must be a string or a whole number")
    tokens = prompts.ask(prompt, "" if question.strip() in prompt[-SEEN - len(question) :] else question)
    return FileSample(f"{task}/{name}", task, tokens, _answers(source, record), question, source=source)


def _text(source: str, record: dict[str, Any], field: str) -> str:
    value = _present(source, record, field)
    if not isinstance(value, str):
        raise DataFileError(f"{source}: {field} = {shown(value)} must be a string")
    return _sound(source, field, value)


def _answers(source: str, record: dict[str, Any]) -> tuple[str, ...]:
    value = _present(source, record, "answer")
    if value == []:
        raise DataFileError(f"{source}: answer is an empty list; give what the reply must contain")
    return tuple(_answer(source, one) for one in (value if isinstance(value, list) else [value]))


def _answer(source: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)  # a column of whole numbers that had gaps is one of floats
    finite = isinstance(value, float) and math.isfinite(value)
    if isinstance(value, bool) or not (finite or isinstance(value, (str, int))):
        raise DataFileError(f"{source}: answer = {shown(value)} must be a string, a number or a list of these")
    return _sound(source, "answer", str(value))


def _present(source: str, record: dict[str, Any], field: str) -> Any:
    value = record.get(field)
    if value is None:
        what = "is null" if field in record else f"is missing; there is {', '.join(map(str, record)) or 'nothing'}"
        raise DataFileError(f"{source}: the field {field} {what}")
    return value


def _sound(source: str, field: str, text: str) -> str:
    if not text.strip():
        raise DataFileError(f"{source}: {field} is empty; give a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataFileError(f"{source}: {field} holds half a character (\\u{ord(text[error.start]):x})") from None
    return text


def _reader(path: Path) -> Any:
    extension = path.suffix.lower()
    if extension in _LINES:
        return _read_lines
    if extension == _PARQUET:
        return _read_parquet
    what = f"the extension {path.suffix}" if path.suffix else "no extension"
    raise DataFileError(f"{path} has {what}; it must be .jsonl or .json (one object per line) or .parquet")


def _read_lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Number, place and value of each line that isn't blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataFileError(f"{source}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
            if text.strip():
                yield number, source, _parsed(source, text)


def _parsed(source: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text.strip() in ("[", "{", "[{"):
            raise DataFileError(f"{source}: the object goes on in the next line; write it on one line") from None
        raise DataFileError(f"{source}: malformed JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise DataFileError(f"{source}: JSON that can't be read: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Number, place and value of each row; of the columns that count only."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError("a Parquet file needs pyarrow; pip install 'swaa-edge[parquet]'") from error
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file)
            columns = table.schema_arrow.names
            for field in ("prompt", "answer"):
                if field not in columns:
                    raise DataFileError(f"{path} has no column {field}; there is {', '.join(columns) or 'none'}")
            number = 0
            for batch in table.iter_batches(64, columns=[name for name in _FIELDS if name in columns]):
                for row in range(batch.num_rows):
                    number += 1
                    source = f"{path}: row {number}"
                    cells = {name: batch.column(name)[row] for name in batch.schema.names}
                    yield number, source, {name: _cell(source, name, cell) for name, cell in cells.items()}
        except pyarrow.ArrowException as error:
            what = " ".join(str(error).split())
            raise DataFileError(f"{path} is no Parquet file that can be read: {what}") from error


def _cell(source: str, name: str, cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        raise DataFileError(f"{source}: {name} is not UTF-8") from None
