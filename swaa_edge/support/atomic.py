"""Atomic writes: a file is either completely written or unchanged.

A converter that dies halfway must not leave a partial file or a damaged input. So the new content goes into a temporary
file beside the target. The complete file is flushed to disk and renamed to the target.

    with atomic_output("model.gguf") as tmp: write(tmp)
"""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from swaa_edge.errors import OutputError


@contextlib.contextmanager
def atomic_output(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`. If the block ends without an error, rename the temporary file to `path`.

    On any exception, even `KeyboardInterrupt`, the temporary file is removed and `path` stays unchanged. A symbolic
    link is replaced, and the link's target is kept: other links in a download cache may share the target.

    Raises `OutputError` if `path` exists, unless `path` is a regular file and `force` is true. Also raises
    `OutputError` if the folder is missing or not writable, or if the disk is full.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target} is a folder; give the name of a file")
    if target.exists() and not target.is_file():
        raise OutputError(f"{target} is not a regular file; give the name of a file")
    if target.exists() and not force:
        raise OutputError(f"{target} exists already; pass --force to replace it, or choose another name")
    if not target.parent.is_dir():
        raise OutputError(f"the folder {target.parent} does not exist; create it or choose another output")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise OutputError(f"cannot write to the folder {target.parent}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        # mkstemp makes files private. Set the mode that open() would give.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, OutputError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise OutputError(f"cannot write {target}: {error.strerror}; free some space or choose another disk") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_outputs(
    files: Iterable[str | None], *, force: bool = False, others: Iterable[str | os.PathLike[str] | None] = ()
) -> Iterator[dict[str, Path]]:
    """Do the same as `atomic_output` for several files. Yield a mapping from each file to its temporary path.

    files: paths to write. None and "-" (stdout) are skipped.
    others: other files of the caller, such as inputs and a journal.

    Raises `OutputError` as `atomic_output` does, and if a file is named twice.
    """
    files = list(files)
    _check_distinct(files, others)
    with contextlib.ExitStack() as stack:
        names = dict.fromkeys(file for file in files if file not in (None, "-"))
        yield {file: stack.enter_context(atomic_output(file, force=force)) for file in names}


def check_outputs(
    files: Iterable[str | None], *, force: bool = False, others: Iterable[str | os.PathLike[str] | None] = ()
) -> None:
    """Raise the errors of `atomic_outputs` early, before hours of work are lost."""

    class Claimed(Exception):
        pass

    with contextlib.suppress(Claimed), atomic_outputs(files, force=force, others=others):
        raise Claimed


def _check_distinct(files: Iterable[str | None], others: Iterable[str | os.PathLike[str] | None]) -> None:
    taken = {os.path.realpath(file) for file in others if file is not None}
    for file in files:
        if file in (None, "-"):
            continue
        if os.path.realpath(file) in taken:
            raise OutputError(
                f"{file} is used for an output and for another file of this command; give the output another name"
            )
        taken.add(os.path.realpath(file))


def write_json(path: str | os.PathLike[str], document: dict[str, Any], *, force: bool = False) -> None:
    """Write `document` to `path` as JSON, atomically."""
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk, if the file system can sync a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
