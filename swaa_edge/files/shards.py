"""Models split over several files, NAME-00001-of-0000N.gguf and on, as llama.cpp splits them.

The first file carries the metadata; the engine finds the others by name. So both are checked here.

    shard_paths(read_header("model-00001-of-00003.gguf"))   # the three paths
"""

import os
import re
from pathlib import Path

from swaa_edge.errors import ModelFileError, OutputError
from swaa_edge.files.header import Header

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def shard_count(header: Header) -> int:
    """How many files the model has: 1 if it isn't split."""
    count = header.value("split.count", 1)
    return count if isinstance(count, int) and count > 1 else 1


def check_first(header: Header) -> None:
    """Raise `ModelFileError`, naming the first file, if `header` is of a later file of a split model."""
    number = header.value("split.no", 0)
    if shard_count(header) == 1 or number == 0:
        return
    match = _NAME.fullmatch(header.path.name)
    first = header.path.with_name(_shard_name(match["stem"], 0, shard_count(header))) if match else "its first file"
    raise ModelFileError(f"{header.path} is file {number + 1} of a split model, without metadata; give {first}")


def shard_paths(header: Header) -> list[Path]:
    """The model's files, the given one first. Raises `ModelFileError` if it isn't the first, or one is missing."""
    check_first(header)
    count = shard_count(header)
    if count == 1:
        return [header.path]
    match = _NAME.fullmatch(header.path.name)
    if not match or int(match["number"]) != 1 or int(match["count"]) != count:
        wanted = _shard_name("NAME", 0, count)
        raise ModelFileError(f"{header.path} is the first of {count} files; rename it to {wanted}, like the others")
    paths = [header.path.with_name(_shard_name(match["stem"], number, count)) for number in range(count)]
    for path in paths:
        if not path.is_file():
            raise ModelFileError(f"{path} is missing; the model has {count} files, which must lie in one folder")
    return paths


def output_paths(first: str | os.PathLike[str], count: int) -> list[Path]:
    """Where `count` files of a split model go, the first being `first`. Raises `OutputError` for an unfit name."""
    first = Path(first)
    if count == 1:
        return [first]
    match = _NAME.fullmatch(first.name)
    if not match or int(match["number"]) != 1 or int(match["count"]) != count:
        wanted = _shard_name("NAME", 0, count)
        raise OutputError(f"the model is split into {count} files, so the output {first.name} must be called {wanted}")
    return [first.with_name(_shard_name(match["stem"], number, count)) for number in range(count)]


def _shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"
