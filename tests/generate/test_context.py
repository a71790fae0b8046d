"""Context sizes: as small as a prompt needs, and not beyond the training context."""

import pytest

from support.fakes import gguf_bytes
from swaa_edge.errors import GenerationError
from swaa_edge.generate import conversation_context, fitting_context


def test_the_context_fits_the_prompt_and_no_more_than_the_model_was_trained_for(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes.model())
    assert fitting_context(path, 4000, 96, None) == 4096
    assert fitting_context(path, 4000, 97, 9000) == 9000
    with pytest.raises(GenerationError) as caught:
        fitting_context(path, 4000, 97, None)
    assert str(caught.value) == (
        "4000 prompt tokens and 97 new tokens exceed the model's training context of 4096 tokens; "
        "shorten the prompt, lower -n, or exceed the training context with --ctx 4097"
    )
    with pytest.raises(GenerationError) as caught:
        fitting_context(path, 10, 5, 14)
    assert str(caught.value) == "--ctx 14 is too small for 10 prompt tokens and 5 new tokens; use 15"


def test_a_conversation_gets_the_training_context_up_to_a_limit(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes.model())
    assert conversation_context(path) == 4096
    assert conversation_context(path, 9000) == 9000
    long = gguf_bytes.model().replace(
        gguf_bytes.kv("llama.context_length", "u32", 4096), gguf_bytes.kv("llama.context_length", "u32", 40960)
    )
    path.write_bytes(long)
    assert conversation_context(path) == 16384
