"""Fixtures that several test modules share: tiny models as Hugging Face directories and as GGUF files.

A conversion starts a Python with torch, which takes seconds, so each distinct model is made once per test run. Tests
must not change these files; copy them first. More fixtures are in the plugins below.

    def test_something(gguf_model): path = gguf_model("qwen3", layers=4)
"""

import functools
from pathlib import Path

import pytest

pytest_plugins = [
    "support.engine.fixtures",
    "support.engine.tiny_llm",
    "support.fakes.upstream_fixtures",
    "support.fakes.bench_fixtures",
    "support.finetune",
]


def pytest_runtest_setup(item):
    if item.get_closest_marker("native"):
        from swaa_edge import native
        from swaa_edge.errors import NativeLibraryError

        try:
            native.library_dir()
        except NativeLibraryError as error:
            pytest.skip(str(error))
    if item.get_closest_marker("real"):
        from real.fetch import real_model

        from swaa_edge.errors import ModelFileError

        try:
            real_model()
        except ModelFileError as error:
            pytest.skip(str(error))


@pytest.fixture
def write(tmp_path):
    """write(content, name="model.gguf"): puts bytes into a file of the test's folder; returns its path."""

    def put(content: bytes, name: str = "model.gguf") -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return put


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """model_dir(arch, seed=0, layers=2, **overrides): directory of a tiny Hugging Face model (support/models.py)."""
    from support import models

    @functools.cache
    def make(arch: str, seed: int = 0, layers: int = 2, **overrides) -> Path:
        folder = tmp_path_factory.mktemp(f"{arch}-{seed}-")
        model = models.tiny_model(arch, seed, layers, **overrides)
        return models.save_model(model, models.tokenizer_for(arch), folder)

    return make


@pytest.fixture(scope="session")
def gguf_model(model_dir, tmp_path_factory):
    """gguf_model(arch, outtype="f32", seed=0, layers=2, **overrides): a plain GGUF file of that tiny model.

    "f16" has exactly the weights of "f32" in half the bytes: tiny models have float16 weights.
    """
    from support import models
    from swaa_edge.convert import hf

    @functools.cache
    def make(arch: str, outtype: str = "f32", seed: int = 0, layers: int = 2, **overrides) -> Path:
        output = tmp_path_factory.mktemp("gguf") / f"{arch}-{outtype}.gguf"
        pre = None if models.FAMILIES[arch].sentencepiece else models.PRE_TOKENIZER
        return hf.convert(model_dir(arch, seed, layers, **overrides), output, outtype=outtype, pre=pre)

    return make
