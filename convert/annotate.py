"""Writes SWAA keys into an existing GGUF file, or removes SWAA keys. The tensors stay unchanged.

SWAA keys go to the end of the key section. All other keys are copied byte by byte, even keys of unknown types. So
removing the SWAA keys restores the original file exactly.

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
#: Called with the number of bytes written so far, and the total.
Progress = Callable[[int, int], None]
# The content of a new file: bytes, and ranges of bytes to copy from the source.
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
    """Copy the model `source` to `output` with the SWAA keys of `config`. Return the paths of the written files.

    source: the model file, or the first file of a split model.
    output: the new file. The other files of a split model are copied to the same folder, under matching names.
    config: the settings to write. None removes all `swaa.*` keys. The key `swaa.adapter` describes the weights, so
        an existing `swaa.adapter` is kept if `config` has no adapter.
    in_place: replace `source` instead of writing `output`. If `source` is a symbolic link, only the link is replaced.
    force: replace existing outputs.

    Raises `ModelFileError` if the source is damaged, and `UnsupportedModelError` if SWAA can't be applied to the model.
    Raises `ConfigError` for layers that the model doesn't have, and `OutputError` if an output can't be written. On an
    error, the source and existing outputs stay unchanged.
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
        # All outputs are reserved before the first byte is copied. The exit stack renames in reverse order, so a split
        # model's first file appears last, when the other files are complete.
        targets = [stack.enter_context(atomic_output(path, force=force or in_place)) for path in outputs]
        for shard, parts, target in zip(headers, pieces, targets, strict=False):
            _write(shard, parts, target, advance)
        _check(header, targets[0], config)
    if in_place:
        os.chmod(header.path, mode)
    return outputs


def _fitting(header: Header, config: SwaaConfig) -> SwaaConfig:
    """Return `config`. If `config` names no adapter, the result names the file's adapter.

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
    """Return the parts of a copy with the SWAA keys of `config`, or without SWAA keys if `config` is None."""
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
    """Return the padding that the file had between header and data before SWAA keys were added.

    A file without tensors can have less padding than the alignment requires.
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
        # If the file ends in a hole, only this call sets the full length.
        file.truncate(file.tell())


def _copy(header: Header, source: BinaryIO, part: range, file: BinaryIO, advance: Callable[[int], None]) -> None:
    at = part.start
    while at < part.stop:
        try:
            # Skip the holes of a sparse file: written as zeros, holes could fill the disk.
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
    """Return the offset of the first byte outside a hole, at or after `at`.

    If only a hole follows, return the size of the file.
    """
    if not hasattr(os, "SEEK_DATA"):
        return at
    try:
        return os.lseek(source.fileno(), at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            return at  # a file system without holes
        # ENXIO: only a hole follows, or `at` is past the end because the file was truncated meanwhile.
        size = os.fstat(source.fileno()).st_size
        return size if at < size else at


def _check(header: Header, written: Path, config: SwaaConfig | None) -> None:
    """Raise `ModelFileError` unless the written file has the tensors of the source and the keys of `config`."""
    new = read_header(written)
    found = effective_config(new)
    same_data = new.tensors == header.tensors and _data_size(new) == _data_size(header)
    same_keys = found is config or (
        config is not None and found is not None and pack(found, header.n_layers) == pack(config, header.n_layers)
    )
    if not (same_data and same_keys):
        raise ModelFileError(f"{header.path} changed while it was read; stop programs that write to it")


def _data_size(header: Header) -> int:
    # A vocabulary file may end within the padding. The difference is then negative.
    return max(0, header.size - header.data_start)
