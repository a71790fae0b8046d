"""Distances between the engine's logits and the oracle's, and the limits that they must keep to; numpy only.

The bounds are those of half-precision arithmetic, not of the semantics: a mask that is off by one key moves the logits
of these models by more than their own spread somewhere, ten times any bound here.

Use: `problems(case, compare(expected, got, is_decode))` is [] for a pass
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from support.engine.process import Result
from support.oracle.grid import MOE, VOCAB, Case, Plan

# f16 K and V, or f16 accumulation: plain full attention shows 0.005 to 0.06 on these models.
WORST_F16, KL_F16 = 0.15, 2e-3
# f32 K and V without flash attention: nothing is rounded to half precision but a table for GELU (0.002).
WORST_F32, KL_F32 = 0.01, 1e-5
# q8_0 K and V: as a multiple of what full attention with q8_0 shows on the same tokens in the same batches, since that
# noise is the format's. Rows that see few keys average it less, so the largest error may grow more than the percentile.
Q8_WORST, Q8_P95 = 2.0, 1.5


@dataclass(frozen=True)
class Figures:
    """Distance from the oracle. Errors are per row: the largest |difference| as a part of the oracle logits' standard
    deviation; KL is of the engine's distribution from the oracle's, in nats."""

    rows: int
    worst: float
    p95: float
    decode_median: float
    kl: float
    kl_p95: float


def compare(expected: np.ndarray, got: np.ndarray, is_decode: np.ndarray) -> Figures:
    """expected, got: float32 [rows, vocab]; is_decode: bool [rows]. A NaN anywhere makes every figure infinite."""
    if not np.isfinite(got).all():
        return Figures(len(got), *[float("inf")] * 5)
    error = np.abs(got - expected).max(axis=1) / expected.std()
    p, q = log_softmax(expected), log_softmax(got)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    decode = error[is_decode]
    return Figures(
        len(error),
        float(error.max()),
        float(np.percentile(error, 95)),
        float(np.median(decode)) if len(decode) else 0.0,
        float(kl.max()),
        float(np.percentile(kl, 95)),
    )


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Log probabilities of each row, float64 [rows, vocab]."""
    x = x.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def rows_of(made: Plan, result: Result) -> list[np.ndarray]:
    """The engine's logits put back in sequence order: per sequence float32 [tokens, vocab]."""
    out = [np.full((len(tokens), VOCAB), np.nan, np.float32) for tokens in made.tokens]
    for (_, batch, *_), logits in zip(made.steps, result.logits, strict=True):
        for (_, position, (seq,), _), row in zip(batch, logits, strict=True):
            out[seq][position] = row
    return out


def flags_of(made: Plan) -> np.ndarray:
    """Decode flags of all rows, bool [rows]."""
    return np.concatenate([np.array(flags, dtype=bool) for flags in made.is_decode])


def problems(case: Case, figures: Figures, plain: Figures | None = None) -> list[str]:
    """What is too far, one line each; [] is a pass. plain: what `yardstick` gave for this case."""
    if case.kv == "q8_0" and plain is None:
        raise ValueError("a q8_0 case is judged against its yardstick")
    noise = plain if case.kv == "q8_0" else Figures(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    if case.arch in MOE:
        # Experts flip in some rows under any rounding; the percentile leaves those out.
        limits = {
            "p95": max(WORST_F16, Q8_P95 * noise.p95),
            "decode_median": max(WORST_F16, Q8_P95 * noise.p95),
            "kl_p95": max(KL_F16, Q8_P95**2 * noise.kl_p95),
        }
    elif case.kv == "q8_0":
        limits = {
            "worst": max(WORST_F16, Q8_WORST * noise.worst),
            "p95": max(WORST_F16, Q8_P95 * noise.p95),
            "kl": max(KL_F16, Q8_WORST**2 * noise.kl),
        }
    elif case.kv == "f32":
        limits = {"worst": WORST_F32, "kl": KL_F32}
    else:
        limits = {"worst": WORST_F16, "kl": KL_F16}
    found = {name: getattr(figures, name) for name in limits}
    return [
        f"{name} {found[name]:.4g} is over {limits[name]:.4g}" for name in limits if not found[name] <= limits[name]
    ]
