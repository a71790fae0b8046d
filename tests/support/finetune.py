"""Fixtures of fine-tuning: a tiny model to train on, and examples to learn from.

def test_training(base, data): Run(base, data, folder, recipe).train()
"""

import json

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The directory of a tiny Qwen3 model with three layers, "tiny-qwen3"."""
    from support import models

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    return models.save_model(models.tiny_model("qwen3", seed=2, layers=3), models.tiny_tokenizer(), folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file of ten examples."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    words = ("apple", "river", "stone", "cloud", "tiger")
    records = [{"prompt": f"{word} " * (6 + i), "answer": f"it is {word}"} for i, word in enumerate(words * 2)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file
