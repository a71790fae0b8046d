"""Version and signatures of the C functions that the patched library exports.

patches/src/include/llama-swaa.h declares the functions. This module repeats the declarations for ctypes.

    check(lib); declare(lib)
"""

from __future__ import annotations

import ctypes

from swaa_edge.errors import NativeLibraryError

#: Version of the `llama_swaa_*` functions below.
ABI_VERSION = 3
#: Advice for error messages.
REBUILD = "run `make setup` in the source tree, or reinstall swaa-edge"


class CConfig(ctypes.Structure):
    """struct llama_swaa_config"""

    _fields_ = [(name, ctypes.c_uint32) for name in ("enabled", "window_size", "sink_count", "n_layer", "tail_count")]


# name: (result, arguments)
_FUNCTIONS = {
    "llama_swaa_abi_version": (ctypes.c_uint32, []),
    "llama_swaa_last_error": (ctypes.c_char_p, []),
    "llama_swaa_model_config": (
        ctypes.c_bool,
        [ctypes.c_void_p, ctypes.POINTER(CConfig), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32],
    ),
    "llama_swaa_set_decode_from": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    "llama_swaa_get_policy": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_swaa_fingerprint": (ctypes.c_uint64, [ctypes.c_void_p]),
    "llama_swaa_can_continue": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    "llama_swaa_holds": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
    "llama_swaa_kv_bytes": (ctypes.c_uint64, [ctypes.c_void_p]),
    "llama_swaa_ring_cells": (ctypes.c_uint32, [ctypes.c_void_p]),
    "llama_swaa_set_default_policy": (ctypes.c_int32, [ctypes.c_int32]),
}


def check(lib: ctypes.CDLL) -> None:
    """Raise `NativeLibraryError` if a library lacks the SWAA functions, or has another version than `ABI_VERSION`."""
    if not hasattr(lib, "llama_swaa_abi_version"):
        raise NativeLibraryError(f"{lib._name} is a llama.cpp without SWAA; {REBUILD}")
    found = lib.llama_swaa_abi_version()
    if found != ABI_VERSION:
        raise NativeLibraryError(
            f"{lib._name} has version {found} of the SWAA functions, but this swaa-edge needs {ABI_VERSION}; {REBUILD}"
        )


def declare(lib: ctypes.CDLL) -> None:
    """Set the ctypes signatures of the SWAA functions. Raises `NativeLibraryError` if a function is missing."""
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name, None)
        if function is None:
            raise NativeLibraryError(f"{lib._name} lacks {name}; {REBUILD}")
        function.restype, function.argtypes = result, arguments
