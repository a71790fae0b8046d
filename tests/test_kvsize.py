"""The predicted size of K and V: worked out by hand for a tiny file, and equal to what the engine allocates."""

import contextlib
import dataclasses
import itertools

import pytest

from support.fakes.gguf_bytes import array, kv, model
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError
from swaa_edge.files.model import read_model
from swaa_edge.kvsize import FA, SLIDING, SLIDING_FA_DECODE, kv_size, layer_kinds

MIXED = SwaaConfig(200, 20, fa_layers=[1, 3], fa_decode=[0])


@pytest.fixture
def tiny(tmp_path):
    """tiny(*extra keys, arch=..., layers=4): facts of a model with 2 KV heads of 8, so 64 bytes a token and layer."""

    def make(*extra, arch="llama", layers=4):
        (tmp_path / "model.gguf").write_bytes(model(layers, arch=arch, extra=list(extra)))
        return read_model(tmp_path / "model.gguf")

    return make


def test_the_kinds_of_layers():
    assert layer_kinds(MIXED, 5) == [SLIDING_FA_DECODE, FA, SLIDING, FA, SLIDING]
    assert layer_kinds(None, 2) == [FA, FA]


def test_a_ring_holds_window_sinks_and_a_ubatch_in_whole_blocks(tiny):
    size = kv_size(tiny(), MIXED, n_ctx=4000, n_ubatch=36)
    assert (size.full_cells, size.ring_cells, size.streams) == (4096, 256, 1)
    assert size.bytes == {FA: 2 * 64 * 4096, SLIDING_FA_DECODE: 64 * 4096, SLIDING: 64 * 256}
    assert size.total == 3 * 64 * 4096 + 64 * 256
    assert kv_size(tiny(), MIXED, n_ctx=4000, n_ubatch=37).ring_cells == 512


def test_where_there_is_no_ring(tiny):
    full = 4 * 64 * 512
    for swaa, more in (
        (MIXED, {"swa_full": True}),
        (MIXED, {"n_ubatch": 300}),  # as large as the full cache
        (SwaaConfig(200, 20, fa_decode=True), {"n_ubatch": 16}),
        (None, {}),
    ):
        size = kv_size(tiny(), swaa, n_ctx=512, **more)
        assert (size.ring_cells, size.total) == (0, full)
    sections = array("glm4.rope.dimension_sections", "i32", [8, 12, 12, 0])
    for arch, extra, ring in (("qwen2vl", [], 0), ("glm4", [sections], 0), ("glm4", [], 256)):
        assert kv_size(tiny(*extra, arch=arch), MIXED, n_ctx=4096, n_ubatch=16).ring_cells == ring


def test_sequences_share_a_cache_or_have_one_each(tiny):
    shared = kv_size(tiny(), MIXED, n_ctx=4096, n_ubatch=16, n_seq_max=3, kv_unified=True)
    assert (shared.full_cells, shared.ring_cells, shared.streams) == (4096, 768, 1)
    apart = kv_size(tiny(), MIXED, n_ctx=4096, n_ubatch=16, n_seq_max=3)
    assert (apart.full_cells, apart.ring_cells, apart.streams) == (1536, 256, 3)
    assert apart.total == 3 * (3 * 64 * 1536 + 64 * 256)


def test_the_batch_and_the_context_bound_the_ubatch(tiny):
    swaa = SwaaConfig(400, 0)
    for n_ubatch, n_batch, cells in ((512, None, 1024), (512, 100, 512), (100, 512, 512), (112, 512, 512)):
        assert kv_size(tiny(), swaa, n_ctx=0, n_batch=n_batch, n_ubatch=n_ubatch).ring_cells == cells
    assert kv_size(tiny(), None, n_ctx=0).full_cells == 4096  # what the model was trained for


def test_types(tiny):
    extra = [kv("qwen3.attention.key_length", "u32", 64), kv("qwen3.attention.value_length", "u32", 32)]
    found = tiny(*extra, arch="qwen3", layers=1)
    sizes = {"f32": (256, 128), "f16": (128, 64), "bf16": (128, 64), "q8_0": (68, 34), "q4_0": (36, 18)}
    for type_k, type_v in itertools.product(sizes, repeat=2):
        size = kv_size(found, None, n_ctx=256, type_k=type_k, type_v=type_v)
        assert size.total == 2 * (sizes[type_k][0] + sizes[type_v][1]) * 256
    assert kv_size(found, None, n_ctx=256, type_k=8, type_v=1) == kv_size(found, None, n_ctx=256, type_k="q8_0")
    for kind in ("f17", 999):
        with pytest.raises(ConfigError, match=f"type_k = {kind} is not a ggml type; use f16, q8_0 or q4_0"):
            kv_size(found, None, n_ctx=256, type_k=kind)
    with pytest.raises(ConfigError, match="type_v = q4_K has blocks of 256 numbers, but a head has 32"):
        kv_size(found, None, n_ctx=256, type_v="q4_K")


def test_v_without_flash_attention_is_as_wide_as_the_widest_layer(tiny):
    found = dataclasses.replace(tiny(layers=3), n_kv_heads=(1, 4, 2))
    assert kv_size(found, None, n_ctx=256).total == 7 * (8 + 8) * 2 * 256
    assert kv_size(found, None, n_ctx=256, flash_attn=False).total == (7 * 8 + 3 * 4 * 8) * 2 * 256


def test_layers_that_predict_further_tokens_hold_nothing(tiny):
    found = tiny(kv("glm4moe.nextn_predict_layers", "u32", 1), arch="glm4moe")
    assert kv_size(found, None, n_ctx=256).total == 3 * 64 * 256


# Against the engine

SHAPES = [
    {"n_ctx": 300},
    {"n_ctx": 1000, "n_ubatch": 16},
    {"n_ctx": 4096, "n_batch": 100, "n_ubatch": 512},
    {"n_ctx": 4096, "n_ubatch": 64, "n_seq_max": 3},
    {"n_ctx": 4096, "n_ubatch": 64, "n_seq_max": 3, "kv_unified": True},
]
RECIPES = [
    SwaaConfig(100, 7),
    SwaaConfig(600, 10, fa_layers=[1], fa_decode=[0]),
    SwaaConfig(100, 7, fa_decode=True),
    SwaaConfig(2_000_000_000, 7),
    False,
]
# type_k, type_v, flash_attn, swa_full
KINDS = [
    ("f16", "f16", True, False),
    ("q8_0", "q4_0", True, False),
    ("bf16", "f32", True, True),
    ("f16", "f16", False, False),
]


@contextlib.contextmanager
def context_of(llm, type_k, type_v, flash_attn, **parameters):
    """A bare `llama_context *` of a loaded model."""
    import llama_cpp
    from gguf.constants import GGMLQuantizationType

    params = llama_cpp.llama_context_default_params()
    parameters = {"n_batch": 512, "n_ubatch": 512, "n_seq_max": 1, "kv_unified": False} | parameters
    for name, value in parameters.items():
        setattr(params, name, value)
    params.type_k, params.type_v = (int(GGMLQuantizationType[kind.upper()]) for kind in (type_k, type_v))
    params.flash_attn_type = int(flash_attn)
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(llm.model, params)
    assert context
    yield context
    llama_cpp.llama_free(context)


@pytest.mark.native
@pytest.mark.parametrize("arch", ["qwen3", "gemma", "mixtral"])
def test_it_is_what_the_engine_allocates(gguf_model, arch):
    from swaa_edge import SwaaLlama, native

    path = gguf_model(arch, layers=3)
    facts, rings = read_model(path), set()
    for swaa in RECIPES:
        llm = SwaaLlama(path, swaa=swaa, n_ctx=256, n_batch=32, verbose=False)
        for shape, kinds in itertools.product(SHAPES, KINDS):
            type_k, type_v, flash_attn, swa_full = kinds
            size = kv_size(
                facts, llm.swaa, **shape, type_k=type_k, type_v=type_v, flash_attn=flash_attn, swa_full=swa_full
            )
            with context_of(llm, type_k, type_v, flash_attn, swa_full=swa_full, **shape) as context:
                case = (arch, swaa, shape, type_k, type_v, flash_attn, swa_full)
                assert (size.total, size.ring_cells) == (native.kv_bytes(context), native.ring_cells(context)), case
            rings.add(size.ring_cells)
        llm.close()
    assert len(rings) > 4


@pytest.mark.native
def test_a_loaded_model_tells_its_size(gguf_model):
    from swaa_edge import SwaaLlama

    path = gguf_model("qwen3", layers=4)
    for swa_full in (None, True, False):
        llm = SwaaLlama(path, swaa=SwaaConfig(100, 7), swa_full=swa_full, n_ctx=2000, n_ubatch=64, verbose=False)
        size = kv_size(read_model(path), llm.swaa, n_ctx=2000, n_ubatch=64, swa_full=bool(swa_full))
        assert (llm.kv_bytes, bool(size.ring_cells)) == (size.total, not swa_full)
        llm.close()
