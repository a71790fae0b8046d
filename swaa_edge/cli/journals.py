"""Where a command that measures for minutes keeps what it has, so that the same command goes on after Ctrl-C.

journal, path = opened("eval", key, asked.journal_file, asked.fresh)
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swaa_edge.errors import OutputError
from swaa_edge.files.model import ModelFile

if TYPE_CHECKING:
    from swaa_edge.support.journal import Journal

_ENDS = 1 << 20


def opened(kind: str, key: dict[str, Any], file: str | None, fresh: bool) -> tuple[Journal, Path | None]:
    """The journal of a run, in `file` or else in the cache, and where it lies; in memory if there is no place for it.

    fresh: forget what an earlier run left in it. Raises `OutputError`.
    """
    from swaa_edge.support.journal import Journal

    path = cached(kind, key) if file is None else Path(file)
    if fresh and path is not None:
        forget(path)
    return Journal(path, key), path


def cached(kind: str, key: dict[str, Any]) -> Path | None:
    """The journal of a run in the user's cache folder: swaa-edge/eval-<digest>.jsonl; None if there can't be one."""
    from swaa_edge.support.journal import digest

    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "swaa-edge"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / f"{kind}-{digest(key)}.jsonl" if os.access(folder, os.W_OK) else None


def forget(path: Path) -> None:
    """Remove a journal, and nothing that isn't one."""
    if not path.exists():
        return
    with path.open("rb") as file:
        start = file.read(64)
    if start and not start.startswith(b'{"swaa_edge_evaluation"'):
        raise OutputError(f"{path} is no journal of an evaluation, so --fresh leaves it alone; choose another file")
    path.unlink()


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
