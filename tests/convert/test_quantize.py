"""Quantization by llama.cpp keeps the metadata of the file, and refuses in one line what it can't do."""

import gguf
import pytest

from swaa_edge import SwaaConfig
from swaa_edge.convert.annotate import annotate
from swaa_edge.convert.quantize import check_type, file_types, quantize
from swaa_edge.errors import ConfigError, ModelFileError, OutputError
from swaa_edge.files.header import read_header

SETTINGS = SwaaConfig(window_size=77, sink_count=5, fa_layers=[1], fa_decode=True, recipe="custom", adapter="tuned")


@pytest.mark.native
def test_an_annotated_file_keeps_its_keys(gguf_model, tmp_path):
    source, output = tmp_path / "full.gguf", tmp_path / "small.gguf"
    annotate(gguf_model("qwen3"), source, SETTINGS)
    assert quantize(source, output, "q4_k_m") == output

    before, after = read_header(source), read_header(output)
    changed = {"general.file_type", "general.quantization_version"}
    keys = {key: (field.type, field.count, field.value) for key, field in before.fields.items() if key not in changed}
    assert {key: (f.type, f.count, f.value) for key, f in after.fields.items() if key not in changed} == keys
    assert keys["swaa.sliding_layers"] == ("array of bool", 2, (True, False))
    assert keys["swaa.fa_decode_layers"] == ("array of bool", 2, (True, False))
    assert after.value("general.file_type") == file_types()["Q4_K_M"]
    assert {t.tensor_type.name for t in gguf.GGUFReader(output).tensors} == {"F32", "Q4_K", "Q6_K"}
    assert output.stat().st_size < source.stat().st_size / 4


@pytest.mark.native
def test_a_quantized_file_is_not_quantized_again(gguf_model, tmp_path):
    quantize(gguf_model("qwen3"), tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(ModelFileError, match=r"q8.gguf is already quantized \(q8_0\)"):
        quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0")
    assert not (tmp_path / "q4.gguf").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Q4_K", "'Q4_K' is not a quantization type; did you mean Q4_K_[SM]. the types are F32, F16, Q4_0, "),
        ("", "'' is not a quantization type; the types are"),
        ("iq1_s", "IQ1_S needs an importance matrix"),
        ("NVFP4", "'NVFP4' is not a quantization type"),
    ],
)
def test_wrong_types_are_refused(name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        quantize(tmp_path / "absent.gguf", tmp_path / "out.gguf", name)


def test_types_are_upstreams():
    assert {"F16": 1, "Q8_0": 7, "Q4_K_M": 15, "IQ4_XS": 30}.items() <= file_types().items()
    assert check_type("iq4_nl") == "IQ4_NL"


def test_bad_files_are_named(gguf_model, tmp_path):
    broken, output = tmp_path / "broken.gguf", tmp_path / "out.gguf"
    whole = gguf_model("qwen3").read_bytes()
    for content in (b"", b"no model", whole[:5000], whole[:-4096]):
        broken.write_bytes(content)
        with pytest.raises(ModelFileError, match=r"broken\.gguf"):
            quantize(broken, output, "Q8_0")
    with pytest.raises(ModelFileError, match=r"absent\.gguf"):
        quantize(tmp_path / "absent.gguf", output, "Q8_0")
    output.write_bytes(b"earlier")
    with pytest.raises(OutputError, match="--force"):
        quantize(gguf_model("qwen3"), output, "Q8_0")
    assert output.read_bytes() == b"earlier"
