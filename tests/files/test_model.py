"""ModelFile: a model's facts, the files of a split model, and what SWAA can't be applied to."""

import os

import pytest

from support.fakes.gguf_bytes import TENSORS, array, kv, model, shard, swaa_keys
from swaa_edge import SwaaConfig
from swaa_edge.errors import ConfigError, ModelFileError, OutputError
from swaa_edge.files.model import output_paths, read_model
from swaa_edge.kvsize import kv_size
from swaa_edge.metadata import read_swaa


def shards(write):
    return [write(shard(number), f"m-{number + 1:05d}-of-00003.gguf") for number in range(3)]


def test_facts(write):
    path = write(model(extra=swaa_keys()))
    found = read_model(path)
    assert (found.name, found.architecture, found.n_layers, found.context_length) == ("tiny", "llama", 4, 4096)
    assert (found.n_heads, found.n_kv_heads, found.key_length, found.value_length) == ((8,) * 4, (2,) * 4, 8, 8)
    assert (found.n_vocab, found.n_parameters, found.file_type, found.tensor_types) == (3, 45, "F32", {"F32": 2})
    assert (found.path, found.paths, found.size) == (path, (path,), path.stat().st_size)
    assert found.refusal is None and not found.has_tokenizer


def test_it_is_handed_on_in_place_of_a_path(write):
    path = write(model(extra=swaa_keys()))
    found = read_model(path)
    path.write_bytes(b"damaged meanwhile")
    assert read_model(found) is found
    assert (os.fspath(found), str(found)) == (str(path), str(path))
    assert found.swaa() == read_swaa(found) == SwaaConfig(2048, 64, (1, 3), (0,))


def test_its_settings_are_those_of_the_file_and_the_overrides(write):
    assert read_model(write(model())).swaa() is None
    found = read_model(write(model(extra=swaa_keys())))
    assert found.swaa({"swaa.window_size": 9}).window_size == 9 and found.swaa({"swaa.enabled": False}) is None
    with pytest.raises(ConfigError, match=r"swaa\.window_size = 'nine' must be int"):
        found.swaa({"swaa.window_size": "nine"})


@pytest.mark.parametrize(("kind", "expected"), [("gpt2", True), ("no_vocab", False), ("none", False), (None, False)])
def test_whether_it_has_a_tokenizer(write, kind, expected):
    extra = [] if kind is None else [kv("tokenizer.ggml.model", "str", kind)]
    assert read_model(write(model(extra=extra))).has_tokenizer is expected


def test_an_adapter_is_refused(write):
    path = write(model(extra=[kv("general.type", "str", "adapter")]))
    with pytest.raises(ModelFileError, match=r"model\.gguf is a LoRA adapter, not a model; give its base model, and"):
        read_model(path)


def test_heads_that_differ_and_sizes_that_are_given(write):
    extra = [kv("qwen3.attention.key_length", "u32", 128), kv("qwen3.attention.value_length", "u32", 64)]
    content = model(3, arch="qwen3", extra=extra, tensors=[])
    one = kv("qwen3.attention.head_count_kv", "u32", 2)
    found = read_model(write(content.replace(one, array("qwen3.attention.head_count_kv", "u32", [1, 2, 4]))))
    assert found.n_kv_heads == (1, 2, 4) and (found.key_length, found.value_length) == (128, 64)
    assert kv_size(found, None, n_ctx=256).total == 7 * (128 + 64) * 256 * 2
    wrong = array("qwen3.attention.head_count_kv", "u32", [1, 2])
    with pytest.raises(
        ModelFileError, match=r"head_count_kv has 2 elements; it must have one whole number for each of the 3 layers"
    ):
        read_model(write(content.replace(one, wrong)))
    with pytest.raises(ModelFileError, match=r"context_length = many must be a whole number"):
        usual = kv("qwen3.context_length", "u32", 4096)
        read_model(write(content.replace(usual, kv("qwen3.context_length", "str", "many"))))


# Files of a split model


def test_a_split_model_is_one_model(write):
    paths = shards(write)
    found = read_model(paths[0])
    assert found.paths == tuple(paths) and [header.path for header in found.headers] == paths
    assert (found.n_parameters, found.size) == (27, sum(path.stat().st_size for path in paths))


def test_the_files_of_a_split_model_are_checked(write):
    paths = shards(write)

    def refused(path, message):
        with pytest.raises(ModelFileError, match=message):
            read_model(path)

    refused(paths[1], r"is file 2 of a split model and has no metadata; give .*m-00001-of-00003\.gguf")
    refused(write(shard(2), "renamed.gguf"), "is file 3 of a split model and has no metadata; give its first file")
    refused(write(shard(0), "renamed.gguf"), r"is the first of 3 files; rename it to NAME-00001-of-00003\.gguf")
    write(shard(2), "m-00002-of-00003.gguf")
    refused(paths[0], r"m-00002-of-00003\.gguf is not file 2 of 3")
    write(shard(1)[:-40], "m-00002-of-00003.gguf")
    refused(paths[0], r"m-00002-of-00003\.gguf is truncated")
    paths[2].unlink()
    refused(paths[0], r"m-00003-of-00003\.gguf is missing; the model has 3 files")
    # Its settings are in the first file, which is there.
    assert read_swaa(paths[0]) is None


def test_names_of_the_files_to_write(tmp_path):
    names = [f"n-{number:05d}-of-00002.gguf" for number in (1, 2)]
    assert output_paths(tmp_path / names[0], 2) == [tmp_path / name for name in names]
    assert output_paths("any.gguf", 1)[0].name == "any.gguf"
    for wrong in ("any.gguf", "n-00002-of-00002.gguf", "n-00001-of-00003.gguf"):
        with pytest.raises(
            OutputError, match=f"split into 2 files, so the output {wrong} must be called NAME-00001-of-"
        ):
            output_paths(wrong, 2)


def test_the_fingerprint_is_of_all_metadata_and_every_tensor(write):
    def fingerprint(**changes):
        return read_model(write(model(**changes))).fingerprint

    others = [
        fingerprint(extra=[kv("x.y", "u32", 1)]),
        *(
            fingerprint(tensors=[(name, [value + (name == changed) for value in values]) for name, values in TENSORS])
            for changed, _ in TENSORS
        ),
    ]
    assert fingerprint() == fingerprint() and len({fingerprint(), *others}) == 4
    paths = shards(write)
    before = read_model(paths[0]).fingerprint
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[:-64] + bytes(64))
    assert read_model(paths[0]).fingerprint != before


# What SWAA can't be applied to


def refusal(write, arch, *extra, layers=4):
    return read_model(write(model(layers, arch=arch, extra=extra))).refusal


@pytest.mark.parametrize(
    ("arch", "extra", "part"),
    [
        ("gemma2", [], "sliding windows of its own"),
        ("gpt-oss", [], "sliding windows of its own"),
        ("llama4", [], "sliding windows of its own"),
        ("gemma3", [kv("gemma3.attention.sliding_window", "u32", 512)], "sliding windows of its own"),
        ("olmo2", [kv("olmo2.attention.sliding_window", "u32", 4096)], "sliding windows of its own"),
        ("deepseek2", [kv("deepseek2.attention.key_length_mla", "u32", 192)], "attention of its own"),
        ("glm-dsa", [], "attention of its own"),
        ("mamba2", [], "recurrent"),
        ("qwen3next", [], "recurrent"),
        ("newhybrid", [kv("newhybrid.ssm.state_size", "u32", 16)], "recurrent"),
        ("bert", [], "not a causal decoder"),
        ("t5", [], "not a causal decoder"),
        ("qwen3", [kv("qwen3.attention.causal", "bool", 0)], "not a causal decoder"),
    ],
)
def test_architectures_that_swaa_cannot_be_applied_to(write, arch, extra, part):
    message = refusal(write, arch, *extra)
    assert part in message and arch in message and "model.gguf" in message and "\n" not in message


@pytest.mark.parametrize(
    ("arch", "extra"),
    [
        ("llama", []),
        ("qwen2", [kv("qwen2.attention.sliding_window", "u32", 32768)]),  # the engine doesn't read it
        ("phi3", [kv("phi3.attention.sliding_window", "u32", 2047)]),  # the engine switches it off
        ("llama4", [kv("llama4.attention.sliding_window", "u32", 0)]),
        ("olmo2", []),
        ("qwen3", [kv("qwen3.attention.causal", "bool", 1)]),
        ("qwen3moe", []),
        ("deepseek2", []),
    ],
)
def test_architectures_that_it_can_be_applied_to(write, arch, extra):
    assert refusal(write, arch, *extra) is None


def test_exaone4_has_windows_of_its_own_at_its_large_size(write):
    assert "windows of its own" in refusal(write, "exaone4", layers=64)
    assert refusal(write, "exaone4", layers=30) is None
