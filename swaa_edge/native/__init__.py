"""Loads the patched llama.cpp library for `llama_cpp`, and wraps the C functions of SWAA.

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


#: The default decode boundary. A sequence with one token in the batch decodes. Several tokens are prompt.
AUTO = -1
#: The decode boundary after all positions. All tokens are prompt.
NEVER = 2**31 - 1


class Policy(enum.IntEnum):
    """How sliding layers skip the keys that the window hides."""

    AUTO = 0  # the best policy that each device supports
    TABLE = 1  # the kernel reads a block table
    COPY = 2  # K and V are gathered for the stock kernel
    DENSE = 3  # a mask over the whole KV cache


def _lib() -> ctypes.CDLL:
    return load().llama_cpp._lib


def last_error() -> str:
    """Return the reason of SWAA's last refusal on this thread, or "" if there was none.

    SWAA can refuse a model, a context, a batch, a state or the cut of a sequence.
    """
    return (_lib().llama_swaa_last_error() or b"").decode("utf-8", "replace")


def model_config(model: int) -> SwaaConfig | None:
    """Return the SWAA settings in force in a `llama_model *`, or None if SWAA is off."""
    head = CConfig()
    if not _lib().llama_swaa_model_config(model, ctypes.byref(head), None, None, 0):
        return None
    sliding, fa_decode = (ctypes.c_uint8 * head.n_layer)(), (ctypes.c_uint8 * head.n_layer)()
    _lib().llama_swaa_model_config(model, ctypes.byref(head), sliding, fa_decode, head.n_layer)
    return SwaaConfig.from_layers(head.window_size, head.sink_count, list(sliding), list(fa_decode), head.tail_count)


def set_decode_from(context: int, position: int, sequence: int = -1) -> None:
    """Set the decode boundary. In later evaluations, the tokens from `position` on are decode tokens.

    position: a position, `AUTO` or `NEVER`. For a prompt with a tail, give the position of the first tail token.
    sequence: number of the sequence, or -1 for all sequences.
    """
    if _lib().llama_swaa_set_decode_from(context, sequence, position) != 0:
        raise ValueError(f"decode boundary {position} of sequence {sequence} must be -1 or a position of the context")


def get_policy(context: int) -> Policy:
    """Return the policy of a context. AUTO if SWAA is off."""
    return Policy(_lib().llama_swaa_get_policy(context))


def fingerprint(context: int) -> int:
    """Return a 64-bit number for the model, the SWAA settings and RoPE.

    If two contexts have the same number, K and V of one context are valid in the other.
    """
    return _lib().llama_swaa_fingerprint(context)


def can_continue(context: int, sequence: int, position: int) -> bool:
    """Return whether `sequence` can be cut at `position`.

    The KV cache must still hold all keys that a token at `position` sees.
    """
    return _lib().llama_swaa_can_continue(context, sequence, position)


def holds(context: int, sequence: int, start: int, end: int) -> bool:
    """Return whether all layers still hold K and V of `sequence` at positions `start` to `end` - 1."""
    return _lib().llama_swaa_holds(context, sequence, start, end)


def kv_bytes(context: int) -> int:
    """Return how many bytes a context has allocated for K and V."""
    return _lib().llama_swaa_kv_bytes(context)


def ring_cells(context: int) -> int:
    """Return the number of cells in the ring of one stream, or 0 if no layer has a ring."""
    return _lib().llama_swaa_ring_cells(context)


def set_default_policy(policy: Policy) -> None:
    """Set the policy of all contexts created after this call. For comparisons and tests."""
    if _lib().llama_swaa_set_default_policy(policy) != 0:
        raise ValueError(f"policy {policy!r} must be one of {', '.join(map(str, list(Policy)))}")


class AbortFlag:
    """A flag that stops a running llama_decode. Any thread can set the flag.

    llama_decode then returns 2 after the current graph node.

    ggml calls the abort callback before every graph node, a thousand times per token. A Python callback would take the
    interpreter's lock each time. So the callback is C's `strlen`, and the flag is a string of 0 or 1 characters. ggml
    reads the length as false or true. One call takes 3 ns.
    """

    def __init__(self) -> None:
        libc = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
        self._string = ctypes.create_string_buffer(2)
        self._callback = load().llama_cpp.ggml_abort_callback(ctypes.cast(libc.strlen, ctypes.c_void_p).value)

    def attach(self, context: int) -> None:
        """Make a `llama_context *` stop on this flag. The flag must outlive the context."""
        load().llama_set_abort_callback(context, self._callback, ctypes.addressof(self._string))

    def set(self) -> None:
        """Stop the current evaluation, and all later evaluations until `clear`."""
        self._string[0] = b"x"

    def clear(self) -> None:
        """Let evaluations run again."""
        self._string[0] = b"\0"

    def __bool__(self) -> bool:
        return self._string[0] != b"\0"
