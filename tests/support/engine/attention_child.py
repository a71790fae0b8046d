"""The child process of `attention_op.Kernels`: one attention op at a time, by ggml's C functions.

A process of its own because a library reads GGML_CPU_FATTN once, two libraries cannot share a process, and a crash in C
must end this one only.

Use: not by hand; Kernels runs `python -m support.engine.attention_child FOLDER` with the folder of the library.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

from support.engine.protocol import claim_stdout, serve

# enum ggml_type
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "i32": 26, "bf16": 30}
CPU = 0  # enum ggml_backend_dev_type
SUCCESS = 0  # enum ggml_status


class InitParams(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


# name: (result, arguments)
FUNCTIONS = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_4d": (c_void_p, [c_void_p, c_int] + [c_int64] * 4),
    "ggml_view_4d": (c_void_p, [c_void_p, c_void_p] + [c_int64] * 4 + [c_size_t] * 4),
    "ggml_permute": (c_void_p, [c_void_p, c_void_p] + [c_int] * 4),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_flash_attn_ext": (c_void_p, [c_void_p] * 5 + [c_float] * 3),
    "ggml_flash_attn_ext_add_sinks": (None, [c_void_p] * 2),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_backend_dev_by_type": (c_void_p, [c_int]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, ctypes.c_char_p]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, ctypes.c_char_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p] * 2),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p] * 2),
}
OURS = {"ggml_flash_attn_ext_set_kv_blocks": (None, [c_void_p] * 2)}  # not in an unpatched library


class Child:
    """ggml and its CPU backend."""

    def __init__(self, folder: Path):
        from swaa_edge.native.backends import load_backends

        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        self.ggml = ctypes.CDLL(str(folder / f"libggml{suffix}"))
        load_backends(self.ggml, folder)
        for name, (result, arguments) in (FUNCTIONS | OURS).items():
            if name in OURS and not hasattr(self.ggml, name):
                continue
            function = getattr(self.ggml, name)
            function.restype, function.argtypes = result, arguments
        device = self.device = self.ggml.ggml_backend_dev_by_type(CPU)
        self.backend = self.ggml.ggml_backend_dev_init(device, None)
        registry = self.ggml.ggml_backend_dev_backend_reg(device)
        address = self.ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        self.set_threads = ctypes.CFUNCTYPE(None, c_void_p, c_int)(address)

    def quantize(self, kind: str, values: np.ndarray) -> dict:
        """float32 [..., n] to uint8 [..., bytes], row by row."""
        values = np.ascontiguousarray(values, np.float32)
        *outer, n = values.shape
        rows = values.size // n
        raw = np.empty((*outer, self.ggml.ggml_row_size(TYPES[kind], n)), np.uint8)
        even = np.ones(n, np.float32)  # equal weights
        written = self.ggml.ggml_quantize_chunk(
            TYPES[kind], values.ctypes.data, raw.ctypes.data, 0, rows, n, even.ctypes.data
        )
        if written != raw.nbytes:
            raise RuntimeError(f"{kind}: {written} bytes written, expected {raw.nbytes}")
        return {"raw": raw}

    def attend(self, case: dict, tensors: dict, threads: int, runs: int) -> dict:
        """Run the op of the case on `threads` threads, `runs` times; see attention_op.OpCase.tensors for the inputs."""
        size = sum(x.nbytes for x in tensors.values() if x is not None)
        q = tensors["q"]
        out = np.empty((*q.shape[:3], case["dv"]), np.float32)
        self.ctx = self.ggml.ggml_init(InitParams(size + out.nbytes + (1 << 20), None, False))
        try:
            op = self._op(case, tensors)
            graph = self.ggml.ggml_new_graph(self.ctx)
            self.ggml.ggml_build_forward_expand(graph, op)
            self.set_threads(self.backend, threads)
            if self.ggml.ggml_nbytes(op) != out.nbytes:
                raise RuntimeError(f"the op gives {self.ggml.ggml_nbytes(op)} bytes, expected {out.nbytes}")
            results = []
            for _ in range(runs):
                ctypes.memset(self.ggml.ggml_get_data(op), 0xFF, out.nbytes)  # NaN where nothing is written
                status = self.ggml.ggml_backend_graph_compute(self.backend, graph)
                if status != SUCCESS:
                    raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
                ctypes.memmove(out.ctypes.data, self.ggml.ggml_get_data(op), out.nbytes)
                results.append(out.copy())
            return {"out": results, "supported": self.ggml.ggml_backend_dev_supports_op(self.device, op)}
        finally:
            self.ggml.ggml_free(self.ctx)

    def _op(self, case: dict, tensors: dict) -> int:
        ggml, ctx = self.ggml, self.ctx
        streams, tokens, n_heads, dk = tensors["q"].shape
        q = self._tensor("f32", (dk, n_heads, tokens, streams), tensors["q"])
        q = ggml.ggml_permute(ctx, q, 0, 2, 1, 3)
        k = self._tensor(case["k"], (dk, *reversed(tensors["k"].shape[:3])), tensors["k"])
        if case["v_in_k"]:
            shape = (case["dv"], *reversed(tensors["k"].shape[:3]))
            v = ggml.ggml_view_4d(ctx, k, *shape, *reversed(tensors["k"].strides[:3]), 0)
        else:
            shape = (case["dv"], *reversed(tensors["v"].shape[:3]))
            v = self._tensor(case["v"] or case["k"], shape, tensors["v"])
        if case["cells"] == "tokens":
            k, v = (ggml.ggml_permute(ctx, x, 0, 2, 1, 3) for x in (k, v))
        mask, sinks, table = tensors["mask"], tensors["sinks"], tensors["table"]
        if mask is not None:
            mask = self._tensor("f16", tuple(reversed(mask.shape)), mask)
        op = ggml.ggml_flash_attn_ext(ctx, q, k, v, mask, case["scale"], case["alibi"], case["softcap"])
        if sinks is not None:
            ggml.ggml_flash_attn_ext_add_sinks(op, self._tensor("f32", (sinks.size, 1, 1, 1), sinks))
        if table is not None:
            table = self._tensor("i32", (table.shape[1], 1, 1, table.shape[0]), table)
            ggml.ggml_flash_attn_ext_set_kv_blocks(op, table)
        return op

    def _tensor(self, kind: str, shape: tuple, values: np.ndarray) -> int:
        """A new tensor with these bytes. shape: in ggml's order, the fastest axis first."""
        tensor = self.ggml.ggml_new_tensor_4d(self.ctx, TYPES[kind], *shape)
        values = np.ascontiguousarray(values)
        if self.ggml.ggml_nbytes(tensor) != values.nbytes:
            raise RuntimeError(f"{kind} {shape}: {values.nbytes} bytes given for {self.ggml.ggml_nbytes(tensor)}")
        ctypes.memmove(self.ggml.ggml_get_data(tensor), values.ctypes.data, values.nbytes)
        return tensor


if __name__ == "__main__":
    out = claim_stdout()
    serve(Child(Path(sys.argv[1])), out)
