"""Find the patched llama.cpp library, load it under `llama_cpp`, check it, and wrap our C functions.

Pointers (`llama_model *`, `llama_context *`) are passed as ints, as in llama_cpp.

    from swaa_edge import native
    llama_cpp = native.load(); native.set_decode_from(llm.ctx, 1000)
"""

from __future__ import annotations

import ctypes
import enum
import sys

from swaa_edge.config import SwaaConfig
from swaa_edge.native.abi import CConfig
from swaa_edge.native.library import PATH_VARIABLE, library_dir, load

__all__ = ["PATH_VARIABLE", "library_dir", "load"]


#: A decode boundary: a sequence's only token in a batch decodes, several tokens are prompt.
AUTO = -1
#: A decode boundary that no position reaches: all tokens are prompt.
NEVER = 2**31 - 1


class Policy(enum.IntEnum):
    """How sliding layers are computed: with a block table in the kernel, by gathering K and V for the stock kernel, or
    with a full mask."""

    AUTO = 0
    TABLE = 1
    COPY = 2
    DENSE = 3


def _lib() -> ctypes.CDLL:
    return load().llama_cpp._lib


def last_error() -> str:
    """Return why SWAA last refused something on this thread (a model, context, batch, state or cut of a sequence), or
    "" if it refused nothing."""
    return (_lib().llama_swaa_last_error() or b"").decode("utf-8", "replace")


def model_config(model: int) -> SwaaConfig | None:
    """Return the SWAA settings in force in a `llama_model *`, or None if SWAA is off for this model."""
    head = CConfig()
    if not _lib().llama_swaa_model_config(model, ctypes.byref(head), None, None, 0):
        return None
    sliding, fa_decode = (ctypes.c_uint8 * head.n_layer)(), (ctypes.c_uint8 * head.n_layer)()
    _lib().llama_swaa_model_config(model, ctypes.byref(head), sliding, fa_decode, head.n_layer)
    return SwaaConfig.from_layers(head.window_size, head.sink_count, list(sliding), list(fa_decode), head.tail_count)


def set_decode_from(context: int, position: int, sequence: int = -1) -> None:
    """Set the decode boundary: tokens evaluated from now on at `position` or after it are decode tokens.

    position: a position, `AUTO` or `NEVER`. The tokens of a prompt's tail count as decode tokens here.
    sequence: the sequence whose boundary to set, or -1 for all sequences.
    """
    if _lib().llama_swaa_set_decode_from(context, sequence, position) != 0:
        raise ValueError(f"decode boundary {position} of sequence {sequence} must be -1 or a position of the context")


def get_policy(context: int) -> Policy:
    """Return the policy of a context, or AUTO if SWAA is off in the context."""
    return Policy(_lib().llama_swaa_get_policy(context))


def fingerprint(context: int) -> int:
    """Return a 64-bit number that is equal in two contexts if K and V of one are valid in the other (same model,
    settings, RoPE)."""
    return _lib().llama_swaa_fingerprint(context)


def can_continue(context: int, sequence: int, position: int) -> bool:
    """Return whether `sequence` can be cut at `position`, that is, whether the cache still holds all keys that a token
    at `position` sees."""
    return _lib().llama_swaa_can_continue(context, sequence, position)


def holds(context: int, sequence: int, start: int, end: int) -> bool:
    """Return whether all layers still hold K and V of `sequence` at positions `start` to `end` - 1."""
    return _lib().llama_swaa_holds(context, sequence, start, end)


def kv_bytes(context: int) -> int:
    """Return the number of bytes that a context has allocated for K and V."""
    return _lib().llama_swaa_kv_bytes(context)


def ring_cells(context: int) -> int:
    """Return the number of cells in the ring of one stream, or 0 if no layer has a ring."""
    return _lib().llama_swaa_ring_cells(context)


def set_default_policy(policy: Policy) -> None:
    """Set the policy of all contexts created after this call, for comparisons and tests; AUTO lets each device
    choose."""
    if _lib().llama_swaa_set_default_policy(policy) != 0:
        raise ValueError(f"policy {policy!r} must be one of {', '.join(map(str, list(Policy)))}")


class AbortFlag:
    """A flag that stops a running llama_decode from any thread; llama_decode returns 2 after the current graph node.

    ggml calls its abort callback before every node, a thousand times per token. A Python callback would take the
    interpreter's lock each time. So the callback is C's own `strlen`, on a string of zero or one characters. ggml takes
    its result, 0 or 1, as false or true, and a call takes 3 ns.
    """

    def __init__(self) -> None:
        libc = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
        self._string = ctypes.create_string_buffer(2)
        self._callback = load().llama_cpp.ggml_abort_callback(ctypes.cast(libc.strlen, ctypes.c_void_p).value)

    def attach(self, context: int) -> None:
        """Make a `llama_context *` stop on this flag; the flag must outlive the context."""
        load().llama_set_abort_callback(context, self._callback, ctypes.addressof(self._string))

    def set(self) -> None:
        """Stop the current evaluation, and any evaluation that starts before `clear`."""
        self._string[0] = b"x"

    def clear(self) -> None:
        """Let evaluations run again."""
        self._string[0] = b"\0"

    def __bool__(self) -> bool:
        return self._string[0] != b"\0"
