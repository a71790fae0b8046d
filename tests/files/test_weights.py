"""safetensors files: each tensor's type, shape and bytes, and the errors for damaged files."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from swaa_edge.errors import ModelFileError, SwaaError
from swaa_edge.files.weights import fingerprint, read_tensors

RNG = np.random.default_rng(5)
TENSORS = {
    "b": RNG.standard_normal((3, 5)).astype(np.float32),
    "a": RNG.standard_normal(7).astype(np.float16),
    "flags": np.array([True, False, True]),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_types_shapes_and_bytes(path):
    found, content = read_tensors(path), path.read_bytes()
    assert found.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert found[name].shape == expected.shape, name
        assert content[found[name].data.start : found[name].data.stop] == expected.tobytes(), name
    assert [found[name].dtype for name in ("b", "a", "flags")] == ["F32", "F16", "BOOL"]


def test_types_that_numpy_does_not_have(tmp_path):
    held = {
        "x": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "y": {"dtype": "F8_E4M3", "shape": [5], "data_offsets": [12, 17]},
    }
    header = json.dumps(held).encode()
    path = tmp_path / "new.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(17))
    found, start = read_tensors(path), 8 + len(header)
    assert (found["x"].dtype, found["x"].data) == ("BF16", range(start, start + 12))
    assert (found["y"].dtype, found["y"].data) == ("F8_E4M3", range(start + 12, start + 17))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is not a safetensors file; download it again"),
        (lambda data: b"\xff" * len(data), "is not a safetensors file"),
        (lambda data: data[:8] + b"?" + data[9:], "is not a safetensors file"),
        (lambda data: data[:100], "is truncated: its header does not fit its 100 bytes; download it again"),
        (lambda data: data[:-1], r"is truncated: its header does not fit its \d+ bytes"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file itself"),
    ],
)
def test_damage_is_named(path, damage, message):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelFileError, match=f"^{path} {message}"):
        read_tensors(path)


def test_without_the_package(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(SwaaError, match=r"need safetensors; pip install 'swaa-edge\[convert\]'"):
        read_tensors(path)


def test_the_fingerprint_samples_the_middle_of_each_tensor(tmp_path):
    path = tmp_path / "data"
    content = RNG.bytes(50_000)
    parts = [(path, range(8, 100), [range(100, 20_100), range(20_100, 20_107)])]

    def changed(at):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        return fingerprint(parts)

    path.write_bytes(content)
    same = fingerprint(parts)
    middle = range(100 + (20_000 - 4096) // 2, 100 + (20_000 + 4096) // 2)
    assert all(changed(at) != same for at in (8, 99, middle[0], middle[-1], 20_100, 20_106))
    assert all(changed(at) == same for at in (7, middle.start - 1, middle.stop, 20_107))
