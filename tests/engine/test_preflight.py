"""What is refused before llama.cpp sees it, and the overrides that it gets."""

import pytest

from support.fakes import gguf_bytes
from swaa_edge.config import SwaaConfig
from swaa_edge.engine.preflight import ResolvedSwaa, check_context, check_tokenizer, labelled, resolve_swaa
from swaa_edge.errors import ConfigError, ModelFileError, UnsupportedModelError

CONFIG = SwaaConfig(7, 3, fa_layers="1::2", fa_decode=[0], recipe="mine")
IN_FILE = [
    gguf_bytes.kv("swaa.version", "u32", 1),
    gguf_bytes.kv("swaa.window_size", "u32", 9),
    gguf_bytes.kv("swaa.sink_count", "u32", 2),
    gguf_bytes.array("swaa.sliding_layers", "bool", [1, 1, 0, 1]),
    gguf_bytes.array("swaa.fa_decode_layers", "bool", [0, 0, 0, 0]),
    gguf_bytes.kv("swaa.recipe", "str", "theirs"),
]


@pytest.fixture
def model(tmp_path):
    """model(**as gguf_bytes.model): the path of a file of four layers, without weights that could run."""

    def write(**options):
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes.model(**options))
        return str(path)

    return write


def test_a_config_becomes_overrides(model):
    resolved = resolve_swaa(model(), CONFIG, {"general.name": "x"})
    assert resolved.kv_overrides == {
        "general.name": "x",
        "swaa.enabled": True,
        "swaa.version": 1,
        "swaa.window_size": 7,
        "swaa.sink_count": 3,
        "swaa.tail_count": 0,
        "swaa.sliding_layers": "1010",
        "swaa.fa_decode_layers": "1000",
    }
    meant = resolved.config
    assert (meant.window_size, meant.fa_layers, meant.fa_decode, meant.recipe) == (7, (1, 3), (0,), "mine")


def test_without_a_config_the_file_decides(model):
    assert resolve_swaa(model(), None, None) == ResolvedSwaa(None, None)
    resolved = resolve_swaa(model(extra=IN_FILE), None, None)
    assert resolved.kv_overrides is None
    assert (resolved.config, resolved.config.recipe) == (SwaaConfig(9, 2, [2]), "theirs")


def test_a_config_replaces_the_files(model):
    resolved = resolve_swaa(model(extra=IN_FILE), CONFIG, None)
    assert resolved.kv_overrides["swaa.sliding_layers"] == "1010"
    assert (resolved.config.window_size, resolved.config.recipe) == (7, "mine")


def test_off_is_one_override_and_helps_where_the_keys_are_wrong(model):
    wrong = [*IN_FILE[:2], gguf_bytes.kv("swaa.sink_count", "f32", 2.0), *IN_FILE[3:]]
    assert resolve_swaa(model(extra=wrong), False, None) == ResolvedSwaa({"swaa.enabled": False}, None)
    with pytest.raises(ModelFileError, match=r"swaa\.sink_count = 2\.0 has the type float32; it must be uint32"):
        resolve_swaa(model(extra=wrong), None, None)


def test_the_callers_own_overrides_are_checked_too(model):
    path = model(extra=IN_FILE)
    assert resolve_swaa(path, None, {"swaa.window_size": 5}).config.window_size == 5
    with pytest.raises(ModelFileError, match=r"swaa\.window_size = 0 is out of range"):
        resolve_swaa(path, None, {"swaa.window_size": 0})
    with pytest.raises(ConfigError) as caught:
        resolve_swaa(path, CONFIG, {"swaa.window_size": 5})
    assert str(caught.value) == (
        "kv_overrides has swaa.window_size, and swaa is given too; give SWAA settings in one of them"
    )


def test_an_architecture_that_cannot_slide(model):
    path = model(arch="gpt-oss")
    with pytest.raises(UnsupportedModelError, match="SWAA can't be applied to the architecture gpt-oss, which has"):
        resolve_swaa(path, CONFIG, None)
    assert resolve_swaa(path, None, None) == ResolvedSwaa(None, None)


@pytest.mark.parametrize("swaa", [True, {"window_size": 3}, "balanced", 5])
def test_what_swaa_may_be(model, swaa):
    with pytest.raises(
        ConfigError, match="must be a SwaaConfig, None for the settings in the file, or False for full attention"
    ):
        resolve_swaa(model(), swaa, None)


def test_files_that_are_no_model(tmp_path):
    missing = tmp_path / "missing.gguf"
    with pytest.raises(ModelFileError, match="does not exist"):
        resolve_swaa(str(missing), None, None)
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf_bytes.model()[:-40])
    with pytest.raises(ModelFileError, match="truncated"):
        resolve_swaa(str(short), None, None)


def test_a_layer_that_the_model_lacks(model):
    with pytest.raises(ConfigError, match="fa_layers has layer 4, but the model has 4 layers: 0 to 3"):
        resolve_swaa(model(), SwaaConfig(8, fa_layers=[4]), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_ctx": -1}, "n_ctx = -1 is out of range: 0 to 2147483647"),
        ({"n_ctx": "512"}, "n_ctx = '512' must be a whole number from 0 to 2147483647"),
        ({"n_batch": 0}, "n_batch = 0 is out of range: 1 to 16384"),
        ({"n_ubatch": 20000}, "n_ubatch = 20000 is out of range: 1 to 16384"),
        ({"n_threads": 513}, "n_threads = 513 is out of range: 1 to 512"),
        (
            {"flash_attn": False, "type_v": 8},
            "a quantized V cache (type_v) needs flash attention; leave flash_attn on, or use type_v = f16",
        ),
    ],
)
def test_contexts_that_llama_cpp_would_not_survive_or_not_explain(settings, message):
    with pytest.raises(ConfigError) as caught:
        check_context(**{"flash_attn": True} | settings)
    assert str(caught.value) == message


def test_contexts_that_are_fine():
    check_context(flash_attn=False, type_v=1, n_ctx=0, n_batch=1, n_ubatch=16384, seed=3)
    check_context(flash_attn=True, type_k=8, type_v=8)


@pytest.mark.parametrize(
    ("sliding", "fa_decode", "expected"),
    [
        ("1111", "1111", SwaaConfig(7, 3, (), True)),
        ("1010", "1010", SwaaConfig(7, 3, (1, 3), True)),
        ("1010", "0000", SwaaConfig(7, 3, (1, 3), False)),
        ("1011", "0010", SwaaConfig(7, 3, (1,), (2,))),
        ("0000", "0000", SwaaConfig(7, 3, (0, 1, 2, 3), False)),
    ],
)
def test_the_settings_in_force_are_written_as_a_file_would_be_read(sliding, fa_decode, expected):
    reported = SwaaConfig.from_layers(7, 3, list(map(int, sliding)), list(map(int, fa_decode)))
    found = labelled(reported, SwaaConfig(7, recipe="mine", adapter="lora"))
    assert (found, found.recipe, found.adapter) == (expected, "mine", "lora")
    assert labelled(reported, None).recipe == "custom"
    assert labelled(None, None) is None


@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_a_model_without_a_tokenizer_is_refused(model, kind):
    path = model(extra=[] if kind is None else [gguf_bytes.kv("tokenizer.ggml.model", "str", kind)])
    with pytest.raises(ModelFileError, match="no tokenizer; convert the model again"):
        check_tokenizer(path)
    check_tokenizer(model(extra=[gguf_bytes.kv("tokenizer.ggml.model", "str", "gpt2")]))
