"""The CPU attention kernels by themselves: as exact as upstream's, repeatable, and unused when switched off.

Each case is compared with attention by its definition in double precision, on the values in the cache. The same library
with GGML_CPU_FATTN=0 runs upstream's kernels, whose error is the yardstick.

    pytest tests/patches/test_cpu_attention.py -k "iq4_nl and b5"
"""

import numpy as np
import pytest

from support.engine.attention_op import (
    BLOCKS,
    COLUMNS,
    GROUPS,
    HEADS,
    MASKS,
    TOKENS,
    TYPES,
    Kernels,
    OpCase,
    exact,
    nmse,
    random_cases,
    rounded_to_8_bits,
    sees_nothing,
    without_table,
)
from support.engine.process import library_dir

THREADS = (1, 2, 5)  # 5: more than tasks, or than cores

# Our error may be this many times upstream's: sums of the same numbers in different orders round differently.
SAME = 1.5
# Errors below this are f32 rounding of scores and sums, whatever the kernel. Scores of 10,000 are rounded by a
# thousandth, which shows where two columns compete.
FLOOR, FLOOR_LARGE = 1e-12, 1e-10
# Absolute bounds, since a wrong column of the mask might not show beside upstream's error. Every cache type is read
# exactly and computed in f32; or, for types of 8 bits or fewer on CPUs with the instructions, with Q rounded to 8 bits,
# as upstream does everywhere, and with 16-bit weights.
BOUND, BOUND_WEIGHTS = 1e-10, 1e-7
LIKE_8_BITS = {"q8_0", "q4_0", "q5_0", "iq4_nl"}
# If upstream's kernel is further off, our definition is not that of the op.
SANE = 1e-2

RANDOM = random_cases(200)
LARGE = [
    OpCase(k, tokens=tokens, columns=500, mask=mask, sinks=mask == "none", large=True, seed=tokens)
    for k in ("f32", "f16", "bf16", "q8_0")
    for tokens, mask in ((1, "one"), (1, "none"), (33, "one"), (75, "none"))
]

# Heads that are skipped, in some steps or in all: the decode kernel prepares the next head while computing one.
SKIPPED = [
    OpCase(k, group=group, heads=8, columns=500, mask="heads", blind=True, window=True, seed=seed)
    for seed, k in enumerate(sorted(LIKE_8_BITS))
    for group in (1, 2)
]


@pytest.fixture(scope="module")
def ours():
    """The library's own kernels."""
    with Kernels(library_dir()) as running:
        yield running


@pytest.fixture(scope="module")
def upstream():
    """Upstream's kernels, of the same library."""
    with Kernels(library_dir(), own=False) as running:
        yield running


@pytest.fixture(scope="module")
def baseline(baseline_dir):
    """The unpatched library."""
    with Kernels(baseline_dir) as running:
        yield running


@pytest.mark.native
@pytest.mark.parametrize("case", RANDOM + LARGE + SKIPPED, ids=str)
def test_against_the_definition(ours, upstream, case):
    tensors = case.tensors(ours.quantize)
    expected = exact(case, tensors)
    theirs = nmse(upstream.attend(*without_table(case, tensors), 2)[0], expected)
    assert theirs < SANE or case.large
    allowed = max(SAME * theirs, FLOOR_LARGE if case.large else FLOOR)
    definitions = [expected]
    if case.k in LIKE_8_BITS:
        definitions.append(exact(case, rounded_to_8_bits(case, tensors)))
    bound = BOUND_WEIGHTS if case.v_type in LIKE_8_BITS else BOUND
    nothing = sees_nothing(case, tensors)
    assert nothing.any() or not case.blind
    for threads in THREADS:
        first, second = ours.attend(case, tensors, threads, runs=2)
        where = f"on {threads} threads; {case!r}"
        assert np.isfinite(first).all(), f"not finite {where}"
        assert not first[nothing].any(), f"rows that see nothing are not zero {where}"
        same = first.tobytes() == second.tobytes()  # pytest takes minutes to diff long bytes
        assert same, f"two runs differ by {np.abs(first - second).max()} {where}"
        error = nmse(first, expected)
        assert error <= allowed, f"error {error:.2e}, upstream's {theirs:.2e} {where}"
        error = min(nmse(first, definition) for definition in definitions)
        assert error <= bound, f"error {error:.2e} {where}"


@pytest.mark.native
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_the_kernels_are_ours(ours, upstream, kind, tokens):
    """Otherwise upstream's kernels would be compared with themselves."""
    case = OpCase(kind, tokens=tokens)
    tensors = case.tensors(ours.quantize)
    assert ours.attend(case, tensors, 2)[0].tobytes() != upstream.attend(case, tensors, 2)[0].tobytes()


@pytest.mark.native
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [1, 5, 33, 75])
@pytest.mark.parametrize("given", [{}, {"sinks": True, "softcap": 20.0}])
def test_nan_stays_nan(ours, kind, tokens, given):
    """Otherwise a broken model would look like a working one."""
    case = OpCase(kind, tokens=tokens, **given)
    tensors = case.tensors(ours.quantize)
    wrong = np.zeros(tensors["q"].shape[:-1], bool)
    wrong[0, 0, 1] = True
    tensors["q"][wrong] = np.nan
    for threads in THREADS:
        out = ours.attend(case, tensors, threads)[0]
        assert np.isnan(out[wrong]).all() and np.isfinite(out[~wrong]).all()


@pytest.mark.native
@pytest.mark.parametrize("case", [case for case in RANDOM if not case.blocks][:40], ids=str)
def test_switched_off_they_are_upstreams(upstream, baseline, case):
    tensors = case.tensors(baseline.quantize)
    for threads in (1, 2):
        ours, theirs = (running.attend(case, tensors, threads)[0] for running in (upstream, baseline))
        same = ours.tobytes() == theirs.tobytes()
        assert same, f"largest difference {np.abs(ours - theirs).max()} on {threads} threads"


@pytest.mark.native
@pytest.mark.parametrize("case", [case for case in RANDOM if case.blocks][:12], ids=str)
def test_switched_off_no_table_is_read(ours, upstream, case):
    """The backend refuses the op, so that the engine gathers the rows (policy copy); given a table nevertheless, it
    takes the path that reads it."""
    tensors = case.tensors(ours.quantize)
    assert ours.supports(case, tensors) and not upstream.supports(case, tensors)
    assert upstream.supports(*without_table(case, tensors))
    assert nmse(upstream.attend(case, tensors, 2)[0], exact(case, tensors)) < SANE


@pytest.mark.parametrize(
    "field, values",
    {
        "k": TYPES,
        "v_type": TYPES,
        "size": HEADS,
        "group": GROUPS,
        "tokens": TOKENS,
        "columns": COLUMNS,
        "streams": (1, 2, 3),
        "blocks": (0, *BLOCKS),
        "mask": MASKS,
        "blind": (True, False),
        "window": (True, False),
        "cells": ("tokens", "heads"),
        "sinks": (True, False),
        "alibi": (0, 8),
        "softcap": (0, 20),
        "v_in_k": (True,),
    }.items(),
)
def test_every_value_occurs_in_many_combinations(field, values):
    """The cases are random, so their coverage is counted."""
    for value in values:
        found = [case for case in RANDOM if ((case.dk, case.dv) if field == "size" else getattr(case, field)) == value]
        if field == "columns":
            found = [case for case in found if not case.blocks]
        assert len({(case.k, case.tokens, case.group) for case in found}) >= 5, value
        assert field == "tokens" or len({case.tokens for case in found}) >= 4, value
        assert any(case.v_type != case.k for case in found) or field == "v_in_k", value
