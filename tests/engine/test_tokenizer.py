"""Tokens without the weights: the same ones as those of the loaded model."""

import pytest

from support.fakes import gguf_bytes
from swaa_edge.config import SwaaConfig
from swaa_edge.engine.tokenizer import open_vocabulary, tokenize
from swaa_edge.errors import ModelFileError
from swaa_edge.files.model import read_model

pytestmark = pytest.mark.native

TEXT = "Once upon a time, <|im_start|> there were tokens."


def test_the_tokens_of_the_loaded_model(load, path):
    llm = load()
    expected = llm.tokenize(TEXT.encode(), add_bos=True, special=True)
    assert tokenize(path, TEXT) == tokenize(read_model(path), TEXT) == expected
    with open_vocabulary(path) as vocabulary:
        assert vocabulary.n_vocab() == llm.n_vocab()


def test_swaa_keys_are_ignored(path, tmp_path):
    from swaa_edge.convert.annotate import annotate

    annotate(path, tmp_path / "m.gguf", SwaaConfig(24, 2))
    assert tokenize(tmp_path / "m.gguf", TEXT) == tokenize(path, TEXT)


def test_a_model_without_a_tokenizer(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes.model())
    with pytest.raises(ModelFileError) as caught:
        tokenize(file, TEXT)
    assert str(caught.value) == (
        f"{file} has no tokenizer; convert the model again from a folder that holds its tokenizer"
    )


def test_a_vocabulary_that_llama_cpp_refuses(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes.model(extra=[gguf_bytes.kv("tokenizer.ggml.model", "str", "gpt2")]))
    with pytest.raises(ModelFileError) as caught:
        tokenize(file, TEXT)
    assert str(caught.value) == f"{file} has no vocabulary that llama.cpp can read; convert the model again"
