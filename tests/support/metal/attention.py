"""Compares flash attention in the emulator with plain attention in float64, which has neither tables nor kernels.

Why: the reference uses only positions and the definition of the sliding window. The kernel's inputs are derived from
them: blocks of the cache at random places, NaN in every block that the table does not name, a mask only as wide as the
table's masked columns. So reading a row from a wrong place is an error that no bound hides.

    failures = attention.check(library, [Case(type="q8_0", n_q=65, window=300, sinks=64)])

The cases run in a child process (this file, as a program), because the emulator ends its process on an error.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from support import module_environment

BLOCK = 256
GGML_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}
MAX_NMSE = 5e-4  # upstream's for this op


@dataclass(frozen=True)
class Case:
    """Shapes, mask and options of one call. The tokens are the last n_q of `kv` positions, 17 fewer per stream."""

    type: str = "f16"
    dk: int = 128
    dv: int = 128
    heads: int = 1  # KV heads
    gqa: int = 2  # query heads per KV head
    kv: int = 1024
    n_q: int = 1
    streams: int = 1
    mask: bool = True
    window: int = 0  # 0: causal
    sinks: int = 0
    table: bool = False
    pad: int = 0  # entries that only pad the table
    past: bool = False  # causal with a table: the blocks before the tokens come last, without a mask
    logit_sinks: bool = False
    max_bias: float = 0.0
    softcap: float = 0.0
    vec: tuple[int, int] = (0, 0)  # queries and elements of the vector kernel; 0: upstream's choice
    n_kv_max: int = 0
    blind_row: bool = False  # one query that sees none of the masked columns
    reverse: bool = False  # simdgroups run in reverse order

    @property
    def n_heads(self) -> int:
        return self.heads * self.gqa

    def positions(self, stream: int) -> np.ndarray:
        return self.kv - self.n_q - 17 * stream + np.arange(self.n_q)


class _Call(ctypes.Structure):
    """struct attention in host.cpp"""

    _fields_ = (
        [(n, ctypes.c_int32) for n in ("type_k", "type_v")]
        + [(n, ctypes.c_int64) for n in ("dk", "dv", "n_head_kv", "gqa", "kv", "n_q", "n_stream")]
        + [(n, ctypes.c_int64) for n in ("mask_cols", "n_blocks", "n_kv_max")]
        + [(n, ctypes.c_float) for n in ("scale", "max_bias", "softcap")]
        + [(n, ctypes.c_int32) for n in ("vec_q", "vec_ne", "reverse_simdgroups")]
        + [(n, ctypes.c_void_p) for n in ("q", "k", "v", "mask", "table", "sinks", "out")]
    )


def visible(case: Case, stream: int) -> np.ndarray:
    """bool [n_q, kv]: the positions that each query sees, by definition."""
    p, j = case.positions(stream)[:, None], np.arange(case.kv)[None, :]
    if not case.mask:
        return np.ones((case.n_q, case.kv), bool)
    see = (j <= p) & ((p - j < case.window) | (j < case.sinks) | (case.window == 0))
    if case.blind_row:
        see[3] &= j[0] < BLOCK * unmasked_blocks(case)
    return see


def bias(case: Case, stream: int) -> np.ndarray:
    """float [n_q, kv]: the mask's values at visible positions; not 0 with ALiBi, which scales them."""
    p, j = case.positions(stream)[:, None], np.arange(case.kv)[None, :]
    return -np.minimum(np.abs(p - j), 16) / 16.0 * (case.max_bias > 0) * (j >= BLOCK * unmasked_blocks(case))


def unmasked_blocks(case: Case) -> int:
    """Number of blocks without a mask, the same in every stream."""
    return int(case.positions(case.streams - 1)[0]) // BLOCK - 1 if case.past else 0


def live_blocks(case: Case, stream: int) -> list[int]:
    p = case.positions(stream)
    first = p[0] - max(case.window, 1) + 1 if case.window or case.past else 0
    if case.past:
        first = BLOCK * unmasked_blocks(case)
    blocks = range(case.kv // BLOCK)
    return [b for b in blocks if b * BLOCK < case.sinks or (b * BLOCK + BLOCK > first and b * BLOCK <= p[-1])]


def slopes(case: Case) -> np.ndarray:
    n, n_log2 = case.n_heads, 2 ** int(np.log2(case.n_heads))
    h = np.arange(n)
    m0, m1 = 2.0 ** (-case.max_bias / n_log2), 2.0 ** (-case.max_bias / 2 / n_log2)
    return np.where(h < n_log2, m0 ** (h + 1), m1 ** (2 * (h - n_log2) + 1)) if case.max_bias else np.ones(n)


def attend(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, sinks: np.ndarray | None, half: bool) -> np.ndarray:
    """[streams, n_q, heads, dv] from q [streams, heads, n_q, dk] and k, v [streams, kv, kv heads, d].

    In float64, or with every intermediate result rounded as the K/V type's own arithmetic would.
    """
    rounded = (
        (lambda x: x) if not half else to_bf16 if case.type == "bf16" else lambda x: x.astype(np.float16).astype(float)
    )
    q, k, v = rounded(q), rounded(k), rounded(v)
    out = np.zeros((case.streams, case.n_q, case.n_heads, case.dv))
    for s in range(case.streams):
        see, add = visible(case, s), bias(case, s)
        for h in range(case.n_heads):
            score = rounded(q[s, h] @ k[s, :, h // case.gqa].T) / np.sqrt(case.dk)
            if case.softcap:
                score = case.softcap * np.tanh(score / case.softcap)
            score = np.where(see, score + slopes(case)[h] * add, -np.inf)
            top = score.max(axis=1, keepdims=True)
            top = np.maximum(top, -1e30 if sinks is None else sinks[h])
            e = rounded(np.exp(score - top))
            total = e.sum(axis=1, keepdims=True) + (0 if sinks is None else np.exp(sinks[h] - top))
            out[s, :, h] = rounded(e @ v[s, :, h // case.gqa]) / np.where(total == 0, 1, total)
    return rounded(out)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32).astype(float)


def aligned(data: np.ndarray) -> np.ndarray:
    """A copy aligned like a GPU's buffer, with NaN on both sides."""
    guard = 16384
    memory = np.full(data.nbytes + 2 * guard + 256, 0xFF, np.uint8)
    start = guard + -(memory.ctypes.data + guard) % 256
    inner = memory[start : start + data.nbytes].view(data.dtype).reshape(data.shape)
    inner[...] = data
    return inner


class Emulator:
    """The functions of host.cpp in a library made by build.py."""

    def __init__(self, library: Path):
        self.lib = ctypes.CDLL(str(library), mode=os.RTLD_LAZY)
        self.lib.emu_log.restype = ctypes.c_char_p
        self.lib.emu_row_size.restype = ctypes.c_int64
        self.lib.emu_row_size.argtypes = [ctypes.c_int32, ctypes.c_int64]
        self.lib.emu_from_float.argtypes = [
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
        ]
        self.lib.emu_to_float.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self.lib.emu_attention.argtypes = [ctypes.POINTER(_Call)]

    def encode(self, kind: str, x: np.ndarray) -> np.ndarray:
        """[..., d] of float as bytes [..., row size] of a ggml type."""
        x = np.ascontiguousarray(x, np.float32)
        out = np.zeros((*x.shape[:-1], self.lib.emu_row_size(GGML_TYPES[kind], x.shape[-1])), np.uint8)
        self.lib.emu_from_float(GGML_TYPES[kind], x.ctypes.data, out.ctypes.data, x.size // x.shape[-1], x.shape[-1])
        return out

    def decode(self, kind: str, data: np.ndarray, d: int) -> np.ndarray:
        out = np.zeros((*data.shape[:-1], d), np.float32)
        self.lib.emu_to_float(GGML_TYPES[kind], data.ctypes.data, out.ctypes.data, out.size)
        return out.astype(float)

    def run(self, case: Case) -> dict:
        """Run a case: nmse, largest error, error of plain half precision, hash of the result, pipelines."""
        rng = np.random.default_rng(len(repr(case)) + case.n_q + case.kv)
        q = rng.standard_normal((case.streams, case.n_heads, case.n_q, case.dk)).astype(np.float32) * 2
        k = self.encode(case.type, rng.uniform(-1, 1, (case.streams, case.kv, case.heads, case.dk)))
        v = self.encode(case.type, rng.uniform(-1, 1, (case.streams, case.kv, case.heads, case.dv)))
        sinks = rng.uniform(-2, 2, case.n_heads).astype(np.float32) if case.logit_sinks else None
        plain = (q.astype(float), self.decode(case.type, k, case.dk), self.decode(case.type, v, case.dv), sinks)
        want, rough = attend(case, *plain, half=False), attend(case, *plain, half=True)

        mask, table, place = _columns(case, rng)
        if case.table:
            for data in (k, v):
                blocks = data.reshape(len(place), -1)
                moved = np.full_like(blocks, 0xFF)  # NaN in every type
                named = np.isin(place, table)
                moved[place[named]] = blocks[named]
                blocks[...] = moved
            table -= np.arange(case.streams)[:, None] * (case.kv // BLOCK)
        keep = [aligned(x) for x in (q, k, v, mask, table, sinks if sinks is not None else np.zeros(1, np.float32))]
        out = np.full((case.streams, case.n_q, case.n_heads, case.dv), np.nan, np.float32)
        call = _Call(
            *(GGML_TYPES[case.type],) * 2,
            *(case.dk, case.dv, case.heads, case.gqa, case.kv, case.n_q, case.streams),
            *(mask.shape[2] if case.mask else 0, table.shape[1] if case.table else 0, case.n_kv_max),
            *(1 / np.sqrt(case.dk), case.max_bias, case.softcap),
            *(*case.vec, case.reverse),
            *(x.ctypes.data for x in keep[:5]),
            *(keep[5].ctypes.data if case.logit_sinks else None, out.ctypes.data),
        )
        self.lib.emu_attention(ctypes.byref(call))
        error = np.abs(out - want)
        return {
            "nmse": float((error**2).sum() / (want**2).sum()),
            "error": float(error.max()),
            "half": float(np.abs(rough - want).max()),
            "digest": hashlib.sha256(out.tobytes()).hexdigest(),
            "pipelines": self.lib.emu_log().decode().split(),
        }


def _columns(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The kernels' mask, the table, and the place of each block of positions, the latter two for all streams."""
    full = [np.where(visible(case, s), bias(case, s), -np.inf) for s in range(case.streams)]
    if not case.table:
        return np.stack(full).astype(np.float16), np.zeros((1, 1), np.int32), np.zeros(0, np.int32)
    n = max(len(live_blocks(case, s)) for s in range(case.streams)) + case.pad
    masks, tables, places = [], [], []
    for s in range(case.streams):
        place = s * (case.kv // BLOCK) + rng.permutation(case.kv // BLOCK)
        live = live_blocks(case, s)
        compact = np.full((case.n_q, n * BLOCK), -np.inf)
        for c, b in enumerate(live):
            compact[:, c * BLOCK : (c + 1) * BLOCK] = full[s][:, b * BLOCK : (b + 1) * BLOCK]
        past = [*range(unmasked_blocks(case))][::-1]
        masks.append(compact)
        tables.append(place[[*live, *[live[-1]] * (n - len(live)), *past]])
        places.append(place)
    return np.stack(masks).astype(np.float16), np.stack(tables).astype(np.int32), np.concatenate(places)


def verdict(case: Case, result: dict) -> str | None:
    """The failure of a result, or None: at most upstream's NMSE, and twice the error of plain half precision."""
    bound = 2 * result["half"] + 1e-5
    if not result["nmse"] <= MAX_NMSE or not result["error"] <= bound:
        return f"{case}: nmse {result['nmse']:.2e}, error {result['error']:.2e} of {bound:.2e}"
    return None


def run(library: Path, cases: Sequence[Case]) -> list[dict]:
    """Results of the cases, in a child process; a case at which it died, and those after it, have no "nmse"."""
    child = subprocess.run(
        [sys.executable, "-m", "support.metal.attention", str(library)],
        input=json.dumps([asdict(case) for case in cases]),
        capture_output=True,
        text=True,
        # small matrices: numpy's threads would cost more than they gain
        env=module_environment(GGML_NO_BACKTRACE="1", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"),
    )
    results = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    died = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    return results + [{"died": died}] * (len(cases) - len(results))


def complaints(cases: Sequence[Case], results: Sequence[dict]) -> list[str]:
    """The failures in results, one line per case; ValueError without a case."""
    if not cases:
        raise ValueError("no cases")
    found = []
    for case, result in zip(cases, results, strict=True):
        if "died" in result:
            return [*found, f"{case}: {result['died']}"]
        if (line := verdict(case, result)) is not None:
            found.append(line)
    return found


def check(library: Path, cases: Sequence[Case]) -> list[str]:
    """Run the cases; returns one line per failure, [] if all pass."""
    return complaints(cases, run(library, cases))


if __name__ == "__main__":
    emulator = Emulator(Path(sys.argv[1]))
    for fields in json.load(sys.stdin):
        print(json.dumps(emulator.run(Case(**{**fields, "vec": tuple(fields["vec"])}))), flush=True)
