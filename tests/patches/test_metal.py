"""Metal's flash attention without a Mac: the kernels and their host code run in an emulator (support/metal/).

First upstream's kernels, which validate the emulator; then ours with and without a table; then mutants, each of which
must be noticed.

    pytest tests/patches/test_metal.py
"""

import functools
import re
import sys
from pathlib import Path

import mutate
import pytest

from support import ROOT
from support.metal import attention, build, cases, mutants

VENDOR = ROOT / "vendor"
CACHE = ROOT / "build" / "metal"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the emulator is for Linux; a Mac runs test-backend-ops"
)
# The emulated host code calls libggml-base. In CI the mark also turns a skip for want of clang into a failure.
emulated = pytest.mark.native


MUTATIONS = mutate.read_mutations(mutants.MUTATIONS)


@pytest.fixture(scope="module")
def library():
    """library(tree): the emulator of a tree below vendor/, "llama.cpp" or "llama.cpp-patched"."""
    from swaa_edge import native

    @functools.cache
    def make(name: str) -> Path:
        if not (VENDOR / name).is_dir():
            pytest.skip(f"no {VENDOR / name}; `make setup` makes it")
        try:
            return build.build(VENDOR / name, native.library_dir(), CACHE)
        except build.MissingCompiler as error:
            pytest.skip(str(error))

    return make


@pytest.fixture(scope="module")
def lab():
    from swaa_edge import native

    try:
        build.compiler()
    except build.MissingCompiler as error:
        pytest.skip(str(error))
    lab = mutants.Lab(VENDOR / "llama.cpp-patched", native.library_dir(), CACHE)
    assert lab.killer(None) is None, "the unbroken kernels fail, so mutants prove nothing"
    return lab


@emulated
@pytest.mark.parametrize("group", cases.PLAIN)
def test_the_emulator_runs_upstream_kernels_and_ours_compute_the_same_bits(library, group):
    upstream = attention.run(library("llama.cpp"), cases.PLAIN[group])
    ours = attention.run(library("llama.cpp-patched"), cases.PLAIN[group])
    assert attention.complaints(cases.PLAIN[group], upstream) == []
    assert [result["digest"] for result in ours] == [result["digest"] for result in upstream]
    assert not any("kvb=1" in name or "pm=1" in name for result in ours for name in result["pipelines"])


@emulated
@pytest.mark.parametrize("group", cases.TABLE)
def test_through_a_table(library, group):
    results = attention.run(library("llama.cpp-patched"), cases.TABLE[group])
    assert attention.complaints(cases.TABLE[group], results) == []
    for case, result in zip(cases.TABLE[group], results, strict=True):
        names = "\n".join(result["pipelines"])
        assert re.search("kvb=1", names), (case, names)
        assert ("pm=1" in names) == case.past, (case, names)
        assert "kernel_flash_attn_ext_pad" not in names and "vec_idx" not in names


@emulated
def test_every_type_and_kernel_of_upstream_has_run_through_a_table(library):
    results = attention.run(library("llama.cpp-patched"), cases.TABLE["types"])
    ran = {name.split("_mask=")[0].split("_kvb=")[0] for r in results for name in r["pipelines"] if "kvb=1" in name}
    quantized = {t for t in build.TYPES if t.startswith("q")}
    assert ran == {
        *(f"kernel_flash_attn_ext_{kind}{t}_dk128_dv128" for t in build.TYPES for kind in ("", "vec_")),
        *(f"kernel_flash_attn_ext_kv_{t}_f16" for t in quantized),
    }
    instance = re.compile(r'"kernel_flash_attn_ext_(?:vec_)?([a-z0-9_]+)_dk')
    sources = (VENDOR / "llama.cpp" / build.METAL / "kernels").glob("fa*.metal")
    upstream = {t for path in sources for t in instance.findall(path.read_text())}
    assert upstream == set(build.TYPES)


@emulated
def test_the_backend_supports_tables(library):
    assert attention.Emulator(library("llama.cpp-patched")).lib.emu_supports_kv_blocks() == 1
    assert attention.Emulator(library("llama.cpp")).lib.emu_supports_kv_blocks() == -1


def test_headers_that_the_kernels_include_are_those_that_the_build_embeds():
    """With GGML_METAL_EMBED_LIBRARY the build replaces these #include lines by the files; others would remain."""
    tree = VENDOR / "llama.cpp-patched" / build.METAL
    if not tree.is_dir():
        pytest.skip(f"no {tree}; `make setup` makes it")
    embedded = {
        "common.h",
        "dequantize.h",
        "quantize.h",
        "fa_common.metal",
        "fa_vec_common.metal",
        "ggml-metal-impl.h",
        "ggml-common.h",
    }
    paths = [*(tree / "kernels").iterdir(), tree / "ggml-metal-impl.h"]
    assert len(paths) > 30
    included = {name for path in paths for name in re.findall(r'^\s*#include "(.*)"', path.read_text(), re.M)}
    assert included <= embedded


def test_mutations_fit_the_patched_tree():
    assert len(MUTATIONS) >= 20
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert mutate.stale(VENDOR / "llama.cpp-patched", MUTATIONS) == []


@emulated
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutant_is_noticed(lab, mutation):
    assert lab.killer(mutation) is not None, f"{mutation.name} has survived"
