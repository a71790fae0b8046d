"""Find the patched llama.cpp library, load it under `llama_cpp`, and check the library and `llama_cpp`.

The published llama-cpp-python loads any library that it is given. But the ctypes declarations in llama-cpp-python fit
only one version of llama.cpp. With another version, C code would not fail but read past the end of structs. So this
module first checks that the library and llama-cpp-python fit each other.

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
#: Environment variable: the folder of the library, instead of those that are searched.
PATH_VARIABLE = "SWAA_EDGE_LIB_PATH"
# The environment variable from which llama_cpp itself takes the folder.
_LLAMA_CPP_VARIABLE = "LLAMA_CPP_LIB_PATH"

_FILE_NAMES = {"win32": ("llama.dll", "libllama.dll"), "darwin": ("libllama.dylib", "libllama.so")}.get(
    sys.platform, ("libllama.so",)
)
_INSTALL = f"pip install llama-cpp-python=={LLAMA_CPP_VERSION}"
_PACKAGE = Path(__file__).parent.parent

_lock = threading.RLock()
_loaded: ModuleType | None = None


def library_dir() -> Path:
    """Return the folder that holds the patched library and its backends.

    The folder is the value of SWAA_EDGE_LIB_PATH if this variable is set, else `lib` in this package, else
    `swaa_edge/lib` in an entry of sys.path. sys.path is searched because this source tree may shadow an installed
    swaa-edge that has the library. Raises `NativeLibraryError` if there is no such folder.
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
    """Return `llama_cpp`, running on the patched library; the first call loads and checks the library and `llama_cpp`.

    The environment variable LLAMA_CPP_LIB_PATH is for other programs, so it is removed while `llama_cpp` is imported,
    and restored afterwards. A `llama_cpp` that was imported before is accepted if it uses a patched library of this
    version, in any folder. Raises `NativeLibraryError`.
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
    # Another release may need functions that this library lacks, so its import would already fail. A copy
    # without metadata is checked by its __version__ after the import.
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
        # Child processes may be other programs with a llama_cpp of their own.
        del os.environ[_LLAMA_CPP_VARIABLE]
        if before is not None:
            os.environ[_LLAMA_CPP_VARIABLE] = before


def _check_version(version: str) -> None:
    if version != LLAMA_CPP_VERSION:
        raise NativeLibraryError(
            f"llama-cpp-python {version} does not fit the patched library, which needs {LLAMA_CPP_VERSION}; {_INSTALL}"
        )
