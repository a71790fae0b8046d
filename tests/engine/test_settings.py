"""EngineSettings: what SwaaLlama gets from them, and what is refused."""

import pytest

from swaa_edge.engine.settings import EngineSettings, round_up
from swaa_edge.errors import ConfigError


class Fake:
    """Stands in for SwaaLlama."""

    def __init__(self, model, **arguments):
        self.model, self.arguments = model, arguments


def test_every_setting_arrives_under_llama_cpps_name():
    settings = EngineSettings(4096, 64, 32, 3, "q8_0", True, 5, "a.gguf")
    assert settings.kwargs() == {
        "n_ctx": 4096,
        "n_batch": 64,
        "n_ubatch": 32,
        "n_threads": 3,
        "n_threads_batch": 3,
        "type_k": 8,
        "type_v": 8,
        "swa_full": True,
        "n_gpu_layers": 5,
        "lora_path": "a.gguf",
    }
    assert settings.kwargs(n_ctx=8192)["n_ctx"] == 8192


def test_defaults_leave_the_choice_to_llama_cpp():
    arguments = EngineSettings().kwargs()
    assert "n_ctx" not in arguments
    assert (arguments["n_threads"], arguments["swa_full"], arguments["n_gpu_layers"]) == (None, None, -1)
    assert (arguments["type_k"], arguments["type_v"]) == (1, 1)


def test_a_batch_holds_a_ubatch_by_default():
    assert EngineSettings(n_batch=None).n_batch == EngineSettings().n_batch == 512
    assert EngineSettings(n_batch=None, n_ubatch=2048).n_batch == 2048
    assert EngineSettings(n_batch=None, n_ubatch=64).n_batch == 512


def test_load_makes_the_model_quietly():
    llm = EngineSettings(n_ctx=100).load("m.gguf", swaa=False, n_ctx=256, kind=Fake, seed=3)
    assert llm.model == "m.gguf"
    chosen = {name: llm.arguments[name] for name in ("n_ctx", "swaa", "verbose", "seed")}
    assert chosen == {"n_ctx": 256, "swaa": False, "verbose": False, "seed": 3}


def test_a_cache_type_that_is_not_known():
    with pytest.raises(ConfigError) as caught:
        EngineSettings(cache_type="q4_0")
    assert str(caught.value) == "cache_type = q4_0 must be one of f16, q8_0"


@pytest.mark.parametrize(("n", "rounded"), [(0, 0), (1, 256), (255, 256), (256, 256), (257, 512)])
def test_contexts_are_rounded_up(n, rounded):
    assert round_up(n) == rounded
    assert round_up(n, 1) == n
