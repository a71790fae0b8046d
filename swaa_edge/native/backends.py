"""Loads ggml's backends from separate files, without AMX backends that would kill the process.

A wheel has one CPU backend per processor generation. ggml loads the best backend that the processor claims to support.
Some processors report AMX, but the kernel or the virtual machine forbids AMX. The first tile instruction then kills the
process with SIGILL. So a child process tries the AMX instructions first.

    load_backends(llama_cpp.llama_cpp._lib, folder)
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import mmap
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from swaa_edge.errors import NativeLibraryError

# enum ggml_backend_dev_type
_DEVICE_CPU = 0
# ggml_backend_score() of an x86 CPU backend is 1 plus one bit per feature. The bit of AMX, 1 << 11, is the highest.
_AMX_SCORE = 1 << 11
# The arch_prctl call that requests the tile registers from Linux. ggml makes the same call.
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
# ldtilecfg (%rdi); tilezero %tmm0, %tmm1, %tmm2; tdpbssd %tmm2, %tmm1, %tmm0; tilerelease; ret
_TILE_CODE = bytes.fromhex("c4e2784907 c4e27b49c0 c4e27b49c8 c4e27b49d0 c4e26b5ec1 c4e27849c0 c3")


def load_backends(lib: ctypes.CDLL, folder: Path, amx_works: Callable[[], bool] | None = None) -> None:
    """Load the backends in `folder`. If the library has a built-in CPU backend, nothing is loaded.

    folder: folder of the library.
    amx_works: function that returns whether AMX instructions run on this machine. Called only if a backend would use
        AMX.

    Raises `NativeLibraryError` if no CPU backend in `folder` runs on this processor.
    """
    ggml = _ggml(lib, folder)
    if ggml.ggml_backend_dev_by_type(_DEVICE_CPU):
        return
    works = amx_works or tile_instructions_work
    amx = amx_backends(folder)
    with _without(folder, amx) if amx and not works() else contextlib.nullcontext(folder) as chosen, _quiet():
        ggml.ggml_backend_load_all_from_path(os.fspath(chosen).encode())
    if not ggml.ggml_backend_dev_by_type(_DEVICE_CPU):
        raise NativeLibraryError(
            f"no CPU backend in {folder} runs on this processor ({platform.machine()}); "
            "build swaa-edge from source on this machine"
        )


def _ggml(lib: ctypes.CDLL, folder: Path) -> ctypes.CDLL:
    # On Windows, only ggml.dll gives access to ggml's symbols. Elsewhere, libllama does too.
    ggml = ctypes.CDLL(str(folder / "ggml.dll")) if sys.platform == "win32" else lib
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]
    ggml.ggml_backend_load_all_from_path.restype = None
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    return ggml


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Until the first model sets the log level, llama_cpp prints all log lines, such as the name of each backend.
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def amx_backends(folder: Path) -> list[Path]:
    """Return the CPU backends in `folder` that would use AMX on this processor. Only for x86 Linux, else []."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "amd64"):
        return []
    return [path for path in sorted(folder.glob("libggml-cpu-*.so")) if _score(path) > _AMX_SCORE]


def _score(path: Path) -> int:
    """Return ggml's score of a backend file, or 0 if the backend doesn't run on this processor."""
    import _ctypes

    try:
        backend = ctypes.CDLL(str(path))
    except OSError:
        return 0
    try:
        return backend.ggml_backend_score() if hasattr(backend, "ggml_backend_score") else 0
    finally:
        _ctypes.dlclose(backend._handle)


@contextlib.contextmanager
def _without(folder: Path, left_out: list[Path]) -> Iterator[Path]:
    """Yield a folder of links to the backends in `folder`, without `left_out`."""
    with tempfile.TemporaryDirectory(prefix="swaa-edge-backends-") as links:
        for path in folder.glob("libggml*.so"):
            if path not in left_out:
                (Path(links) / path.name).symlink_to(path.resolve())
        yield Path(links)


def tile_instructions_work() -> bool:
    """Return whether AMX tile instructions run in a child process. False if the attempt itself is impossible.

    If the kernel denies the tile registers, the result is True, because ggml then doesn't use AMX.
    """
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:  # the system forbids memory that is writable and executable
        return False
    code.write(_TILE_CODE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(code))
    run_tiles = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(start)
    # Palette 1. Tiles 0 to 2 have 16 rows of 64 bytes.
    tiles = bytes([1]) + bytes(15) + b"\x40\x00" * 3 + bytes(26) + bytes([16] * 3) + bytes(13)

    def use_tiles() -> None:
        if ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0:
            run_tiles(tiles)

    return survives(use_tiles)


def survives(work: Callable[[], object]) -> bool:
    """Return whether a forked child runs `work` without an exception or a crash. False if the fork fails.

    A new interpreter is not always possible. In a program that embeds Python, sys.executable is not Python.
    """
    try:
        with warnings.catch_warnings():
            # Python warns about a fork in a program with threads. This child only runs `work` and ends.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
    except OSError:
        return False
    if child == 0:
        code = 1
        try:
            _die_quietly()
            work()
            code = 0
        finally:
            os._exit(code)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    except ChildProcessError:  # if the program ignores SIGCHLD, a child leaves no exit status
        return False


def _die_quietly() -> None:
    """Turn off tracebacks and core files. A crash of this process is expected."""
    import resource

    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
