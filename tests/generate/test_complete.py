"""`complete` from Python gives what `swaa-edge run` gives."""

import contextlib

import pytest

from swaa_edge import SwaaConfig


@pytest.mark.native
def test_pieces_text_and_settings(gguf_model):
    from swaa_edge.engine.settings import EngineSettings
    from swaa_edge.generate import complete

    pieces, reports, held = [], [], []

    @contextlib.contextmanager
    def using(llm):
        held.append(llm.n_ctx())
        yield

    found = complete(
        gguf_model("qwen3"),
        "The function returns a list of all keys. " * 5,
        max_tokens=8,
        swaa=SwaaConfig(16, 2),
        engine=EngineSettings(n_ubatch=32, n_threads=2),
        sampling={"temperature": 0.0},
        using=using,
        on_text=pieces.append,
        on_prefill=lambda *at: reports.append(at),
    )
    assert "".join(pieces) == found.text and found.finish_reason == "length"
    assert found.swaa == SwaaConfig(16, 2) and found.policy == "table"
    assert held == [found.n_ctx] == [256]
    assert reports[0] == (0, found.timings.prompt_tokens) and reports[-1][0] == found.timings.prompt_tokens
    assert isinstance(found.seed, int) and found.to_dict()["seed"] == found.seed
