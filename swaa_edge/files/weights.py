"""The weights of a model on disk: the tensors of a safetensors file, and a fast fingerprint of large files.

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

# Start of a Git LFS pointer, a small text file in place of a large file that was not downloaded.
LFS_POINTER = b"version "
# Number of bytes to hash from the middle of each tensor. Hashing a whole model takes minutes. Every tensor is sampled,
# since a fine-tune may change only the attention's matrices.
_SAMPLE = 4096


class StoredTensor(NamedTuple):
    """A tensor of a safetensors file.

    dtype: for example "BF16".
    shape: slowest dimension first.
    data: range of the tensor's bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    data: range


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in stored order.

    Raises `ModelFileError` if the file is truncated or not a safetensors file. Raises `SwaaError` if the package
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
        # Messages of safetensors for a file that ends within the header or within the data.
        if re.search("invalid header length|incomplete metadata", str(error)):
            raise ModelFileError(
                f"{path} is truncated: its header does not fit its {size} bytes; download it again"
            ) from None
        raise ModelFileError(f"{path} is not a safetensors file; download it again") from None
    # The tensors are stored without gaps, and the last tensor ends at the end of the file.
    lengths = [math.prod(shape) * _bits(dtype) // 8 for _, dtype, shape in found]
    at, tensors = size - sum(lengths), {}
    for (name, dtype, shape), length in zip(found, lengths, strict=True):
        tensors[name] = StoredTensor(dtype, shape, range(at, at + length))
        at += length
    return tensors


def _bits(dtype: str) -> int:
    # The name of a type contains the number of bits, as in BF16 or F8_E4M3. The exception is BOOL, with 8 bits.
    number = re.search(r"[0-9]+", dtype)
    return int(number[0]) if number else 8


def fingerprint(files: Iterable[tuple[Path, range, Iterable[range]]]) -> str:
    """Return a hash that identifies model files.

    Only the metadata and the middle of each tensor are hashed, so that large files take little time.

    files: for each file, the path, the byte range of the metadata, and the byte ranges of the tensors.
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
