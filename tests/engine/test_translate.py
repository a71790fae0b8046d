"""Errors of llama_cpp and their translations, each with its exact text."""

import jinja2
import pytest

from swaa_edge import native
from swaa_edge.engine.translate import decode_failure, load_failure
from swaa_edge.errors import ConfigError, GenerationCancelled, GenerationError, ModelFileError


@pytest.fixture
def reason(monkeypatch):
    """reason(text): the engine's last error from now on; "" before."""
    said = [""]
    monkeypatch.setattr(native, "last_error", lambda: said[0])
    return lambda text: said.__setitem__(0, text)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            jinja2.TemplateError("Encountered\nunknown tag"),
            ModelFileError,
            "m.gguf has a chat template that is not valid Jinja: Encountered unknown tag",
        ),
        (
            ValueError("Failed to load model from file: m.gguf"),
            ModelFileError,
            "llama.cpp can't load m.gguf; load it with verbose=True to see why",
        ),
        (
            ValueError("Failed to create llama_context"),
            ConfigError,
            "llama.cpp can't make the context: too little memory? lower n_ctx",
        ),
        (
            RuntimeError("Failed to initialize LoRA adapter from lora path: a.gguf"),
            ModelFileError,
            "llama.cpp can't load the LoRA adapter a.gguf; load it with verbose=True to see why",
        ),
    ],
)
def test_failed_loads(reason, error, kind, message):
    found = load_failure(error, "m.gguf", "a.gguf")
    assert (type(found), str(found)) == (kind, message)


def test_the_engines_reason_comes_first(reason):
    reason("swaa.window_size = 0 is out of range")
    for text in ("Failed to load model from file: m.gguf", "Failed to create llama_context"):
        assert str(load_failure(ValueError(text), "m.gguf")) == "swaa.window_size = 0 is out of range"


def test_errors_that_are_clear_stay(reason):
    for error in (KeyboardInterrupt(), ValueError("seed = -3"), RuntimeError("other"), MemoryError()):
        assert load_failure(error, "m.gguf") is error
    error = RuntimeError("something else")
    assert decode_failure(error, [1], n_vocab=8, n_ctx=16) is error


@pytest.mark.parametrize(
    ("code", "tokens", "said", "kind", "message"),
    [
        (2, [1], "", GenerationCancelled, "cancelled"),
        (1, [1, 2], "", GenerationError, "the context of 16 tokens has no room for 2 more; raise n_ctx"),
        (-1, [1, 8], "", GenerationError, "the engine refused 2 tokens; each must be from 0 to 7"),
        (-1, [1], "a token would miss a key", GenerationError, "a token would miss a key"),
        (-1, [1], "", GenerationError, "the engine failed (llama_decode returned -1); too little memory?"),
        # The last error is an older one unless the batch was refused.
        (-3, [1], "old", GenerationError, "the engine failed (llama_decode returned -3); too little memory?"),
    ],
)
def test_failed_evaluations(reason, code, tokens, said, kind, message):
    reason(said)
    found = decode_failure(RuntimeError(f"llama_decode returned {code}"), tokens, n_vocab=8, n_ctx=16)
    assert (type(found), str(found)) == (kind, message)
