"""Reads a user's data files: plain text, or records in JSON Lines or Parquet.

    for number, source, record in read_records("data.jsonl", ("prompt", "answer")): text(source, record, "prompt")

A record is a JSON object on one line, or a Parquet row. The source of a record is the file name and the position, for
example "data.jsonl:3" or "data.parquet: row 3".
"""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from swaa_edge.errors import ConfigError, DataFileError
from swaa_edge.layers import shown

_LINES, _PARQUET = (".jsonl", ".json"), ".parquet"

Place = tuple[int, str, Any]


def read_records(path: Path, fields: Sequence[str], needed: Sequence[str] = ()) -> Iterator[Place]:
    """Yield the line or row number (from 1), the source and the value of each record.

    fields: the columns to read from a Parquet file.
    needed: the columns that a Parquet file must have.

    `text` and `present` check the fields of a record; this function doesn't.

    Raises `DataFileError` if the file can't be read, has another extension or has a line that isn't JSON. Raises
    `ConfigError` if a Parquet file is given but pyarrow is not installed.
    """
    extension = path.suffix.lower()
    if extension in _LINES:
        records = _lines(path)
    elif extension == _PARQUET:
        records = _rows(path, fields, needed)
    else:
        what = f"the extension {path.suffix}" if path.suffix else "no extension"
        raise DataFileError(f"{path} has {what}; it must be .jsonl or .json (one object per line) or .parquet")
    try:
        yield from records
    except OSError as error:  # pyarrow's OSError has several lines and no strerror
        raise DataFileError(f"cannot read {path}: {' '.join((error.strerror or str(error)).split())}") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of the file at `path`, or of stdin for "-".

    Raises `ConfigError` if the file is missing, empty or not UTF-8.
    """
    where = "stdin" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {where}: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not text.strip():
        raise ConfigError(f"{where} is empty; give a file with text")
    return text


def text(source: str, record: dict[str, Any], field: str) -> str:
    """Return the text in a field of a record.

    Raises `DataFileError` if the field is missing, null, empty, not a string or not valid Unicode.
    """
    value = present(source, record, field)
    if not isinstance(value, str):
        raise DataFileError(f"{source}: {field} = {shown(value)} must be a string")
    return sound(source, field, value)


def present(source: str, record: dict[str, Any], field: str) -> Any:
    """Return the value of a field of a record. Raises `DataFileError` if the field is missing or null."""
    value = record.get(field)
    if value is None:
        what = "is null" if field in record else f"is missing; the record has {', '.join(map(str, record)) or 'none'}"
        raise DataFileError(f"{source}: the field {field} {what}")
    return value


def sound(source: str, field: str, value: str) -> str:
    """Return `value` unchanged. Raises `DataFileError` if `value` is only white space or can't be encoded as UTF-8."""
    if not value.strip():
        raise DataFileError(f"{source}: {field} is empty; it must be text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataFileError(f"{source}: {field} is not valid Unicode (\\u{ord(value[error.start]):x})") from None
    return value


def _lines(path: Path) -> Iterator[Place]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                decoded = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataFileError(f"{source}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
            if decoded.strip():
                yield number, source, _parsed(source, decoded)


def _parsed(source: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        if line.strip() in ("[", "{", "[{"):
            raise DataFileError(f"{source}: the object continues on the next line; write it on one line") from None
        raise DataFileError(f"{source}: malformed JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deeply nested lists
        raise DataFileError(f"{source}: invalid JSON: {error}") from None


def _rows(path: Path, fields: Sequence[str], needed: Sequence[str]) -> Iterator[Place]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError("a Parquet file needs pyarrow; pip install 'swaa-edge[parquet]'") from error
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file)
            columns = table.schema_arrow.names
            for field in needed:
                if field not in columns:
                    raise DataFileError(f"{path} has no column {field}; its columns: {', '.join(columns) or 'none'}")
            number = 0
            for batch in table.iter_batches(64, columns=[name for name in fields if name in columns]):
                for row in range(batch.num_rows):
                    number += 1
                    source = f"{path}: row {number}"
                    cells = {name: batch.column(name)[row] for name in batch.schema.names}
                    yield number, source, {name: _cell(source, name, cell) for name, cell in cells.items()}
        except pyarrow.ArrowException as error:
            what = " ".join(str(error).split())
            raise DataFileError(f"{path} is not a readable Parquet file: {what}") from error


def _cell(source: str, name: str, cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        raise DataFileError(f"{source}: {name} is not UTF-8") from None
