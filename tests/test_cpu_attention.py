"""The CPU attention kernels by themselves: as exact as upstream's, repeatable, and out of the way when switched off.

Each case is judged against attention by its definition in double precision, on the values that the cache holds. The
same library with GGML_CPU_FATTN=0 gives upstream's kernels, whose error is the measure.

    pytest tests/test_cpu_attention.py -k "iq4_nl and b5"
"""

import os
from pathlib import Path

import numpy as np
import pytest
from attention_op import (
    BLOCKS,
    COLUMNS,
    GROUPS,
    HEADS,
    MASKS,
    TOKENS,
    TYPES,
    Case,
    Kernels,
    exact,
    nmse,
    random_cases,
    rounded_to_8_bits,
    sees_nothing,
    without_table,
)
from engine import library_dir

BASELINE = Path(os.environ.get("SWAA_EDGE_BASELINE") or Path(__file__).parent.parent / "build" / "baseline" / "lib")
THREADS = (1, 2, 5)  # 5: more than tasks, or than cores

# An error of ours is no larger than upstream's if it is at most this many times it: two sums of the same numbers in
# different orders are luckier or less lucky.
SAME = 1.5
# And below this it is the rounding of scores and sums in f32, which has nothing to do with the kernel. Scores of 10,000
# are rounded by a thousandth, and that shows where two columns compete.
FLOOR, FLOOR_LARGE = 1e-12, 1e-10
# Whatever the type of the cache, it is read exactly and computed with in f32; or, where it is one of 8 bits or fewer,
# and where the CPU is good at that, with Q rounded to 8 bits, as upstream does everywhere, and with weights of 16 bits.
# Beside upstream's error alone a wrong column of the mask would not show.
BOUND, BOUND_WEIGHTS = 1e-10, 1e-7
LIKE_8_BITS = {"q8_0", "q4_0", "q5_0", "iq4_nl"}
# If upstream's kernel is farther off, the definition is not that of the op.
SANE = 1e-2

RANDOM = random_cases(200)
LARGE = [
    Case(k, tokens=tokens, columns=500, mask=mask, sinks=mask == "none", large=True, seed=tokens)
    for k in ("f32", "f16", "bf16", "q8_0")
    for tokens, mask in ((1, "one"), (1, "none"), (33, "one"), (75, "none"))
]

# Heads that are passed over, in some steps or in all: the decode kernel prepares the next head along with one.
PASSED_OVER = [
    Case(k, group=group, heads=8, columns=500, mask="heads", blind=True, window=True, seed=seed)
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
def baseline():
    """The unpatched library."""
    if not BASELINE.is_dir():
        pytest.skip(f"no unpatched library in {BASELINE}; `make baseline` builds it")
    with Kernels(BASELINE) as running:
        yield running


@pytest.mark.native
@pytest.mark.parametrize("case", RANDOM + LARGE + PASSED_OVER, ids=str)
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
        same = first.tobytes() == second.tobytes()  # pytest takes minutes to tell how bytes differ
        assert same, f"two runs differ by {np.abs(first - second).max()} {where}"
        error = nmse(first, expected)
        assert error <= allowed, f"error {error:.2e}, upstream's {theirs:.2e} {where}"
        error = min(nmse(first, definition) for definition in definitions)
        assert error <= bound, f"error {error:.2e} {where}"


@pytest.mark.native
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_the_kernels_are_ours(ours, upstream, kind, tokens):
    """Else the comparison with upstream's would be one of upstream's with itself."""
    case = Case(kind, tokens=tokens)
    tensors = case.tensors(ours.quantize)
    assert ours.attend(case, tensors, 2)[0].tobytes() != upstream.attend(case, tensors, 2)[0].tobytes()


@pytest.mark.native
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [1, 5, 33, 75])
@pytest.mark.parametrize("given", [{}, {"sinks": True, "softcap": 20.0}])
def test_what_is_no_number_stays_so(ours, kind, tokens, given):
    """Else a model that has gone wrong would look like one that answers."""
    case = Case(kind, tokens=tokens, **given)
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
        "k": TYPES, "v_type": TYPES, "size": HEADS, "group": GROUPS, "tokens": TOKENS, "columns": COLUMNS,
        "streams": (1, 2, 3), "blocks": (0, *BLOCKS), "mask": MASKS, "blind": (True, False), "window": (True, False),
        "cells": ("tokens", "heads"), "sinks": (True, False), "alibi": (0, 8), "softcap": (0, 20), "v_in_k": (True,),
    }.items(),
)  # fmt: skip
def test_every_value_has_partners(field, values):
    """The cases are random, so what they cover is counted."""
    for value in values:
        found = [case for case in RANDOM if ((case.dk, case.dv) if field == "size" else getattr(case, field)) == value]
        if field == "columns":
            found = [case for case in found if not case.blocks]
        assert len({(case.k, case.tokens, case.group) for case in found}) >= 5, value
        assert field == "tokens" or len({case.tokens for case in found}) >= 4, value
        assert any(case.v_type != case.k for case in found) or field == "v_in_k", value
