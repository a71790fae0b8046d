"""Where a command that measures for minutes keeps what it has, so that the same command goes on after Ctrl-C.

journal, path = opened("eval", key, asked.journal_file, asked.fresh)
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swaa_edge.files.model import ModelFile

if TYPE_CHECKING:
    from swaa_edge.support.journal import Journal

_ENDS = 1 << 20


def opened(kind: str, key: dict[str, Any], file: str | None, fresh: bool) -> tuple[Journal, Path | None]:
    """`open_journal`, with its path."""
    from swaa_edge.support.journal import open_journal

    journal = open_journal(kind, key, file, fresh)
    return journal, journal.path


def fingerprint(model: ModelFile, lora: str | None = None) -> list[Any]:
    """Of the size and both ends of each file: cheap for gigabytes, and other metadata or weights show in them.

    lora: an adapter that is applied to the model, or none.
    """
    found = [model.size, *(_ends(path) for path in model.paths)]
    return found if lora is None else [*found, os.path.getsize(lora), _ends(Path(lora))]


def _ends(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.sha256(file.read(_ENDS))
        file.seek(max(0, path.stat().st_size - _ENDS))
        found.update(file.read(_ENDS))
    return found.hexdigest()
