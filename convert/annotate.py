"""Writes SWAA keys into an existing GGUF, or removes them, without changing a byte of its tensors.

The SWAA keys are added at the end of the key section, and all other bytes are copied unchanged. So removing the SWAA
keys restores the original file, bit for bit. Parsing and rewriting the whole file could change keys of unknown types.

    annotate("model.gguf", "model-swaa.gguf", SwaaConfig.from_recipe("balanced"))
"""

import contextlib
import dataclasses
import errno
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, ModelFileError, OutputError, UnsupportedModelError
from swaa_edge.files.header import FIXED_PART, Header, aligned, read_header
from swaa_edge.files.model import output_paths, read_shards, swaa_refusal
from swaa_edge.metadata import PADDING_KEY, PREFIX, effective_config, pack
from swaa_edge.support.atomic import atomic_output

_CHUNK = 4 << 20
#: Called with the bytes written so far, and the total.
Progress = Callable[[int, int], None]
# A file's new content: bytes, and ranges of the bytes of its source.
_Pieces = list[bytes | range]


def annotate(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    config: SwaaConfig | None = None,
    *,
    in_place: bool = False,
    force: bool = False,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Write a copy of `source` with the SWAA keys of `config` to `output`; return the paths of the written files.

    source: the model file; for a split model, its first file.
    output: the new file. A split model's other files are copied beside it, under names that match.
    config: the settings to write, or None to remove all `swaa.*` keys. They replace the existing SWAA keys, but
        `swaa.adapter`, which describes the weights, is kept if `config` has no adapter.
    in_place: replace `source` by the complete new file instead of writing `output`. If `source` is a symbolic link, the
        link is replaced, not its target.
    force: replace existing outputs.

    Raises `ModelFileError` for a damaged source, `UnsupportedModelError` for a model that SWAA can't be applied to,
    `ConfigError` for layers that the model doesn't have, and `OutputError` for an output that can't be written. On an
    error, the source and existing outputs stay intact.
    """
    if in_place is (output is not None):
        raise OutputError("give either an output file or in_place, not both")
    headers = read_shards(read_header(source))
    header = headers[0]
    mode = stat.S_IMODE(os.stat(source).st_mode)
    if config is not None:
        config = _fitting(header, config)
    pieces: list[_Pieces] = [_spliced(header, config)]
    outputs = [header.path]
    if not in_place:
        pieces += [[range(shard.size)] for shard in headers[1:]]
        outputs = output_paths(output, len(headers))
    total = sum(map(len, (part for parts in pieces for part in parts)))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress:
            on_progress(done, total)

    with contextlib.ExitStack() as stack:
        # All outputs are reserved before the first byte is copied. They take their names in reverse order,
        # so that the first file, which the others depend on, comes last.
        targets = [stack.enter_context(atomic_output(path, force=force or in_place)) for path in outputs]
        for shard, parts, target in zip(headers, pieces, targets, strict=False):
            _write(shard, parts, target, advance)
        _check(header, targets[0], config)
    if in_place:
        os.chmod(header.path, mode)
    return outputs


def _fitting(header: Header, config: SwaaConfig) -> SwaaConfig:
    """Return `config`, with the name of the file's adapter if `config` names no adapter.

    Raises `UnsupportedModelError` if SWAA can't be applied to the model.
    """
    if refusal := swaa_refusal(header):
        raise UnsupportedModelError(refusal)
    adapter = header.value("swaa.adapter")
    if config.adapter is None and adapter is not None:
        with contextlib.suppress(ConfigError):
            return dataclasses.replace(config, adapter=adapter)
    return config


def _spliced(header: Header, config: SwaaConfig | None) -> _Pieces:
    """Return the parts of the new file: its SWAA keys are those of `config`, or none if `config` is None."""
    ours = sorted(
        (field for field in header.fields.values() if field.key.startswith(PREFIX)), key=lambda field: field.start
    )
    kept: list[range] = []
    at = FIXED_PART
    for field in ours:
        kept.append(range(at, field.start))
        at = field.end
    kept.append(range(at, header.keys_end))
    tensor_list = range(header.keys_end, header.tensors_end)
    plain_end = FIXED_PART + sum(map(len, kept)) + len(tensor_list)
    original = _original_padding(header, plain_end, annotated=bool(ours))
    n_keys = len(header.fields) - len(ours)
    if config is None:
        added, padding = b"", original
    else:
        is_plain = original == bytes(aligned(plain_end, header.alignment) - plain_end)
        n_added, added = pack(config, header.n_layers, None if is_plain else original)
        n_keys += n_added
        end = plain_end + len(added)
        padding = bytes(aligned(end, header.alignment) - end)
    fixed = struct.pack("<4sIQQ", b"GGUF", header.version, len(header.tensors), n_keys)
    data = range(min(header.data_start, header.size), header.size)
    return [fixed, *kept, added, tensor_list, padding, data]


def _original_padding(header: Header, plain_end: int, annotated: bool) -> bytes:
    """Return the padding between header and data, as it was before SWAA keys were added.

    In a file without tensors, the padding can be shorter than the alignment requires.
    """
    stored = header.value(PADDING_KEY)
    if stored is not None:
        try:
            padding = bytes.fromhex(stored)
        except (TypeError, ValueError):
            raise ModelFileError(f"{header.path}: {PADDING_KEY} must be hexadecimal; download the file again") from None
        full = aligned(plain_end, header.alignment) - plain_end
        if len(padding) > full or (header.tensors and len(padding) != full):
            raise ModelFileError(f"{header.path}: {PADDING_KEY} has {len(padding)} bytes; it must have {full}")
        return padding
    if annotated:
        return bytes(aligned(plain_end, header.alignment) - plain_end)
    with open(header.path, "rb") as file:
        file.seek(header.tensors_end)
        return file.read(header.data_start - header.tensors_end)


def _write(header: Header, pieces: _Pieces, target: Path, advance: Callable[[int], None]) -> None:
    with open(header.path, "rb", buffering=0) as source, open(target, "wb") as file:
        for piece in pieces:
            if isinstance(piece, bytes):
                file.write(piece)
                advance(len(piece))
            else:
                _copy(header, source, piece, file, advance)
        # A hole at the end is part of the file only once the length is set.
        file.truncate(file.tell())


def _copy(header: Header, source: BinaryIO, part: range, file: BinaryIO, advance: Callable[[int], None]) -> None:
    at = part.start
    while at < part.stop:
        try:
            # Holes stay holes: written as zeros, a sparse file could fill the disk.
            data_at = min(_next_data(source, at), part.stop)
            source.seek(data_at)
            data = source.read(min(_CHUNK, part.stop - data_at))
        except OSError as error:
            raise ModelFileError(f"cannot read {header.path}: {error.strerror}") from error
        if data_at < part.stop and not data:
            raise ModelFileError(f"{header.path} became shorter while it was read; stop programs that write to it")
        file.seek(data_at - at, os.SEEK_CUR)
        file.write(data)
        advance(data_at - at + len(data))
        at = data_at + len(data)


def _next_data(source: BinaryIO, at: int) -> int:
    """Return the offset of the first byte at or after `at` that isn't in a hole of a sparse file.

    If only a hole follows, returns the size of the file.
    """
    if not hasattr(os, "SEEK_DATA"):
        return at
    try:
        return os.lseek(source.fileno(), at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            return at  # a file system without holes
        # ENXIO means a hole up to the end, or an offset past the end, of a file that was truncated meanwhile.
        size = os.fstat(source.fileno()).st_size
        return size if at < size else at


def _check(header: Header, written: Path, config: SwaaConfig | None) -> None:
    """Raise `ModelFileError` unless the written file has the same tensors and the new keys."""
    new = read_header(written)
    found = effective_config(new)
    same_data = new.tensors == header.tensors and _data_size(new) == _data_size(header)
    same_keys = found is config or (
        config is not None and found is not None and pack(found, header.n_layers) == pack(config, header.n_layers)
    )
    if not (same_data and same_keys):
        raise ModelFileError(f"{header.path} changed while it was read; stop programs that write to it")


def _data_size(header: Header) -> int:
    # Negative for a vocabulary file, which may end before the padding does.
    return max(0, header.size - header.data_start)
