"""Fixtures that several test modules share: tiny checkpoints and the GGUF files made from them.

A conversion starts a Python with torch, which takes seconds, so each distinct model is made once per test run.
Tests must not write to what these return; copy it first.

    def test_something(gguf_model): path = gguf_model("qwen3", layers=4)
"""

import functools
from pathlib import Path

import pytest

pytest_plugins = ["support.engine.fixtures", "support.engine.tiny_llm", "support.fakes.upstream_fixtures"]


def pytest_runtest_setup(item):
    if item.get_closest_marker("native"):
        from swaa_edge import native
        from swaa_edge.errors import NativeLibraryError

        try:
            native.library_dir()
        except NativeLibraryError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(arch, seed=0, layers=2, **overrides): folder of a tiny Hugging Face checkpoint (see models.py)."""
    from support import models

    @functools.cache
    def make(arch: str, seed: int = 0, layers: int = 2, **overrides) -> Path:
        folder = tmp_path_factory.mktemp(f"{arch}-{seed}-")
        model = models.tiny_model(arch, seed, layers, **overrides)
        return models.save_checkpoint(model, models.tokenizer_for(arch), folder)

    return make


@pytest.fixture(scope="session")
def gguf_model(checkpoint, tmp_path_factory):
    """gguf_model(arch, outtype="f32", seed=0, layers=2, **overrides): a plain GGUF of that tiny checkpoint.

    "f16" holds exactly the weights of "f32", in half the bytes: tiny models have float16 weights.
    """
    from support import models
    from swaa_edge.convert import hf

    @functools.cache
    def make(arch: str, outtype: str = "f32", seed: int = 0, layers: int = 2, **overrides) -> Path:
        output = tmp_path_factory.mktemp("gguf") / f"{arch}-{outtype}.gguf"
        pre = None if models.FAMILIES[arch].sentencepiece else models.PRE_TOKENIZER
        return hf.convert(checkpoint(arch, seed, layers, **overrides), output, outtype=outtype, pre=pre)

    return make
