"""The patched llama.cpp library: found, loaded into `llama_cpp`, checked, and our own C functions of it.

The published llama-cpp-python loads whatever library it is pointed to. It must be ours, built from the
same llama.cpp whose structs its ctypes declarations mirror; a wrong one would read past structs instead
of failing. So everything is checked here, once, before anything else touches `llama_cpp`.

    llama_cpp = native.load(); native.set_phase(llm.ctx, native.Phase.PREFILL)
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from swaa_edge.backends import load_backends
from swaa_edge.errors import NativeLibraryError

#: Version of the `llama_swaa_*` functions that this module declares.
ABI_VERSION = 2
#: The one release of llama-cpp-python whose struct declarations match the library.
LLAMA_CPP_VERSION = "0.3.36"
#: Environment variable: the folder of the library, instead of those that are searched.
PATH_VARIABLE = "SWAA_EDGE_LIB_PATH"
# The variable by which llama_cpp itself takes the folder.
_LLAMA_CPP_VARIABLE = "LLAMA_CPP_LIB_PATH"

_FILE_NAMES = {"win32": ("llama.dll", "libllama.dll"), "darwin": ("libllama.dylib", "libllama.so")}.get(
    sys.platform, ("libllama.so",)
)
_INSTALL = f"pip install llama-cpp-python=={LLAMA_CPP_VERSION}"
_REBUILD = "run `make setup` in the source tree, or reinstall swaa-edge"

_lock = threading.RLock()
_loaded: ModuleType | None = None


class Phase(enum.IntEnum):
    """What the tokens of the following llama_decode calls are; AUTO: a sequence's only token in a batch is decode."""

    AUTO = 0
    PREFILL = 1
    DECODE = 2


class Policy(enum.IntEnum):
    """How sliding layers compute: block table in the kernel, gather and stock kernel, or a full-width mask."""

    AUTO = 0
    TABLE = 1
    COPY = 2
    DENSE = 3


@dataclass(frozen=True)
class ModelConfig:
    """SWAA as a loaded model has it; `sliding` and `fa_decode` hold one bool per layer."""

    window_size: int
    sink_count: int
    sliding: tuple[bool, ...]
    fa_decode: tuple[bool, ...]


class _CConfig(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("enabled", "window_size", "sink_count", "n_layer")]


# name: (result, arguments)
_FUNCTIONS = {
    "llama_swaa_abi_version": (ctypes.c_uint32, []),
    "llama_swaa_last_error": (ctypes.c_char_p, []),
    "llama_swaa_model_config": (
        ctypes.c_bool,
        [ctypes.c_void_p, ctypes.POINTER(_CConfig), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32],
    ),
    "llama_swaa_set_phase": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int32]),
    "llama_swaa_get_policy": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_swaa_fingerprint": (ctypes.c_uint64, [ctypes.c_void_p]),
    "llama_swaa_can_continue": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    "llama_swaa_holds": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
    "llama_swaa_kv_bytes": (ctypes.c_uint64, [ctypes.c_void_p]),
    "llama_swaa_ring_cells": (ctypes.c_uint32, [ctypes.c_void_p]),
    "llama_swaa_set_default_policy": (ctypes.c_int32, [ctypes.c_int32]),
}


def library_dir() -> Path:
    """The folder that holds the patched library and its backends.

    That is SWAA_EDGE_LIB_PATH if set; else `lib` in this package; else `swaa_edge/lib` in an entry of
    sys.path, which is where a wheel or an editable install puts it when this source tree shadows it.
    Raises `NativeLibraryError` if there is none.
    """
    given = os.environ.get(PATH_VARIABLE)
    if given:
        if not _holds_library(Path(given)):
            raise NativeLibraryError(
                f"{PATH_VARIABLE} = {given} holds no {_FILE_NAMES[0]}; "
                "set it to the folder of the patched library, or unset it"
            )
        return Path(given).resolve()
    for folder in _candidates():
        if _holds_library(folder):
            return folder.resolve()
    raise NativeLibraryError(f"the patched llama.cpp library ({_FILE_NAMES[0]}) is not installed; {_REBUILD}")


def _candidates() -> Iterator[Path]:
    yield Path(__file__).parent / "lib"
    for entry in sys.path:
        yield Path(entry or ".") / "swaa_edge" / "lib"


def _holds_library(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILE_NAMES)


def load() -> ModuleType:
    """`llama_cpp`, with the patched library under it; the first call loads and checks both.

    A LLAMA_CPP_LIB_PATH in the environment is meant for other programs: it is set aside while
    `llama_cpp` is imported, and put back. A `llama_cpp` that is imported already is accepted if it
    runs on a patched library of this version, wherever that lies. Raises `NativeLibraryError`.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            imported = getattr(sys.modules.get("llama_cpp.llama_cpp"), "_lib", None)
            if imported is None:
                package = _import_llama_cpp(library_dir())
            else:
                _refuse_foreign(imported)
                package = importlib.import_module("llama_cpp")
            _check_version(package.__version__)
            lib = package.llama_cpp._lib
            _check_abi(lib)
            _declare(lib)
            load_backends(lib, Path(lib._name).parent)
            _loaded = package
        return _loaded


def _import_llama_cpp(folder: Path) -> ModuleType:
    if importlib.util.find_spec("llama_cpp") is None:
        raise NativeLibraryError(f"llama-cpp-python is not installed; {_INSTALL}")
    # Another release can want functions that this library lacks, so its import would already fail. A copy
    # without metadata is checked by its __version__ after the import.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        _check_version(importlib.metadata.version("llama-cpp-python"))
    before = os.environ.get(_LLAMA_CPP_VARIABLE)
    os.environ[_LLAMA_CPP_VARIABLE] = str(folder)
    try:
        return importlib.import_module("llama_cpp")
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        raise NativeLibraryError(f"the library in {folder} does not load: {_one_line(error)}; {_REBUILD}") from error
    finally:
        # Children of this process may be other programs with a llama_cpp of their own.
        if before is None:
            del os.environ[_LLAMA_CPP_VARIABLE]
        else:
            os.environ[_LLAMA_CPP_VARIABLE] = before


def _check_version(version: str) -> None:
    if version != LLAMA_CPP_VERSION:
        raise NativeLibraryError(
            f"llama-cpp-python {version} does not fit the patched library, which needs {LLAMA_CPP_VERSION}; {_INSTALL}"
        )


def _refuse_foreign(lib: ctypes.CDLL) -> None:
    if not hasattr(lib, "llama_swaa_abi_version"):
        raise NativeLibraryError(
            f"llama_cpp was imported first, with another library ({lib._name}); "
            "put `from swaa_edge import SwaaLlama` before every import of llama_cpp"
        )


def _check_abi(lib: ctypes.CDLL) -> None:
    if not hasattr(lib, "llama_swaa_abi_version"):
        raise NativeLibraryError(f"{lib._name} is a llama.cpp without SWAA; {_REBUILD}")
    found = lib.llama_swaa_abi_version()
    if found != ABI_VERSION:
        raise NativeLibraryError(
            f"{lib._name} has version {found} of the SWAA functions, but this swaa-edge needs {ABI_VERSION}; {_REBUILD}"
        )


def _declare(lib: ctypes.CDLL) -> None:
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name, None)
        if function is None:
            raise NativeLibraryError(f"{lib._name} lacks {name}; {_REBUILD}")
        function.restype, function.argtypes = result, arguments


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _lib() -> ctypes.CDLL:
    return load().llama_cpp._lib


def last_error() -> str:
    """Why SWAA refused the last model, context, batch, state or cut of a sequence on this thread; "" if it didn't."""
    return (_lib().llama_swaa_last_error() or b"").decode("utf-8", "replace")


def model_config(model: int) -> ModelConfig | None:
    """The SWAA settings in force in a loaded `llama_model *`; None if SWAA is off for it."""
    head = _CConfig()
    if not _lib().llama_swaa_model_config(model, ctypes.byref(head), None, None, 0):
        return None
    sliding, fa_decode = (ctypes.c_uint8 * head.n_layer)(), (ctypes.c_uint8 * head.n_layer)()
    _lib().llama_swaa_model_config(model, ctypes.byref(head), sliding, fa_decode, head.n_layer)
    return ModelConfig(head.window_size, head.sink_count, tuple(map(bool, sliding)), tuple(map(bool, fa_decode)))


def set_phase(context: int, phase: Phase) -> None:
    """What the tokens of the following llama_decode calls on a `llama_context *` are."""
    if _lib().llama_swaa_set_phase(context, phase) != 0:
        raise ValueError(f"phase {phase!r} must be one of {', '.join(map(str, list(Phase)))}")


def get_policy(context: int) -> Policy:
    """The policy that a `llama_context *` uses; AUTO if SWAA is off in it."""
    return Policy(_lib().llama_swaa_get_policy(context))


def fingerprint(context: int) -> int:
    """The same 64-bit number for contexts of the same model, SWAA settings and encoding of positions: K and V that one
    `llama_context *` computed are valid in another."""
    return _lib().llama_swaa_fingerprint(context)


def can_continue(context: int, sequence: int, position: int) -> bool:
    """If `sequence` were cut so that its next token had `position`, would that token find all the keys it must see?

    Always true without a ring. Where it is false, llama_memory_seq_rm refuses to cut there.
    """
    return _lib().llama_swaa_can_continue(context, sequence, position)


def holds(context: int, sequence: int, start: int, end: int) -> bool:
    """Whether all layers still hold K and V of the tokens of `sequence` at positions from `start` to before `end`."""
    return _lib().llama_swaa_holds(context, sequence, start, end)


def kv_bytes(context: int) -> int:
    """Bytes that a `llama_context *` has allocated for K and V."""
    return _lib().llama_swaa_kv_bytes(context)


def ring_cells(context: int) -> int:
    """Cells of the ring of one stream of a `llama_context *`; 0 if no layer is in a ring."""
    return _lib().llama_swaa_ring_cells(context)


def set_default_policy(policy: Policy) -> None:
    """The policy of contexts made from now on, for comparisons and tests; AUTO chooses per device."""
    if _lib().llama_swaa_set_default_policy(policy) != 0:
        raise ValueError(f"policy {policy!r} must be one of {', '.join(map(str, list(Policy)))}")


class AbortFlag:
    """A flag that stops a running llama_decode from any thread; it returns 2 after the graph node in hand.

    ggml asks its abort callback before every node, a thousand times a token. A Python callback would
    take the interpreter's lock each time, so the callback is C's own `strlen` on a string of one or no
    character: true or false in the register that a bool comes back in, and 3 ns.
    """

    def __init__(self) -> None:
        libc = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
        self._string = ctypes.create_string_buffer(2)
        self._callback = load().llama_cpp.ggml_abort_callback(ctypes.cast(libc.strlen, ctypes.c_void_p).value)

    def attach(self, context: int) -> None:
        """Make a `llama_context *` heed this flag; the flag must outlive it."""
        load().llama_set_abort_callback(context, self._callback, ctypes.addressof(self._string))

    def set(self) -> None:
        """Stop what runs now, and everything that starts, until `clear`."""
        self._string[0] = b"x"

    def clear(self) -> None:
        """Let evaluations run again."""
        self._string[0] = b"\0"

    def __bool__(self) -> bool:
        return self._string[0] != b"\0"
