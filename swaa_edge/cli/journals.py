"""Where a command that measures for minutes keeps what it has, so that the same command goes on after Ctrl-C.

journal, path = opened("eval", key, asked.journal_file, asked.fresh)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from swaa_edge.files.lora_gguf import read_lora
from swaa_edge.files.model import ModelFile

if TYPE_CHECKING:
    from swaa_edge.support.journal import Journal


def opened(kind: str, key: dict[str, Any], file: str | None, fresh: bool) -> tuple[Journal, Path | None]:
    """`open_journal`, with its path."""
    from swaa_edge.support.journal import open_journal

    journal = open_journal(kind, key, file, fresh)
    return journal, journal.path


def fingerprint(model: ModelFile, lora: str | None = None) -> list[str]:
    """Identity of a model's metadata and weights, and of those of an adapter that is applied to it."""
    return [model.fingerprint] if lora is None else [model.fingerprint, read_lora(lora, model).fingerprint]
