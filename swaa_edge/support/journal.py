"""The answers of an evaluation as they come, a line each, so that a run that was interrupted goes on where it was.

with Journal(path, key) as journal: journal.add(record); journal.records
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

from swaa_edge.errors import OutputError

Record = dict[str, Any]


class Journal:
    """Records in the JSON Lines file at `path`, the first line says what run they belong to.

    key: what decides whether records fit, as plain JSON values; a journal of another run is refused.
    path: None keeps the records in memory only. A last line that was cut off is dropped; other damage is an error.

    Raises `OutputError`.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: dict[str, Any]) -> None:
        #: Those of earlier runs and of this one.
        self.records: list[Record] = []
        self._path = None if path is None else Path(path)
        self._file: IO[str] | None = None
        head = {"swaa_edge_evaluation": 1, "run": digest(key)}
        if self._path is None:
            return
        try:
            kept = self._read(head)
            self._file = self._path.open("w" if kept is None else "a", encoding="utf-8")
            if kept is None:
                self._write(head)
        except OutputError:  # is an OSError, too
            raise
        except OSError as error:
            raise OutputError(f"cannot keep the answers in {path}: {error.strerror}") from error

    def _read(self, head: dict[str, Any]) -> bool | None:
        """Take in the records of the file; None if there is nothing to go on from."""
        path = self._path
        assert path is not None
        if not path.exists() or path.stat().st_size == 0:
            return None
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            # Not splitlines: a reply may hold other characters that it takes for line ends.
            first, *records = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]] or [None]
        except ValueError as error:
            raise OutputError(f"{path} is no journal of an evaluation ({error}); choose another file") from error
        if not whole and json.dumps(head).startswith(data.decode("utf-8", "replace")):
            return None
        if not isinstance(first, dict) or first.get("swaa_edge_evaluation") != 1:
            raise OutputError(f"{path} is no journal of an evaluation; choose another file")
        if first != head:
            raise OutputError(
                f"{path} holds the answers of another run (model, samples or settings differ); choose another file"
            )
        if wrong := next((at for at, record in enumerate(records, 2) if not isinstance(record, dict)), None):
            raise OutputError(f"{path}:{wrong} is no answer of an evaluation; choose another file")
        if len(whole) < len(data):
            # The process died in the middle of this line.
            os.truncate(path, len(whole))
        self.records = records
        return True

    def add(self, record: Record) -> None:
        """Keep a record; it is in the file when this returns."""
        self.records.append(record)
        if self._file:
            try:
                self._write(record)
            except OSError as error:
                raise OutputError(f"cannot keep the answers in {self._path}: {error.strerror}") from error

    def _write(self, record: Record) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def digest(key: dict[str, Any]) -> str:
    """A short name for plain JSON values that changes whenever they do."""
    text = json.dumps(key, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
