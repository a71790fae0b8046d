"""SWAA on a Vulkan device: sliding layers by the policies copy and dense, against the oracle; the table is refused.

Only with a library that was built with -DGGML_VULKAN=ON (docs/gpu/vulkan.md); Mesa's software device will do:

    SWAA_VULKAN_LIB=build/vulkan/bin pytest tests/patches/test_vulkan.py
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.engine.process import Engine, EngineError
from support.oracle import verdict
from support.oracle.grid import Case, schedule

LIBRARY = os.environ.get("SWAA_VULKAN_LIB")
pytestmark = pytest.mark.skipif(
    not LIBRARY, reason="SWAA_VULKAN_LIB names no library that is built with -DGGML_VULKAN=ON"
)
ALL_LAYERS = 99

# Short ones first: a software device compiles its shaders for every new process, and computes on the CPU.
CASES = [
    Case.parse(line)
    for line in (
        "llama/2 W7 S2 s11 d10 f16 copy b64 u32 t1 p70+3 unified explicit r1",
        "llama/2 W7 S2 s11 d10 f16 dense b64 u32 t1 p70+3 unified explicit r2",
        "llama/2 W31 S4 s11 d01 q8_0 copy b64 u33 t1 p90+3,33+2 unified auto r3",
        "qwen3/3 W7 S0 s101 d100 f16 copy b64 u64 t1 p65+3,20+2 streams auto r4",
        "qwen3/3 W1 S1 s111 d000 f32 dense b64 u64 t1 p70+2 unified explicit r5",
        # Long enough for blocks that are not live.
        "llama/2 W63 S4 s11 d10 f16 copy b256 u256 t1 p600+3 unified explicit r6",
        "llama/2 W257 S1 s11 d01 q8_0 copy b256 u128 t1 p620+3 unified explicit r7",
        "gemma/2 W128 S4 s10 d10 f16 copy b256 u256 t1 p520+3 unified explicit r8",
        "stablelm/2 W100 S1 s11 d11 f16 dense b256 u97 t1 p300+3 unified auto r9",
    )
]


@pytest.fixture(scope="module")
def vulkan():
    """An Engine with the Vulkan library, which may use a software device too."""
    patch = pytest.MonkeyPatch()
    patch.setattr("support.engine.protocol.TIMEOUT_SECONDS", 3600.0)
    patch.setenv("GGML_VK_VISIBLE_DEVICES", os.environ.get("GGML_VK_VISIBLE_DEVICES", "0"))
    with patch.context(), Engine(Path(LIBRARY)) as running:
        running.start()
        assert running.has_swaa, f"the library in {LIBRARY} has no llama_swaa functions"
        yield running
    patch.undo()


def run(engine, zoo, case, **settings):
    """The engine's result and plan of a case with every layer on the device."""
    fed = schedule(case)
    settings = case.settings | {"gpu_layers": ALL_LAYERS} | settings
    result = engine.run(zoo.gguf(case.arch, case.layers), fed.steps, case.overrides, **settings)
    on_device, layers = re.search(r"offloaded (\d+)/(\d+) layers to GPU", result.log).groups()
    assert on_device == layers and "Vulkan0" in result.log
    return fed, result


def figures(engine, zoo, case):
    fed, result = run(engine, zoo, case)
    # Without a sliding layer there is nothing to choose a policy for.
    assert result.policy == case.policy or "1" not in case.sliding
    got = np.concatenate(verdict.rows_of(fed, result))
    return verdict.compare(verdict.expected_rows(zoo, case, fed), got, verdict.decode_flags(fed))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.arch}-{case.policy}-{case.kv}-W{case.window}")
def test_against_the_oracle(vulkan, zoo, case):
    # A device may round to half precision where a CPU does not, so full attention there is the yardstick for all types.
    found, plain = figures(vulkan, zoo, case), figures(vulkan, zoo, replace(case, sliding="0" * case.layers))
    print(f"{case}: worst {found.worst:.4f}, full attention {plain.worst:.4f}; kl {found.kl:.2g}")
    assert plain.worst < 2 * verdict.WORST_F16 or case.kv == "q8_0"
    assert verdict.problems(replace(case, kv="q8_0"), found, plain) == []


def test_the_table_is_refused_and_not_chosen(vulkan, zoo):
    case = CASES[0]
    with pytest.raises(EngineError, match=r"policy 'table' is not available: flash attention on Vulkan0"):
        run(vulkan, zoo, replace(case, policy="table"))
    _, result = run(vulkan, zoo, case, policy="auto")
    assert result.policy == "copy"
    _, asked = run(vulkan, zoo, case)
    assert [a.tobytes() for a in result.logits] == [b.tobytes() for b in asked.logits]
