"""The swaa.* keys: literal bytes, every way to get one wrong, overrides, and the document that describes them."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import ROOT
from support.fakes.gguf_bytes import array, kv, model, string, swaa_keys
from support.strategies import configs
from swaa_edge import SwaaConfig, metadata
from swaa_edge.errors import ConfigError, ModelFileError
from swaa_edge.files.header import read_header

INT32_MAX = 2**31 - 1


def masks(config, n_layers):
    return config.window_size, config.sink_count, config.sliding_layers(n_layers), config.fa_decode_layers(n_layers)


def test_the_bytes_of_the_keys_are_these():
    count, data = metadata.pack(SwaaConfig(2048, 100, [1], [2], recipe="quality", adapter="my-lora"), n_layers=3)
    assert count == 7
    assert data == (
        b"\x0c\0\0\0\0\0\0\0swaa.version\x04\0\0\0\x01\0\0\0"
        b"\x10\0\0\0\0\0\0\0swaa.window_size\x04\0\0\0\x00\x08\0\0"
        b"\x0f\0\0\0\0\0\0\0swaa.sink_count\x04\0\0\0\x64\0\0\0"
        b"\x13\0\0\0\0\0\0\0swaa.sliding_layers\x09\0\0\0\x07\0\0\0\x03\0\0\0\0\0\0\0\x01\x00\x01"
        b"\x15\0\0\0\0\0\0\0swaa.fa_decode_layers\x09\0\0\0\x07\0\0\0\x03\0\0\0\0\0\0\0\x00\x00\x01"
        b"\x0b\0\0\0\0\0\0\0swaa.recipe\x08\0\0\0\x07\0\0\0\0\0\0\0quality"
        b"\x0c\0\0\0\0\0\0\0swaa.adapter\x08\0\0\0\x07\0\0\0\0\0\0\0my-lora"
    )


def test_reads_keys_into_explicit_layers(write):
    config = metadata.read_swaa(write(model(extra=swaa_keys())))
    assert config == SwaaConfig(2048, 64, (1, 3), (0,)) and config.recipe == "quality"
    assert (config.fa_layers, config.fa_decode) == ((1, 3), (0,))
    assert SwaaConfig.from_gguf(write(model(extra=swaa_keys()))) == config


def test_a_file_without_keys(write):
    path = write(model())
    assert metadata.read_swaa(path) is None
    with pytest.raises(ModelFileError, match=r"has no SWAA keys; .*annotate"):
        SwaaConfig.from_gguf(path)


def test_optional_keys_may_be_absent(write):
    config = metadata.read_swaa(write(model(extra=swaa_keys(recipe=None))))
    assert (config.recipe, config.adapter) == ("custom", None)
    config = metadata.read_swaa(write(model(extra=swaa_keys(adapter=kv("swaa.adapter", "str", "lora")))))
    assert config.adapter == "lora"


def test_unknown_keys_are_left_to_later_writers(write):
    later = kv("swaa.something", "f32", 1.0)
    assert metadata.read_swaa(write(model(extra=swaa_keys(later=later)))).window_size == 2048


def test_a_file_that_is_switched_off(write):
    off = swaa_keys(enabled=kv("swaa.enabled", "bool", 0))
    assert metadata.read_swaa(write(model(extra=off))) is None
    assert metadata.read_swaa(write(model(extra=off)), {"swaa.enabled": True}).window_size == 2048


def flags(name, values, kind="bool"):
    return array(f"swaa.{name}", kind, values)


@pytest.mark.parametrize(
    "changed, parts",
    [
        ({"version": None}, ["swaa.version is missing", "uint32"]),
        ({"window_size": None}, ["swaa.window_size is missing"]),
        ({"sink_count": None}, ["swaa.sink_count is missing"]),
        ({"sliding_layers": None}, ["swaa.sliding_layers is missing", "array of bool"]),
        ({"fa_decode_layers": None}, ["swaa.fa_decode_layers is missing"]),
        ({"version": kv("swaa.version", "u32", 2)}, ["swaa.version = 2", "reads version 1", "newer"]),
        ({"version": kv("swaa.version", "u32", 0)}, ["swaa.version = 0"]),
        ({"version": kv("swaa.version", "i32", 1)}, ["swaa.version = 1", "int32", "must be uint32"]),
        ({"version": kv("swaa.version", "str", "1")}, ["swaa.version = '1'", "string"]),
        ({"window_size": kv("swaa.window_size", "u32", 0)}, ["swaa.window_size = 0", "1 to 2147483647"]),
        ({"window_size": kv("swaa.window_size", "u32", 2**31)}, ["swaa.window_size = 2147483648", "2147483647"]),
        ({"window_size": kv("swaa.window_size", "u64", 9)}, ["swaa.window_size = 9", "uint64"]),
        ({"window_size": kv("swaa.window_size", "f32", 9)}, ["swaa.window_size = 9.0", "float32"]),
        ({"window_size": kv("swaa.window_size", "bool", 1)}, ["swaa.window_size = True", "bool"]),
        ({"window_size": array("swaa.window_size", "u32", [9])}, ["swaa.window_size", "array of uint32"]),
        ({"sink_count": kv("swaa.sink_count", "u32", 2**32 - 1)}, ["swaa.sink_count = 4294967295", "2147483647"]),
        ({"sink_count": kv("swaa.sink_count", "i32", -1)}, ["swaa.sink_count = -1", "int32"]),
        ({"sliding_layers": flags("sliding_layers", [1] * 3)}, ["swaa.sliding_layers has 3", "4 layers"]),
        ({"sliding_layers": flags("sliding_layers", [1] * 5)}, ["swaa.sliding_layers has 5", "4 layers"]),
        ({"sliding_layers": flags("sliding_layers", [])}, ["swaa.sliding_layers has 0"]),
        ({"sliding_layers": flags("sliding_layers", [1] * 20_000)}, ["swaa.sliding_layers has 20000"]),
        ({"sliding_layers": flags("sliding_layers", [0, 1, 2, 1])}, ["swaa.sliding_layers has 2 at layer 2", "0 or 1"]),
        ({"sliding_layers": flags("sliding_layers", [1] * 4, "u8")}, ["swaa.sliding_layers", "array of uint8"]),
        ({"sliding_layers": flags("sliding_layers", ["1"] * 4, "str")}, ["swaa.sliding_layers", "array of string"]),
        ({"sliding_layers": kv("swaa.sliding_layers", "str", "1010")}, ["swaa.sliding_layers = '1010'", "string"]),
        ({"sliding_layers": kv("swaa.sliding_layers", "bool", 1)}, ["swaa.sliding_layers = True", "bool"]),
        ({"fa_decode_layers": flags("fa_decode_layers", [1] * 3)}, ["swaa.fa_decode_layers has 3", "4 layers"]),
        ({"fa_decode_layers": flags("fa_decode_layers", [9] * 4)}, ["swaa.fa_decode_layers has 9 at layer 0"]),
        ({"recipe": kv("swaa.recipe", "u32", 1)}, ["swaa.recipe = 1", "uint32"]),
        ({"recipe": kv("swaa.recipe", "str", "")}, ["swaa.recipe = ''", "255"]),
        ({"recipe": kv("swaa.recipe", "str", "a\nb")}, ["swaa.recipe", "one line"]),
        ({"recipe": kv("swaa.recipe", "str", "x" * 256)}, ["swaa.recipe", "255"]),
        ({"recipe": string("swaa.recipe") + struct.pack("<I", 8) + string(b"\x80" * 9 + b"\n")}, ["swaa.recipe"]),
        ({"adapter": kv("swaa.adapter", "str", "x" * 2_000_000)}, ["swaa.adapter", "255"]),
        ({"adapter": array("swaa.adapter", "str", ["x"])}, ["swaa.adapter", "array of string"]),
        ({"enabled": kv("swaa.enabled", "bool", 3)}, ["swaa.enabled = 3", "0 or 1"]),
        ({"enabled": kv("swaa.enabled", "u32", 1)}, ["swaa.enabled = 1", "uint32"]),
    ],
)
def test_wrong_keys_are_refused_by_key_value_and_limit(write, changed, parts):
    path = write(model(extra=swaa_keys(**changed)))
    with pytest.raises(ModelFileError) as caught:
        metadata.read_swaa(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert all(part in message for part in parts), message
    assert "\n" not in message and len(message) < 300 + len(str(path))


def test_the_version_is_judged_before_all_else(write):
    keys = swaa_keys(version=kv("swaa.version", "u32", 7), window_size=kv("swaa.window_size", "str", "wide"))
    with pytest.raises(ModelFileError, match=r"swaa\.version = 7"):
        metadata.read_swaa(write(model(extra=keys)))


def test_wrong_lengths_are_seen_for_other_layer_counts_and_architectures(write):
    for arch, layers in (("qwen3", 28), ("qwen3moe", 94)):
        assert metadata.read_swaa(write(model(layers, arch=arch, extra=swaa_keys(layers)))).sink_count == 64
        with pytest.raises(ModelFileError, match=f"has 4 elements, but the model has {layers} layers"):
            metadata.read_swaa(write(model(layers, arch=arch, extra=swaa_keys(4))))


def test_a_later_file_of_a_split_model_is_no_place_to_read_from(write):
    later = [kv("split.no", "u16", 1), kv("split.count", "u16", 3)]
    path = write(model(extra=later), "m-00002-of-00003.gguf")
    with pytest.raises(ModelFileError, match=r"give .*m-00001-of-00003\.gguf"):
        metadata.read_swaa(path)


@settings(max_examples=50, deadline=None)
@given(configs, st.integers(1, 127))
def test_file_and_overrides_lose_nothing(tmp_path_factory, config, n_layers):
    folder = tmp_path_factory.getbasetemp()
    plain, keyed = folder / "plain.gguf", folder / "keyed.gguf"
    try:
        count, packed = metadata.pack(config, n_layers)
    except ConfigError:
        with pytest.raises(ConfigError, match=f"the model has {n_layers} layers"):
            metadata.to_kv_overrides(config, n_layers)
        return
    content = model(n_layers, tensors=[])
    plain.write_bytes(content)
    keys_end = read_header(plain).keys_end
    keyed.write_bytes(
        content[:16] + struct.pack("<Q", len(read_header(plain).fields) + count) + content[24:keys_end] + packed
    )
    found = metadata.read_swaa(keyed)
    assert masks(found, n_layers) == masks(config, n_layers)
    assert (found.recipe, found.adapter) == (config.recipe, config.adapter)
    overrides = metadata.to_kv_overrides(config, n_layers)
    for path in (plain, keyed):
        assert masks(metadata.read_swaa(path, overrides), n_layers) == masks(config, n_layers)


def test_overrides_are_what_llama_cpp_takes():
    assert metadata.to_kv_overrides(SwaaConfig(2048, 100, "1::2", [2, 3], recipe="quality"), 5) == {
        "swaa.enabled": True,
        "swaa.version": 1,
        "swaa.window_size": 2048,
        "swaa.sink_count": 100,
        "swaa.tail_count": 0,
        "swaa.sliding_layers": "10101",
        "swaa.fa_decode_layers": "00100",
    }
    assert len(metadata.to_kv_overrides(SwaaConfig(8), 127)["swaa.sliding_layers"]) == 127
    with pytest.raises(ConfigError, match=r"128 layers, but an override holds at most 127; .*annotate"):
        metadata.to_kv_overrides(SwaaConfig(8), 128)
    with pytest.raises(ConfigError, match="fa_layers has layer 5, but the model has 5 layers"):
        metadata.to_kv_overrides(SwaaConfig(8, fa_layers=[5]), 5)


def test_single_overrides_replace_single_keys(write):
    path = write(model(extra=swaa_keys()))
    config = metadata.read_swaa(path, {"swaa.window_size": 512, "swaa.fa_decode_layers": "0010", "other.key": 1.5})
    assert masks(config, 4) == (512, 64, [True, False, True, False], [False, False, True, False])
    assert metadata.read_swaa(path, {"swaa.enabled": False}) is None
    # What is wrong in a file can be put right from outside, or switched off.
    broken = write(model(extra=swaa_keys(sink_count=kv("swaa.sink_count", "str", "many"))))
    assert metadata.read_swaa(broken, {"swaa.sink_count": 1}).sink_count == 1
    assert metadata.read_swaa(broken, {"swaa.enabled": False}) is None


@pytest.mark.parametrize(
    "overrides, parts",
    [
        ({"swaa.window": 5}, ["'swaa.window'", "swaa.window_size"]),
        ({"swaa.window_size": "5"}, ["swaa.window_size = '5'", "int"]),
        ({"swaa.window_size": True}, ["swaa.window_size = True", "int"]),
        ({"swaa.window_size": 0}, ["swaa.window_size = 0", "1 to 2147483647"]),
        ({"swaa.window_size": -5}, ["swaa.window_size = -5"]),
        ({"swaa.version": 2}, ["swaa.version = 2"]),
        ({"swaa.enabled": 0}, ["swaa.enabled = 0", "bool"]),
        ({"swaa.sliding_layers": [True] * 4}, ["swaa.sliding_layers", "text of 0 and 1"]),
        ({"swaa.sliding_layers": "10"}, ["swaa.sliding_layers has 2 elements", "4 layers"]),
        ({"swaa.sliding_layers": "10a1"}, ["swaa.sliding_layers = '10a1'"]),
        ({"swaa.sliding_layers": "1" * 128}, ["swaa.sliding_layers", "127"]),
        ({"swaa.recipe": 5}, ["swaa.recipe = 5", "str"]),
        ({"swaa.padding": "00"}, ["'swaa.padding'"]),
    ],
)
def test_wrong_overrides(write, overrides, parts):
    with pytest.raises((ConfigError, ModelFileError)) as caught:
        metadata.read_swaa(write(model(extra=swaa_keys())), overrides)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_overrides_alone_must_be_whole(write):
    with pytest.raises(ModelFileError, match=r"swaa\.version is missing"):
        metadata.read_swaa(write(model()), {"swaa.window_size": 5})


def test_the_document_says_what_the_code_does():
    document = ROOT / "convert" / "METADATA.md"
    assert document.read_text(encoding="utf-8") == metadata.render_spec(), (
        "convert/METADATA.md is stale; run: python -m swaa_edge.metadata > convert/METADATA.md"
    )
    assert all(f"`{name}`" in metadata.render_spec() for name in [*metadata.KEYS, metadata.PADDING_KEY])
