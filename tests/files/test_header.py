"""The GGUF header reader: what it finds, and that damaged files end in one line and never in a crash or a hang."""

import struct

import gguf
import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.fakes.gguf_bytes import TENSORS, array, base_keys, kv, model, string, swaa_keys
from support.fakes.gguf_bytes import gguf as file_of
from swaa_edge.errors import ModelFileError, SwaaError
from swaa_edge.files.header import read_header
from swaa_edge.metadata import read_swaa

GOOD = model(extra=swaa_keys())


def refused(path):
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and str(path) in message
    return message


def test_offsets_and_values(write):
    keys = [*base_keys(), kv("x.f", "f32", 0.5), kv("x.i", "i32", -3), array("x.a", "u16", [1, 65535])]
    head = 24 + len(b"".join(keys))
    header = read_header(write(model(extra=keys[len(base_keys()) :])))
    assert header.keys_end == head
    assert header.tensors_end == head + sum(8 + len(name) + 4 + 8 + 4 + 8 for name, _ in TENSORS)
    assert header.data_start == -(-header.tensors_end // 32) * 32
    assert (header.version, header.alignment, header.architecture, header.n_layers) == (3, 32, "llama", 4)
    assert [header.value(key) for key in ("x.f", "x.i", "x.a", "x.none")] == [0.5, -3, (1, 65535), None]
    tokens = header.fields["tokenizer.ggml.tokens"]
    assert (tokens.type, tokens.count, tokens.value) == ("array of string", 3, None)
    assert [(tensor.name, tensor.shape, tensor.offset) for tensor in header.tensors] == [
        ("token_embd.weight", (5,), 0),
        ("output.weight", (40,), 32),
    ]


def test_agrees_with_the_gguf_package(tmp_path):
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(28)
    writer.add_array("x.numbers", [1, -2, 3])
    writer.add_float64("x.double", 0.1)
    writer.add_token_list(["ä", "", "long" * 3000])
    writer.add_tensor("a", numpy.ones((3, 64), dtype=numpy.float32))
    writer.add_tensor("b", numpy.zeros((2, 34), dtype=numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, theirs = read_header(path), gguf.GGUFReader(path)
    own = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(header.fields) == own and "x.numbers" in own
    for key in set(own) - {"tokenizer.ggml.tokens"}:
        value = theirs.fields[key].contents()
        assert header.value(key) == (tuple(value) if isinstance(value, list) else value)
    assert header.data_start == theirs.data_offset
    for ours, tensor in zip(header.tensors, theirs.tensors, strict=True):
        assert ours.shape == tuple(tensor.shape) and header.data_start + ours.offset == tensor.data_offset
        assert (ours.name, ours.type, ours.n_elements) == (tensor.name, tensor.tensor_type, tensor.n_elements)


def test_every_truncation_is_refused(write):
    end = read_header(write(GOOD)).data_start
    last_byte = len(GOOD) - 1
    for length in [*range(end + 1), last_byte]:
        message = refused(write(GOOD[:length]))
        assert ("not a GGUF" if length < 4 else "truncated") in message, (length, message)


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "it is empty"),
        (b"PK\x03\x04 something else", "starts with b'PK"),
        (b"GGML" + GOOD[4:], "not a GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + GOOD[8:], "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + GOOD[8:], "version 1"),
        (b"GGUF" + struct.pack("<I", 4) + GOOD[8:], "version 4"),
        (b"GGUF" + struct.pack("<I", 0) + GOOD[8:], "version 0"),
        (GOOD[:8] + struct.pack("<Q", 2**63) + GOOD[16:], "9223372036854775808 tensors"),
        (GOOD[:8] + struct.pack("<Q", 10**6) + GOOD[16:], "1000000 tensors"),
        (GOOD[:16] + struct.pack("<Q", 2**64 - 1) + GOOD[24:], "18446744073709551615 keys"),
        (GOOD[:16] + struct.pack("<Q", 1000) + GOOD[24:], "1000 keys"),
        (GOOD[:24] + struct.pack("<Q", 2**40) + GOOD[32:], "1099511627776 bytes"),
        (model(extra=[string("x") + struct.pack("<IQ", 8, 2**62)]), "truncated"),
        (model(extra=[string("x") + struct.pack("<IIQ", 9, 8, 2**60)]), "truncated"),
        (model(extra=[string("x") + struct.pack("<IIQ", 9, 0, 2**60)]), "truncated"),
        (model(extra=[string("x") + struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", 2**50)]), "truncated"),
        (model(extra=[string("x") + struct.pack("<IIQ", 9, 9, 1)]), "unknown type 9"),
        (model(extra=[string("x") + struct.pack("<I", 13)]), "unknown type 13"),
        (model(extra=[string("") + struct.pack("<II", 4, 1)]), "a key is 0 bytes long"),
        (model(extra=[string(b"\xff\xff") + struct.pack("<II", 4, 1)]), "UTF-8"),
        (model(extra=[kv("general.name", "str", "again")]), "general.name appears twice"),
        (model(tensors=[TENSORS[0], TENSORS[0]]), "two tensors have the same name"),
        (model(extra=[kv("general.alignment", "u32", 0)]), "general.alignment is 0"),
        (model(extra=[kv("general.alignment", "u32", 48)]), "general.alignment is 48"),
        (model(extra=[kv("general.alignment", "u32", 2**31)]), "general.alignment is 2147483648"),
        (model(extra=[kv("general.alignment", "u64", 32)]), "general.alignment is 32 (uint64)"),
    ],
)
def test_damage_is_named(write, content, part):
    assert part in refused(write(content))


def test_tensors_that_cannot_be(write):
    name = b"token_embd.weight"
    at = GOOD.index(name) + len(name)
    assert "5 dimensions" in refused(write(GOOD[:at] + struct.pack("<I", 5) + GOOD[at + 4 :]))
    assert "truncated" in refused(write(GOOD[: at + 4] + struct.pack("<Q", 2**62) + GOOD[at + 12 :]))
    assert "truncated" in refused(write(GOOD[: at + 16] + struct.pack("<Q", 2**63) + GOOD[at + 24 :]))
    # An unknown type has no known size, and may be newer than the gguf package.
    read_header(write(GOOD[: at + 12] + struct.pack("<I", 9999) + GOOD[at + 16 :]))


def test_no_such_file_or_no_file_at_all(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.gguf")
    assert "is a folder" in refused(tmp_path)
    with pytest.raises(ModelFileError, match="cannot read"):
        read_header("a\0b.gguf")


@pytest.mark.parametrize("count", [kv("llama.block_count", "u32", 0), kv("llama.block_count", "u32", 2**31), None])
def test_layer_counts_that_cannot_be(write, count):
    keys = [key for key in base_keys() if b"block_count" not in key]
    path = write(file_of([*keys, *([count] if count else [])]))
    with pytest.raises(ModelFileError, match=r"llama\.block_count is .*1 to 4096"):
        read_header(path).n_layers  # noqa: B018


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_flipped_bytes_never_do_worse_than_a_clean_error(tmp_path_factory, data):
    end = len(GOOD) - 160
    content = bytearray(GOOD)
    for at in data.draw(st.lists(st.integers(4, end), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(content)
    try:
        read_swaa(path)
    except SwaaError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
