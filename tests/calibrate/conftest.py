"""The tiny model of four layers that the tests of `calibrate` run."""

import contextlib

import pytest


@pytest.fixture(scope="session")
def path(gguf_model):
    return str(gguf_model("qwen3", layers=4))


@pytest.fixture
def load(path):
    """load(swaa, n_ctx): the tiny model, closed when the test ends."""
    from swaa_edge import SwaaLlama

    with contextlib.ExitStack() as stack:

        def make(swaa, n_ctx, **more):
            settings = {"n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
            llm = SwaaLlama(path, swaa=swaa, n_ctx=n_ctx, **settings | more)
            stack.callback(llm.close)
            return llm

        yield make
