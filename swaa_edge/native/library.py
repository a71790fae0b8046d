"""Finds the patched llama.cpp library, and imports `llama_cpp` with the patched library.

llama-cpp-python loads any library, but the ctypes declarations fit only one version of llama.cpp. With another version,
C code would read past the end of structs without an error. So this module checks both versions.

    llama_cpp = load()
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from swaa_edge.errors import NativeLibraryError
from swaa_edge.native import abi
from swaa_edge.native.abi import REBUILD
from swaa_edge.native.backends import load_backends

#: The one release of llama-cpp-python whose struct declarations match the library.
LLAMA_CPP_VERSION = "0.3.36"
#: Environment variable with the folder of the library. If set, no other folder is searched.
PATH_VARIABLE = "SWAA_EDGE_LIB_PATH"
# Environment variable with the folder in which llama_cpp looks for a library.
_LLAMA_CPP_VARIABLE = "LLAMA_CPP_LIB_PATH"

_FILE_NAMES = {"win32": ("llama.dll", "libllama.dll"), "darwin": ("libllama.dylib", "libllama.so")}.get(
    sys.platform, ("libllama.so",)
)
_INSTALL = f"pip install llama-cpp-python=={LLAMA_CPP_VERSION}"
_PACKAGE = Path(__file__).parent.parent

_lock = threading.RLock()
_loaded: ModuleType | None = None


def library_dir() -> Path:
    """Return the folder that holds the patched library and the backends.

    If SWAA_EDGE_LIB_PATH names a folder, only that folder is tried. Otherwise, `lib` in this package is tried first.
    Then `swaa_edge/lib` is tried in each entry of sys.path, because a source tree may shadow an installed swaa-edge.

    Raises `NativeLibraryError` if no folder holds the library.
    """
    given = os.environ.get(PATH_VARIABLE)
    if given:
        if not _holds_library(Path(given)):
            raise NativeLibraryError(
                f"{PATH_VARIABLE} = {given} does not contain {_FILE_NAMES[0]}; "
                "set it to the folder of the patched library, or unset it"
            )
        return Path(given).resolve()
    for folder in _candidates():
        if _holds_library(folder):
            return folder.resolve()
    raise NativeLibraryError(f"the patched llama.cpp library ({_FILE_NAMES[0]}) is not installed; {REBUILD}")


def _candidates() -> Iterator[Path]:
    yield _PACKAGE / "lib"
    for entry in sys.path:
        yield Path(entry or ".") / "swaa_edge" / "lib"


def _holds_library(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILE_NAMES)


def load() -> ModuleType:
    """Return `llama_cpp` with the patched library. The first call imports and checks both.

    The environment variable LLAMA_CPP_LIB_PATH is ignored. If `llama_cpp` was imported before, a patched library of
    this version in any folder is accepted.

    Raises `NativeLibraryError` if `llama_cpp` or the library is missing or unsuitable.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            imported = getattr(sys.modules.get("llama_cpp.llama_cpp"), "_lib", None)
            if imported is None:
                package = _import_llama_cpp(library_dir())
            else:
                if not hasattr(imported, "llama_swaa_abi_version"):
                    raise NativeLibraryError(
                        f"llama_cpp was imported first, with another library ({imported._name}); "
                        "put `from swaa_edge import SwaaLlama` before every import of llama_cpp"
                    )
                package = importlib.import_module("llama_cpp")
            _check_version(package.__version__)
            lib = package.llama_cpp._lib
            abi.check(lib)
            abi.declare(lib)
            load_backends(lib, Path(lib._name).parent)
            _loaded = package
        return _loaded


def _import_llama_cpp(folder: Path) -> ModuleType:
    if importlib.util.find_spec("llama_cpp") is None:
        raise NativeLibraryError(f"llama-cpp-python is not installed; {_INSTALL}")
    # Check the version first: the import of another release can fail, because the library may lack functions. A copy
    # without metadata is checked after the import.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        _check_version(importlib.metadata.version("llama-cpp-python"))
    before = os.environ.get(_LLAMA_CPP_VARIABLE)
    os.environ[_LLAMA_CPP_VARIABLE] = str(folder)
    try:
        return importlib.import_module("llama_cpp")
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise NativeLibraryError(f"the library in {folder} can't be loaded: {why}; {REBUILD}") from error
    finally:
        # A child process may be another program with another llama_cpp.
        del os.environ[_LLAMA_CPP_VARIABLE]
        if before is not None:
            os.environ[_LLAMA_CPP_VARIABLE] = before


def _check_version(version: str) -> None:
    if version != LLAMA_CPP_VERSION:
        raise NativeLibraryError(
            f"llama-cpp-python {version} does not fit the patched library, which needs {LLAMA_CPP_VERSION}; {_INSTALL}"
        )
