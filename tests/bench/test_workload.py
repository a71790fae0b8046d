"""Prompt lengths by default, contexts, and the tokens of prompts."""

import pytest

from swaa_edge.bench.run import LENGTHS
from swaa_edge.bench.workload import Workload, prompt_ids
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.files.model import read_model


@pytest.mark.parametrize(
    "n_ctx, decode, lengths", [(None, 32, (4064,)), (None, 0, (4096,)), (9000, 32, (4096, 8192)), (50, 32, (18,))]
)
def test_default_lengths_are_those_that_fit(bench_model, n_ctx, decode, lengths):
    work = Workload.of(bench_model, None, decode=decode, engine=EngineSettings(n_ctx=n_ctx), default=LENGTHS)
    assert work.lengths == lengths


def test_a_larger_context_goes_beyond_the_training(bench_model):
    work = Workload.of(bench_model, [5000], decode=32, engine=EngineSettings(n_ctx=6000))
    assert work.job(5000).n_ctx == 6144


def test_a_context_holds_the_warm_up(bench_model):
    # A ubatch and one token.
    assert Workload.of(bench_model, [256], decode=0).job(256).n_ctx == 512
    assert Workload.of(bench_model, [255], decode=0).job(255).n_ctx == 256


def test_the_prompt_is_the_same_every_time(bench_model):
    model = read_model(bench_model)
    tokens = prompt_ids(model, 50)
    assert tokens == prompt_ids(model, 50) and len(tokens) == 50
    assert set(tokens) <= {0, 1, 2} and len(set(tokens)) > 1
    assert prompt_ids(model, 20) == tokens[:20]
    work = Workload.of(bench_model, [20, 50], decode=0)
    assert (work.job(20).tokens, work.job(50).tokens, work.prompt) == (tokens[:20], tokens, "random tokens")


@pytest.mark.native
def test_a_model_with_a_tokenizer_gets_real_text(gguf_model):
    model = read_model(gguf_model("qwen3", outtype="f16"))
    tokens = prompt_ids(model, 3000)
    assert len(tokens) == 3000 and len(set(tokens)) > 200
    assert prompt_ids(model, 100) == tokens[:100]
    assert Workload.of(model, [64], decode=0).prompt == "Python's language reference"
