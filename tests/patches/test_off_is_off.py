"""Without SWAA the patched library computes exactly what the unpatched one does.

Bit for bit: the same instructions on the same numbers, or a call site changes more than it should. Only attention on
the CPU has other kernels, with or without SWAA (docs/cpu-kernels.md); here it is left to upstream's. The unpatched
library comes from `make baseline` (same compiler, same flags); SWAA_EDGE_BASELINE names another folder.

    make baseline && pytest tests/patches/test_off_is_off.py
"""

from dataclasses import replace

import numpy as np
import pytest

from support.engine.process import Engine, library_dir
from support.oracle.grid import Case, schedule

OFF = {"swaa.enabled": False}

# Each fed as one, two or three sequences; the SWAA part of a line is what would apply if it were on.
CASES = [
    Case.parse(line)
    for line in (
        "llama/4 W31 S4 s1111 d1010 f16 table b512 u512 t1 p700+8 unified auto r1",
        "llama/4 W31 S4 s1111 d1010 f16 table b512 u97 t2 p700+8,60+3 unified auto r2",
        "qwen3/4 W31 S4 s1111 d1010 q8_0 table b512 u128 t1 p400+8,513+2,1+5 streams auto r3",
        "qwen3/4 W31 S4 s1111 d1010 f32 dense b256 u64 t1 p300+8 unified auto r4",
        "qwen2/2 W31 S4 s11 d10 f16 dense b512 u512 t1 p513+4,200+4 streams auto r5",
        "mistral/3 W31 S4 s111 d010 q8_0 table b97 u32 t1 p260+4,255+4 unified auto r6",
        "qwen3moe/3 W31 S4 s111 d010 f16 table b512 u512 t1 p600+4 unified auto r7",
        "gemma/2 W31 S4 s11 d10 f16 table b512 u256 t1 p520+4 streams auto r8",
        "glm4/3 W31 S4 s111 d010 f16 table b64 u16 t1 p130+4 unified auto r9",
        "stablelm/3 W31 S4 s111 d010 f16 table b512 u512 t1 p300+4 unified auto r10",
    )
]


@pytest.fixture(scope="module")
def engine():
    """An Engine with the patched library and upstream's attention kernels on the CPU."""
    with Engine(library_dir(), own_kernels=False) as running:
        yield running


@pytest.fixture(scope="module")
def baseline(baseline_dir):
    """An Engine with the unpatched library."""
    with Engine(baseline_dir) as running:
        running.start()
        assert not running.has_swaa, f"{baseline_dir} holds a patched library"
        yield running


def logits(running, model, case, overrides):
    settings = case.settings | {"policy": "auto"}
    return running.run(model, schedule(case).steps, overrides, **settings).logits


def assert_same_bits(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert np.isfinite(one).all()
        same = one.tobytes() == other.tobytes()  # pytest takes minutes to diff long bytes
        assert same, f"largest difference {np.abs(one - other).max()}"


@pytest.mark.native
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.arch}-{case.kv}-{case.policy}-{len(case.sequences)}")
def test_no_keys_and_switched_off(engine, baseline, zoo, case):
    model = zoo.gguf(case.arch, case.layers)
    theirs = logits(baseline, model, case, {})
    assert_same_bits(logits(engine, model, case, {}), theirs)
    assert_same_bits(logits(engine, model, case, case.overrides | OFF), theirs)


@pytest.mark.native
@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: f"{case.arch}-{case.kv}-{case.policy}")
def test_an_annotated_file_switched_off(engine, baseline, zoo, case, tmp_path):
    from swaa_edge import SwaaConfig
    from swaa_edge.convert.annotate import annotate

    plain, annotated = zoo.gguf(case.arch, case.layers), tmp_path / "annotated.gguf"
    annotate(plain, annotated, SwaaConfig(window_size=31, sink_count=4))
    theirs = logits(baseline, plain, case, {})
    assert_same_bits(logits(engine, annotated, case, OFF), theirs)
    # The keys do nothing in a library that doesn't know them.
    assert_same_bits(logits(baseline, annotated, case, {}), theirs)
    # And they do something where they aren't switched off, so the comparison above means something.
    if case.policy != "dense":
        case = replace(case, policy="auto")
    ours = logits(engine, annotated, case, {})
    assert any(one.tobytes() != other.tobytes() for one, other in zip(ours, theirs, strict=True))


@pytest.mark.native
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.arch}-{case.kv}-{case.policy}-{len(case.sequences)}")
def test_full_attention_in_every_layer(engine, baseline, zoo, case):
    model = zoo.gguf(case.arch, case.layers)
    overrides = replace(case, sliding="0" * case.layers).overrides
    assert_same_bits(logits(engine, model, case, overrides), logits(baseline, model, case, {}))


@pytest.mark.native
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.arch}-{case.kv}-{case.policy}-{len(case.sequences)}")
@pytest.mark.parametrize("sinks", [0, 300])
def test_sequences_shorter_than_the_window(engine, baseline, zoo, case, sinks):
    model = zoo.gguf(case.arch, case.layers)
    longest = max(prompt + decode for prompt, decode in case.sequences)
    overrides = replace(case, window=longest, sinks=sinks).overrides
    assert_same_bits(logits(engine, model, case, overrides), logits(baseline, model, case, {}))
