"""The weights of a model on disk: the tensors of a safetensors file, and a fingerprint that is fast even for gigabytes.

read_tensors("Qwen3-4B/model.safetensors")["model.norm.weight"].shape
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from swaa_edge.errors import ModelFileError, SwaaError

# What git leaves in place of a large file that was not downloaded.
LFS_POINTER = b"version "
# Of each tensor, this many bytes from its middle are hashed: whole models take minutes, and a fine-tune may differ from
# its base in the attention's matrices only.
_SAMPLE = 4096


class StoredTensor(NamedTuple):
    """One tensor of a safetensors file: its type (such as "BF16"), its shape (slowest dimension first) and the range of
    its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: range


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in the order in which they are stored.

    Raises `ModelFileError` if the file is truncated or not a safetensors file, and `SwaaError` if the package
    safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise SwaaError("Hugging Face models need safetensors; pip install 'swaa-edge[convert]'") from error
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    if start == LFS_POINTER:
        raise ModelFileError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull")
    try:
        with safe_open(path, framework="np") as file:
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            found = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]
    except SafetensorError as error:
        # Its texts for a file that ends in its header, or in its data.
        if re.search("invalid header length|incomplete metadata", str(error)):
            raise ModelFileError(
                f"{path} is truncated: its header does not fit its {size} bytes; download it again"
            ) from None
        raise ModelFileError(f"{path} is not a safetensors file; download it again") from None
    # The format has no gaps: the tensors fill the file up to its end, one after the other.
    lengths = [math.prod(shape) * _bits(dtype) // 8 for _, dtype, shape in found]
    at, tensors = size - sum(lengths), {}
    for (name, dtype, shape), length in zip(found, lengths, strict=True):
        tensors[name] = StoredTensor(dtype, shape, range(at, at + length))
        at += length
    return tensors


def _bits(dtype: str) -> int:
    # The names hold the width: F32, BF16, F8_E4M3; only BOOL has none, and takes a byte.
    number = re.search(r"[0-9]+", dtype)
    return int(number[0]) if number else 8


def fingerprint(files: Iterable[tuple[Path, range, Iterable[range]]]) -> str:
    """Identify model files of any size by a hash of each file's metadata and of the middle of each tensor.

    files: for each file, its path, the byte range of the metadata, and the byte ranges of the tensors.
    """
    digest = hashlib.sha256()
    for path, metadata, tensors in files:
        with path.open("rb") as file:
            for part in (metadata, *(_middle(data) for data in tensors)):
                file.seek(part.start)
                digest.update(file.read(len(part)))
    return digest.hexdigest()[:32]


def _middle(data: range) -> range:
    start = data.start + max(0, len(data) - _SAMPLE) // 2
    return range(start, min(start + _SAMPLE, data.stop))
