"""How far the engine's logits are from the oracle's in one case; figures.py says whether that is too far.

Use: `figures = measure(engine, zoo, case); assert not problems(case, figures, yardstick(engine, zoo, case))`
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from support.engine.process import Engine
from support.oracle.figures import WORST_F16, Figures, compare, flags_of, problems, rows_of
from support.oracle.grid import MOE, Case, Plan, plan
from support.oracle.grid_models import Zoo
from support.oracle.oracle import oracle_logits

__all__ = [
    "MOE",
    "WORST_F16",
    "Figures",
    "compare",
    "engine_rows",
    "expected_rows",
    "flags_of",
    "measure",
    "problems",
    "yardstick",
]


def expected_rows(zoo: Zoo, case: Case, made: Plan) -> np.ndarray:
    """The oracle's logits, all sequences one after another: float32 [rows, vocab]."""
    model = zoo.model(case.arch, case.layers)
    return np.concatenate(
        [oracle_logits(model, *sequence, case.rule) for sequence in zip(made.tokens, made.is_decode, strict=True)]
    )


def engine_rows(engine: Engine, zoo: Zoo, case: Case, made: Plan) -> np.ndarray:
    """The engine's logits in the same order: float32 [rows, vocab]."""
    result = engine.run(zoo.gguf(case.arch, case.layers), made.steps, case.overrides, **case.settings)
    # Without a sliding layer there is nothing to choose a policy for.
    if "1" in case.sliding and result.policy != case.policy:
        raise AssertionError(f"the policy in use is {result.policy!r}, {case.policy!r} was asked for")
    return np.concatenate(rows_of(made, result))


def measure(engine: Engine, zoo: Zoo, case: Case) -> Figures:
    """Figures of one case."""
    made = plan(case)
    zoo.prepare([(case.arch, case.layers)])
    with ThreadPoolExecutor(1) as other:  # the engine's process and the oracle, side by side
        got = other.submit(engine_rows, engine, zoo, case, made)
        expected = expected_rows(zoo, case, made)
        return compare(expected, got.result(), flags_of(made))


def yardstick(engine: Engine, zoo: Zoo, case: Case) -> Figures | None:
    """Figures of full attention on the same tokens in the same batches, where the bounds are relative to it (q8_0)."""
    if case.kv != "q8_0":
        return None
    return measure(engine, zoo, replace(case, sliding="0" * case.layers))
