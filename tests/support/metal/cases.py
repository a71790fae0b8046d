"""The cases that the emulator runs: without a table, on the unpatched kernels and on ours, and with one.

Why these: every K/V type through every kernel that it can meet (one query: vector kernel; 20 and more: the one with
matrices; from 32 on a quantized cache is copied to F16 first), lengths that no tile divides, the edges of windows.

    cases.PLAIN["types"], cases.TABLE["window edges"]: lists of attention.Case
"""

from support.metal.attention import Case
from support.metal.build import TYPES

# What may come together with any mask.
OPTIONS = [
    {},
    {"logit_sinks": True},
    {"softcap": 3.0},
    {"max_bias": 8.0},
    {"logit_sinks": True, "max_bias": 8.0, "softcap": 3.0},
]
# of the matrix kernel, with 41 queries and, for a quantized cache that is not copied, 21
HEAD_SIZES = [("f16", 64, 41), ("f16", 80, 41), ("f16", 72, 41), ("q8_0", 96, 21), ("q8_0", 96, 41)]
# (type, queries at a time, elements of a head per thread): instances that upstream's tuning picks for some GPUs
TUNED = [("f16", (2, 4)), ("f16", (4, 2)), ("q8_0", (2, 4))]


def _head(kind: str, size: int, **fields) -> Case:
    return Case(type=kind, dk=size, dv=size, **fields)


def _sizes(**fields) -> list[Case]:
    matrix = [_head(t, d, n_q=n, **fields) for t, d, n in HEAD_SIZES]
    vector = [_head(t, 64, n_q=n, **fields) for t in ("f16", "q8_0") for n in (1, 5)]
    return [*matrix, *vector, Case(dk=192, dv=128, n_q=41, **fields)]


PLAIN = {
    "types": [Case(type=t, n_q=n, kv=kv) for t in TYPES for n, kv in ((1, 97), (3, 257), (21, 300), (33, 257))],
    "head sizes": _sizes(kv=300),
    "options": [Case(n_q=n, kv=321, gqa=3, heads=2, **o) for n in (1, 41) for o in OPTIONS],
    "no mask": [Case(n_q=n, kv=kv, mask=False) for n in (1, 24, 33) for kv in (97, 256)],
    "window": [
        Case(n_q=n, kv=1025, window=w, sinks=s, blind_row=n > 8) for n in (1, 65) for w, s in ((1, 0), (300, 100))
    ],
    "streams": [Case(type=t, n_q=n, kv=300, streams=3, heads=2, gqa=4) for t in ("f16", "q8_0") for n in (1, 33)],
    "tuned": [_head(t, 64, n_q=n, kv=257, vec=v) for t, v in TUNED for n in (1, 3, 4)],
    "sparse": [Case(n_q=n, kv=512, window=40, n_kv_max=64) for n in (1, 33)],
    "long": [Case(n_q=1, kv=4200), Case(n_q=1, kv=9000, window=2048, sinks=4)],
    "reverse order": [Case(type=t, n_q=n, kv=300, reverse=True) for t in ("f16", "q4_0") for n in (1, 21, 33)],
}

_sliding = {"table": True, "window": 300, "sinks": 64, "pad": 1, "kv": 1536}
_causal = {"table": True, "past": True, "pad": 1, "kv": 1024}

TABLE = {
    "types": [Case(type=t, n_q=n, **_sliding) for t in TYPES for n in (1, 3, 21, 33, 65)],
    "head sizes": _sizes(**_sliding),
    "options": [Case(n_q=n, gqa=3, heads=2, **o, **_sliding) for n in (1, 41) for o in OPTIONS],
    "window edges": [
        Case(n_q=n, dk=64, dv=64, gqa=1, window=w, sinks=s, pad=w % 2, table=True, kv=1536)
        for w in (1, 255, 256, 257, 511, 512, 513)
        for s in (0, 1, 100, 257)
        for n in (1, 41)
    ],
    "blind rows": [Case(n_q=n, blind_row=True, **m) for n, m in ((41, _sliding), (11, _sliding), (41, _causal))],
    "streams": [
        Case(type=t, n_q=n, streams=s, heads=2, gqa=2, window=300, sinks=100, pad=2, table=True, kv=1024)
        for t in ("f16", "q8_0")
        for s, n in ((2, 1), (3, 1), (3, 21), (2, 33))
    ],
    "causal past": [
        *(Case(type=t, n_q=n, **_causal) for t in TYPES for n in (1, 21, 33)),
        *(Case(type=t, n_q=n, streams=2, heads=2, **_causal) for t in ("f16", "q8_0") for n in (1, 2, 65, 130)),
        *(Case(n_q=n, logit_sinks=True, softcap=3.0, max_bias=m, **_causal) for n in (1, 41) for m in (0.0, 8.0)),
    ],
    "tuned": [_head(t, 64, n_q=n, vec=v, **m) for t, v in TUNED for n in (1, 3, 4) for m in (_sliding, _causal)],
    "ubatch": [
        *(_head(t, 64, n_q=512, **_sliding) for t in ("f16", "q8_0")),  # wider than the window
        _head("f16", 64, n_q=512, **{**_causal, "kv": 2048}),
    ],
    "sparse hint": [Case(n_q=n, n_kv_max=384, **_sliding) for n in (1, 33)],
    "long": [
        *(Case(n_q=n, **{**_causal, "kv": kv}) for n in (1, 33) for kv in (4096, 8192)),
        *(Case(n_q=n, table=True, window=2048, sinks=64, pad=1, kv=32768, gqa=1) for n in (1, 97)),
    ],
    "reverse order": [Case(type=t, n_q=n, reverse=True, **_sliding) for t in ("f16", "q4_0") for n in (1, 21, 33)],
}
