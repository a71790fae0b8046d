"""Saves each result at once as a JSON line, so that an interrupted run can resume.

with open_journal("eval", key, file=None, fresh=False) as journal: journal.add(record); journal.discard()
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

from swaa_edge.errors import OutputError

Record = dict[str, Any]

_MARK = "swaa_edge_journal"


class Journal(contextlib.AbstractContextManager):
    """The records of a run and of its interrupted attempts, in a JSON Lines file. The first line identifies the run.

    path: the file, or None to keep the records only in memory. An incomplete last line is dropped. Other damage is an
        error.
    key: plain JSON values that identify the run.

    Raises `OutputError` if the file can't be written, is damaged, or is the journal of another run.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: dict[str, Any], *, command: str = "eval") -> None:
        self.records: list[Record] = []
        self.path = None if path is None else Path(path)
        self._command = command
        self._file: IO[str] | None = None
        self._in_cache = False
        head = {_MARK: command, "run": digest(key)}
        if self.path is None:
            return
        with self._as_output_error():
            resumes = self._read(self.path, head)
            self._file = self.path.open("a" if resumes else "w", encoding="utf-8")
            if not resumes:
                self._write(head)

    def _read(self, path: Path, head: Record) -> bool:
        """Load the records of an earlier run. Return False if there is no earlier run."""
        data = path.read_bytes() if path.exists() else b""
        complete = data[: data.rfind(b"\n") + 1]
        if not complete and json.dumps(head).startswith(data.decode("utf-8", "replace")):
            return False  # an empty file, or an incomplete first line
        other = f"{path} is not a journal of swaa-edge {self._command}"
        try:
            # splitlines() would also split at other characters that a response may contain.
            first, *records = [json.loads(line) for line in complete.decode("utf-8").split("\n")[:-1]] or [None]
        except ValueError as error:
            raise OutputError(f"{other} ({error}); choose another file") from error
        if not isinstance(first, dict) or first.get(_MARK) != self._command:
            raise OutputError(f"{other}; choose another file")
        if first != head:
            raise OutputError(
                f"{path} is the journal of another run (the model, samples or settings differ); choose another file"
            )
        if wrong := next((at for at, record in enumerate(records, 2) if not isinstance(record, dict)), None):
            raise OutputError(f"{path}:{wrong} is not a journal entry; choose another file")
        if len(complete) < len(data):
            # Drop the incomplete last line.
            os.truncate(path, len(complete))
        self.records = records
        return True

    def add(self, record: Record) -> None:
        """Add a record, and write the record to the file at once."""
        self.records.append(record)
        if self._file:
            with self._as_output_error():
                self._write(record)

    def _write(self, record: Record) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    @contextlib.contextmanager
    def _as_output_error(self) -> Any:
        try:
            yield
        except OutputError:  # a subclass of OSError
            raise
        except OSError as error:
            raise OutputError(f"cannot keep the results in {self.path}: {error.strerror}") from error

    def discard(self) -> None:
        """Delete the journal of a complete run from the cache folder. A file that the user named is kept."""
        self.close()
        if self._in_cache and self.path is not None:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def open_journal(command: str, key: dict[str, Any], file: str | os.PathLike[str] | None, fresh: bool) -> Journal:
    """Open the journal for a run of `command`.

    file: the file, or None for a file in the user's cache folder. If the folder can't be written, the journal is kept
        in memory.
    fresh: whether to delete the journal of an earlier run first. A file that is no journal of `command` is kept, and
        causes an error.

    Raises `OutputError`.
    """
    path = _cached(command, key) if file is None else Path(file)
    if fresh and path is not None and path.exists():
        _forget(path, command)
    journal = Journal(path, key, command=command)
    journal._in_cache = file is None
    return journal


def digest(key: dict[str, Any]) -> str:
    """Return a short hash of plain JSON values."""
    text = json.dumps(key, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cached(command: str, key: dict[str, Any]) -> Path | None:
    """Return <user's cache folder>/swaa-edge/<command>-<digest>.jsonl, or None if the folder can't be written."""
    from platformdirs import user_cache_path

    folder = user_cache_path("swaa-edge", appauthor=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / f"{command}-{digest(key)}.jsonl" if os.access(folder, os.W_OK) else None


def _forget(path: Path, command: str) -> None:
    with path.open("rb") as file:
        start = file.read(64)
    if start and not start.startswith(json.dumps({_MARK: command})[:-1].encode()):
        raise OutputError(f"{path} is not a journal of swaa-edge {command}, so --fresh keeps it; choose another file")
    path.unlink()
