"""One case of the grid from end to end: run the engine, ask the oracle, measure the distance, compare it with limits.

    figures, plain = measure(engine, zoo, case), yardstick(engine, zoo, case)
    problems(case, figures, plain)                          # [] is a pass

The limits are those of half-precision arithmetic, not of the semantics: a mask that is off by one key moves the logits
of these models by more than their own spread somewhere, ten times any limit here.

Apart from the oracle itself, nothing here needs torch: the GPU check runs the rest where there is none.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from support.engine.process import Engine, Result
from support.oracle.grid import MOE, VOCAB, Case, Schedule, schedule

if TYPE_CHECKING:
    from support.oracle.grid_models import Zoo

# f16 K and V, or f16 accumulation: plain full attention shows 0.005 to 0.06 on these models.
WORST_F16, KL_F16 = 0.15, 2e-3
# f32 K and V without flash attention: nothing is rounded to half precision but a table for GELU (0.002).
WORST_F32, KL_F32 = 0.01, 1e-5
# q8_0 K and V: as a multiple of what full attention with q8_0 shows on the same tokens in the same batches, since that
# noise is the format's. Rows that see few keys average it less, so the largest error may grow more than the percentile.
Q8_WORST, Q8_P95 = 2.0, 1.5


@dataclass(frozen=True)
class Figures:
    """Distance from the oracle. Errors are per row: the largest |difference| divided by the oracle logits' standard
    deviation; KL is that of the engine's distribution from the oracle's, in nats."""

    rows: int
    worst: float
    p95: float
    decode_median: float
    kl: float
    kl_p95: float


def measure(engine: Engine, zoo: Zoo, case: Case) -> Figures:
    """Run one case through the engine and the oracle, and return the distance between them."""
    fed = schedule(case)
    zoo.prepare([(case.arch, case.layers)])
    with ThreadPoolExecutor(1) as other:  # the engine's process and the oracle, side by side
        got = other.submit(engine_rows, engine, zoo, case, fed)
        expected = expected_rows(zoo, case, fed)
        return compare(expected, got.result(), decode_flags(fed))


def yardstick(engine: Engine, zoo: Zoo, case: Case) -> Figures | None:
    """Figures of full attention on the same tokens in the same batches, where the limits are relative to it (q8_0)."""
    if case.kv != "q8_0":
        return None
    return measure(engine, zoo, replace(case, sliding="0" * case.layers))


def expected_rows(zoo: Zoo, case: Case, fed: Schedule) -> np.ndarray:
    """The oracle's logits, all sequences one after another: float32 [rows, vocab]."""
    from support.oracle.oracle import oracle_logits

    model = zoo.model(case.arch, case.layers)
    return np.concatenate(
        [oracle_logits(model, *sequence, case.rule) for sequence in zip(fed.tokens, fed.is_decode, strict=True)]
    )


def engine_rows(engine: Engine, zoo: Zoo, case: Case, fed: Schedule) -> np.ndarray:
    """The engine's logits in the same order: float32 [rows, vocab]."""
    result = engine.run(zoo.gguf(case.arch, case.layers), fed.steps, case.overrides, **case.settings)
    # Without a sliding layer there is nothing to choose a policy for.
    if "1" in case.sliding and result.policy != case.policy:
        raise AssertionError(f"the policy in use is {result.policy!r}, expected {case.policy!r}")
    return np.concatenate(rows_of(fed, result))


def rows_of(fed: Schedule, result: Result) -> list[np.ndarray]:
    """The engine's logits put back in sequence order: per sequence float32 [tokens, vocab]."""
    out = [np.full((len(tokens), VOCAB), np.nan, np.float32) for tokens in fed.tokens]
    for batch, logits in zip(fed.batches, result.logits, strict=True):
        for (_, position, (seq,), _), row in zip(batch, logits, strict=True):
            out[seq][position] = row
    return out


def decode_flags(fed: Schedule) -> np.ndarray:
    """Decode flags of all rows, bool [rows]."""
    return np.concatenate([np.array(flags, dtype=bool) for flags in fed.is_decode])


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


def limits(case: Case, plain: Figures | None) -> dict[str, float]:
    """The largest value allowed for each figure that counts in this case. plain: what `yardstick` gave for it."""
    if case.kv == "q8_0" and plain is None:
        raise ValueError("a q8_0 case is judged against its yardstick")
    noise = plain if case.kv == "q8_0" else Figures(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    if case.arch in MOE:
        # Experts flip in some rows under any rounding; the percentile leaves those out.
        return {
            "p95": max(WORST_F16, Q8_P95 * noise.p95),
            "decode_median": max(WORST_F16, Q8_P95 * noise.p95),
            "kl_p95": max(KL_F16, Q8_P95**2 * noise.kl_p95),
        }
    if case.kv == "q8_0":
        return {
            "worst": max(WORST_F16, Q8_WORST * noise.worst),
            "p95": max(WORST_F16, Q8_P95 * noise.p95),
            "kl": max(KL_F16, Q8_WORST**2 * noise.kl),
        }
    if case.kv == "f32":
        return {"worst": WORST_F32, "kl": KL_F32}
    return {"worst": WORST_F16, "kl": KL_F16}


def problems(case: Case, figures: Figures, plain: Figures | None = None) -> list[str]:
    """One line for each figure that exceeds its limit; [] is a pass. plain: as in `limits`."""
    found = {name: (getattr(figures, name), limit) for name, limit in limits(case, plain).items()}
    return [f"{name} {value:.4g} is over {limit:.4g}" for name, (value, limit) in found.items() if not value <= limit]
