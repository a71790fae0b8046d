"""The calls of an open context: one method per C function, each returning the function's result.

Runs in the child process of `Engine`, over ctypes; nothing here decides whether a result is correct.

Use: `calls = Calls(api, swaa=True, context=ctx, vocab=768); calls.seq_rm(0, 40, -1)`
"""

from __future__ import annotations

import ctypes
import os

import numpy as np

# Decode boundaries that give all tokens one phase.
PHASES = {"auto": -1, "prefill": 2**31 - 1, "decode": 0}
# LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: only the ring's part of the state.
PARTIAL_ONLY = 1

_CONTEXT, _U32, _U64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64
# Functions that came with the ring: (result, arguments).
_RING_FUNCTIONS = {
    "fingerprint": (_U64, [_CONTEXT]),
    "can_continue": (ctypes.c_bool, [_CONTEXT, ctypes.c_int32, ctypes.c_int32]),
    "kv_bytes": (_U64, [_CONTEXT]),
    "ring_cells": (_U32, [_CONTEXT]),
}


def last_error(api, swaa: bool) -> str:
    return (api._lib.llama_swaa_last_error() or b"").decode("utf-8", "replace") if swaa else ""


class Calls:
    """A llama_context and the functions that take it. Sequence None in the state functions: the whole context."""

    def __init__(self, api, swaa: bool, context, vocab: int):
        self.api, self.swaa, self.ctx, self.vocab = api, swaa, context, vocab
        self.memory = api.llama_get_memory(context)

    def last_error(self) -> str:
        """The reason of SWAA's last refusal on this thread; "" if there was none."""
        return last_error(self.api, self.swaa)

    def decode_from(self, seq: int, position: int) -> int:
        if not self.swaa:
            raise RuntimeError("the library has no SWAA, so it takes no decode boundary")
        function = self.api._lib.llama_swaa_set_decode_from
        function.argtypes = [_CONTEXT, ctypes.c_int32, ctypes.c_int32]
        return function(self.ctx, seq, position)

    def phase(self, name: str) -> int:
        return self.decode_from(-1, PHASES[name])

    def threads(self, n: int) -> None:
        self.api.llama_set_n_threads(self.ctx, n, n)

    def decode(self, entries: list, phase: str | None = None) -> tuple[int, np.ndarray | None]:
        """entries: (token, position, sequence ids, want logits). Returns the code, and if it is 0 the logits of the
        rows with want logits in batch order, float32 [rows, vocab]."""
        if phase is not None and self.phase(phase) != 0:
            raise RuntimeError(f"phase {phase} refused")
        owners = max(len(seqs) for _, _, seqs, _ in entries)
        batch = self.api.llama_batch_init(len(entries), 0, owners)
        try:
            batch.n_tokens = len(entries)
            for i, (token, position, seqs, want) in enumerate(entries):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, len(seqs), want
                for k, seq in enumerate(seqs):
                    batch.seq_id[i][k] = seq
            code = self.api.llama_decode(self.ctx, batch)
        finally:
            self.api.llama_batch_free(batch)
        if code != 0:
            return code, None
        shape = (sum(bool(want) for *_, want in entries), self.vocab)
        if not shape[0]:
            return code, np.zeros(shape, np.float32)
        return code, np.ctypeslib.as_array(self.api.llama_get_logits(self.ctx), shape).copy()

    def decode_plain(self, tokens: list) -> tuple[int, np.ndarray | None]:
        """llama_batch_get_one; the logits of the last token, float32 [1, vocab]."""
        array = (self.api.llama_token * len(tokens))(*tokens)
        code = self.api.llama_decode(self.ctx, self.api.llama_batch_get_one(array, len(tokens)))
        if code != 0:
            return code, None
        pointer = self.api.llama_get_logits_ith(self.ctx, -1)
        return code, np.ctypeslib.as_array(pointer, (1, self.vocab)).copy()

    def clear(self) -> None:
        self.api.llama_memory_clear(self.memory, True)

    def seq_rm(self, seq: int, p0: int, p1: int) -> bool:
        return bool(self.api.llama_memory_seq_rm(self.memory, seq, p0, p1))

    def seq_cp(self, source: int, target: int, p0: int, p1: int) -> None:
        self.api.llama_memory_seq_cp(self.memory, source, target, p0, p1)

    def seq_keep(self, seq: int) -> None:
        self.api.llama_memory_seq_keep(self.memory, seq)

    def seq_add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        self.api.llama_memory_seq_add(self.memory, seq, p0, p1, delta)

    def seq_div(self, seq: int, p0: int, p1: int, d: int) -> None:
        self.api.llama_memory_seq_div(self.memory, seq, p0, p1, d)

    def range_of(self, seq: int) -> tuple[int, int]:
        """The first and last position of a sequence; (-1, -1) if it is empty."""
        return (
            self.api.llama_memory_seq_pos_min(self.memory, seq),
            self.api.llama_memory_seq_pos_max(self.memory, seq),
        )

    def ranges(self, n_sequences: int) -> list[tuple[int, int]]:
        return [self.range_of(seq) for seq in range(n_sequences)]

    def can_shift(self) -> bool:
        return bool(self.api.llama_memory_can_shift(self.memory))

    def state_get(self, seq: int | None = None, flags: int = 0) -> bytes:
        if seq is None:
            size = self.api.llama_state_get_size(self.ctx)
            data = (ctypes.c_uint8 * size)()
            written = self.api.llama_state_get_data(self.ctx, data, size)
        else:
            size = self.api.llama_state_seq_get_size_ext(self.ctx, seq, flags)
            data = (ctypes.c_uint8 * size)()
            written = self.api.llama_state_seq_get_data_ext(self.ctx, data, size, seq, flags)
        return bytes(data)[:written]

    def state_set(self, state: bytes, seq: int | None = None, flags: int = 0) -> int:
        """Bytes read; 0 is a refusal."""
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if seq is None:
            return self.api.llama_state_set_data(self.ctx, data, len(state))
        return self.api.llama_state_seq_set_data_ext(self.ctx, data, len(state), seq, flags)

    def file_save(self, path: str, seq: int | None, tokens: list) -> int:
        array = (self.api.llama_token * max(len(tokens), 1))(*tokens)
        if seq is None:
            return int(self.api.llama_state_save_file(self.ctx, path.encode(), array, len(tokens)))
        return self.api.llama_state_seq_save_file(self.ctx, path.encode(), seq, array, len(tokens))

    def file_load(self, path: str, seq: int | None, capacity: int = 4096) -> tuple[int, list[int]]:
        """The function's result (0: refused), and the tokens it read."""
        array, count = (self.api.llama_token * capacity)(), ctypes.c_size_t(0)
        if seq is None:
            got = self.api.llama_state_load_file(self.ctx, path.encode(), array, capacity, ctypes.byref(count))
        else:
            got = self.api.llama_state_seq_load_file(self.ctx, path.encode(), seq, array, capacity, ctypes.byref(count))
        return int(got), list(array[: count.value]) if got else []

    def fingerprint(self) -> int:
        return self._ring("fingerprint")(self.ctx)

    def can_continue(self, seq: int, position: int) -> bool:
        return self._ring("can_continue")(self.ctx, seq, position)

    def kv_bytes(self) -> int:
        return self._ring("kv_bytes")(self.ctx)

    def ring_cells(self) -> int:
        return self._ring("ring_cells")(self.ctx)

    def abort(self) -> None:
        os.abort()

    def _ring(self, name: str):
        function = getattr(self.api._lib, f"llama_swaa_{name}")
        function.restype, function.argtypes = _RING_FUNCTIONS[name]
        return function
