"""The header of a GGUF file: its keys and tensors, with their byte offsets.

    read_header("model.gguf").value("general.architecture")

The header is read once, in bounded memory. Counts and lengths that exceed the file's size are errors.
gguf.GGUFReader is not used, for these reasons:

- GGUFReader takes seconds and creates a Python object for each vocabulary entry.
- Impossible counts in a damaged file make GGUFReader hang or raise bare exceptions.
- GGUFReader accepts a file with truncated tensor data.
- GGUFReader doesn't report where the keys end. `annotate` needs this offset.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from swaa_edge.errors import ModelFileError

# Name and struct format of each value type of fixed size, by GGUF's type code.
_SCALARS = {
    0: ("uint8", "<B"),
    1: ("int8", "<b"),
    2: ("uint16", "<H"),
    3: ("int16", "<h"),
    4: ("uint32", "<I"),
    5: ("int32", "<i"),
    6: ("float32", "<f"),
    7: ("bool", "<B"),
    10: ("uint64", "<Q"),
    11: ("int64", "<q"),
    12: ("float64", "<d"),
}
_STRING, _ARRAY = 8, 9
#: Number of bytes of the magic, version, tensor count and key count together.
FIXED_PART = 24
_VERSIONS = (2, 3)

# Limits far above any real model. Without limits, an impossible count would cause a long loop.
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_STRINGS = 1 << 24
_MAX_NAME = 1 << 16
_MAX_ALIGNMENT = 1 << 24
_MAX_LAYERS = 1 << 12
# Strings of more bytes and arrays of more elements are skipped.
_KEEP_STRING = 1 << 20
_KEEP_ARRAY = 1 << 14


@dataclasses.dataclass(frozen=True)
class Field:
    """A key and its value, stored in the bytes [start, end) of the file.

    type: for example "uint32", "string" or "array of bool".
    count: number of elements in an array, or 1 for any other type.
    value: an int, float, bool, str or tuple of numbers. Long values and lists of strings are skipped: their value is
        None. An invalid bool (a byte other than 0 or 1) is stored as an int.
    """

    key: str
    type: str
    count: int
    value: Any
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor. The shape starts with the fastest dimension.

    type: ggml's type code.
    offset: bytes from the start of the tensor data.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Header:
    """The part of a GGUF file before its tensor data. Offsets are in bytes from the start of the file.

    The keys occupy the bytes [24, keys_end), and the tensor list occupies [keys_end, tensors_end). Padding follows.
    The tensor data starts at data_start, a multiple of `alignment`. size: bytes of the whole file.
    """

    path: Path
    size: int
    version: int
    fields: dict[str, Field]
    tensors: tuple[Tensor, ...]
    keys_end: int
    tensors_end: int
    alignment: int

    @property
    def data_start(self) -> int:
        return aligned(self.tensors_end, self.alignment)

    def value(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` if the key is absent or its value was skipped."""
        field = self.fields.get(key)
        return default if field is None or field.value is None else field.value

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`. Raises `ModelFileError` if the key is missing."""
        name = self.value("general.architecture")
        if not isinstance(name, str) or not name:
            raise ModelFileError(f"{self.path} has no general.architecture, so it is not a language model")
        return name

    @property
    def n_layers(self) -> int:
        """The value of `{architecture}.block_count`. Raises `ModelFileError` if the key is missing or invalid."""
        key = f"{self.architecture}.block_count"
        field = self.fields.get(key)
        if field is None or field.type != "uint32" or not 1 <= field.value <= _MAX_LAYERS:
            shown = "missing" if field is None else f"{field.value} ({field.type})"
            raise ModelFileError(f"{self.path}: {key} is {shown}; it must be a uint32 from 1 to {_MAX_LAYERS}")
        return field.value


def aligned(offset: int, alignment: int) -> int:
    """Round `offset` up to a multiple of `alignment`, a power of two."""
    return (offset + alignment - 1) & -alignment


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of a GGUF file, and check that the tensor data is complete.

    Raises `ModelFileError` if the file is missing, unreadable, not GGUF, big-endian, truncated or of an unsupported
    version.
    """
    path = Path(path)
    try:
        with open(path, "rb", buffering=1 << 20) as file:
            header = _Parser(path, file).parse()
    except IsADirectoryError:
        raise ModelFileError(f"{path} is a folder; give a .gguf file") from None
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; give the path of a .gguf file") from None
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error
    except ModelFileError:
        raise
    except ValueError as error:  # from open(), for a path with a null byte
        raise ModelFileError(f"cannot read {str(path)!r}: {error}; give the path of a .gguf file") from error
    _check_data(header)
    return header


class _Parser:
    """Reads the header in one pass. Checks each length against the number of bytes left in the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = file.seek(0, os.SEEK_END)
        self.at = file.seek(0)

    def parse(self) -> Header:
        n_tensors, n_keys = self.fixed_part()
        self.check_count("keys", n_keys, _MAX_KEYS, least_bytes=13)
        fields: dict[str, Field] = {}
        for _ in range(n_keys):
            field = self.field()
            if field.key in fields:
                raise self.damaged(f"the key {field.key} appears twice")
            fields[field.key] = field
        keys_end = self.at
        self.check_count("tensors", n_tensors, _MAX_TENSORS, least_bytes=24)
        tensors = tuple(self.tensor() for _ in range(n_tensors))
        if len({tensor.name for tensor in tensors}) != n_tensors:
            raise self.damaged("two tensors have the same name")
        alignment = self.alignment(fields.get("general.alignment"))
        return Header(self.path, self.size, self.version, fields, tensors, keys_end, self.at, alignment)

    def fixed_part(self) -> tuple[int, int]:
        magic = self.file.read(4)
        if magic != b"GGUF":
            found = f"it starts with {magic!r}" if magic else "it is empty"
            raise ModelFileError(f"{self.path} is not a GGUF file: {found}, but a GGUF starts with b'GGUF'")
        self.at = 4
        self.version = self.number("<I", "version")
        if self.version & 0xFFFF == 0 and self.version:
            raise ModelFileError(f"{self.path} is a big-endian GGUF; convert it with gguf-convert-endian")
        if self.version not in _VERSIONS:
            raise ModelFileError(f"{self.path} is GGUF version {self.version}; only versions 2 and 3 are supported")
        return self.number("<Q", "tensor count"), self.number("<Q", "key count")

    def check_count(self, what: str, count: int, most: int, least_bytes: int) -> None:
        if count > most:
            raise self.damaged(f"it claims {count} {what}, but no model has more than {most}")
        if count * least_bytes > self.size - self.at:
            raise self.truncated(f"its header claims {count} {what}")

    def field(self) -> Field:
        start = self.at
        key = self.string("a key")
        code = self.number("<I", f"the type of {key}")
        if code == _STRING:
            length = self.length(f"the text of {key}", 1)
            text = None
            if length <= _KEEP_STRING:
                # Old converters cut names in the middle of a character. The rest of the name is useful.
                text = self.take(length, key).decode("utf-8", "replace")
            else:
                self.skip(length)
            return Field(key, "string", 1, text, start, self.at)
        if code == _ARRAY:
            return self.array(key, start)
        if code not in _SCALARS:
            raise self.damaged(f"the key {key} has the unknown type {code}")
        name, form = _SCALARS[code]
        value = self.number(form, key)
        return Field(key, name, 1, _as_bool(value) if name == "bool" else value, start, self.at)

    def array(self, key: str, start: int) -> Field:
        code = self.number("<I", f"the type of {key}")
        if code == _STRING:
            count = self.length(f"the list {key}", 8)
            if count > _MAX_STRINGS:
                raise self.damaged(f"the list {key} claims {count} texts, but no model has more than {_MAX_STRINGS}")
            self.skip_strings(count, key)
            return Field(key, "array of string", count, None, start, self.at)
        if code not in _SCALARS:
            raise self.damaged(f"the key {key} is a list of elements of the unknown type {code}")
        name, form = _SCALARS[code]
        width = struct.calcsize(form)
        count = self.length(f"the list {key}", width)
        value = None
        if count <= _KEEP_ARRAY:
            value = struct.unpack(f"<{count}{form[1]}", self.take(count * width, key))
            if name == "bool":
                value = tuple(map(_as_bool, value))
        else:
            self.skip(count * width)
        return Field(key, f"array of {name}", count, value, start, self.at)

    def skip_strings(self, count: int, key: str) -> None:
        # Written for speed: a vocabulary has hundreds of thousands of strings.
        read, unpack, at, size = self.file.read, struct.Struct("<Q").unpack, self.at, self.size
        for _ in range(count):
            head = read(8)
            at += 8
            if len(head) != 8 or (length := unpack(head)[0]) > size - at:
                raise self.truncated(f"a text in {key} is incomplete")
            if length < 4096:
                read(length)
            else:
                self.file.seek(length, os.SEEK_CUR)
            at += length
        self.at = at

    def tensor(self) -> Tensor:
        name = self.string("a tensor's name")
        n_dims = self.number("<I", name)
        if n_dims > 4:
            raise self.damaged(f"the tensor {name} has {n_dims} dimensions; the limit is 4")
        shape = struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims, name))
        return Tensor(name, self.number("<I", name), shape, self.number("<Q", name))

    def alignment(self, field: Field | None) -> int:
        if field is None:
            return 32
        value = field.value
        if field.type != "uint32" or value & (value - 1) or not 1 <= value <= _MAX_ALIGNMENT:
            limit = f"it must be a uint32, a power of two up to {_MAX_ALIGNMENT}"
            raise self.damaged(f"general.alignment is {value} ({field.type}); {limit}")
        return value

    def string(self, what: str) -> str:
        length = self.length(what, 1)
        if not 1 <= length <= _MAX_NAME:
            raise self.damaged(f"{what} is {length} bytes long; it must be 1 to {_MAX_NAME}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} at byte {self.at - length} is not UTF-8 text") from None

    def length(self, what: str, width: int) -> int:
        """Read a number of elements. Check that the rest of the file has at least `width` bytes for each element."""
        count = self.number("<Q", what)
        if count * width > self.size - self.at:
            raise self.truncated(f"{what} claims {count} {'bytes' if width == 1 else 'elements'}")
        return count

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def take(self, count: int, what: str) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise self.truncated(f"{what} is incomplete")
        self.at += count
        return data

    def skip(self, count: int) -> None:
        self.at = self.file.seek(count, os.SEEK_CUR)

    def damaged(self, why: str) -> ModelFileError:
        return ModelFileError(f"{self.path} is damaged: {_one_line(why)}; get the file again")

    def truncated(self, why: str) -> ModelFileError:
        return ModelFileError(
            f"{self.path} is truncated or damaged: {_one_line(why)}, but the file has {self.size} bytes; get it again"
        )


def _as_bool(byte: int) -> bool | int:
    return bool(byte) if byte in (0, 1) else byte


def _one_line(text: str) -> str:
    """Make `text` short and printable, for an error line."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= 200 else text[:197] + "..."


def tensor_data(header: Header) -> Iterator[tuple[Tensor, range]]:
    """Yield each tensor with its byte range in the file. For a type unknown to gguf, the range is empty."""
    from gguf.constants import GGML_QUANT_SIZES  # takes a moment to import

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    for tensor in header.tensors:
        per_block, block_bytes = sizes.get(tensor.type, (1, 0))
        start = header.data_start + tensor.offset
        yield tensor, range(start, start + tensor.n_elements // per_block * block_bytes)


def _check_data(header: Header) -> None:
    for tensor, data in tensor_data(header):
        if data.stop > header.size:
            raise ModelFileError(
                f"{header.path} is truncated: the tensor {_one_line(tensor.name)} ends at byte {data.stop}, "
                f"but the file has {header.size} bytes; get it again"
            )
