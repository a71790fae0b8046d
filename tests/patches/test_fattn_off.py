"""SWAA with GGML_CPU_FATTN=0: the CPU reads no KV block table then, so the engine gathers the live blocks instead.

pytest tests/patches/test_fattn_off.py
"""

from dataclasses import replace

import pytest

from support.engine.process import Engine, EngineError, library_dir
from support.oracle import verdict
from support.oracle.grid import Case, schedule

CASES = [
    Case.parse(line)
    for line in (
        "llama/4 W31 S4 s1011 d1001 f16 copy b512 u97 t1 p900+12 unified explicit r1",
        "qwen3/4 W256 S257 s1101 d0101 q8_0 copy b256 u64 t1 p700+8,300+12 streams explicit r2",
    )
]


@pytest.fixture(scope="module")
def engine():
    """An Engine that leaves attention on the CPU to upstream's kernels."""
    with Engine(library_dir(), own_kernels=False) as running:
        yield running


@pytest.mark.native
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.arch}-{case.kv}")
def test_the_policy_is_copy(engine, zoo, case):
    model, steps = zoo.gguf(case.arch, case.layers), schedule(case).steps
    assert engine.run(model, steps, case.overrides, **case.settings | {"policy": "auto"}).policy == "copy"
    with pytest.raises(EngineError, match="does not read KV block tables"):
        engine.run(model, steps, case.overrides, **replace(case, policy="table").settings)
    figures, plain = verdict.measure(engine, zoo, case), verdict.yardstick(engine, zoo, case)
    assert not verdict.problems(case, figures, plain)
