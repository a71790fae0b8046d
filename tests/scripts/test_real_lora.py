"""scripts/real/lora.py: the questions, the conversations, and where the adapters are kept."""

import json
import re

import pytest
from real import lora
from real.cells import tuned

from support.fakes.real import TEXT


def test_each_document_holds_the_facts_that_its_questions_ask_about():
    records = list(lora.ask_about("docstrings", TEXT))
    assert len(records) == lora.PER_TEXT * len(lora.FACTS)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert re.search(rf"\b{record['answer']}\b", record["prompt"])
        assert len(record["prompt"]) < lora.CHARACTERS + 60 * len(lora.FACTS)
    again = list(lora.ask_about("docstrings", TEXT))
    assert again == records, "the questions are the same in every run"


def test_responses_about_one_document_are_one_conversation(tmp_path):
    def response(name, question, answer):
        return {"id": name, "prompt": f"document {name[0]}", "question": question, "answer": answer}

    records = [response("a/0", "q0", " r0"), response("a/2", "q2", "r2\n"), response("b/1", "q1", "r1")]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    first, second = lora.conversations(path)
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"] * 2
    assert [message["content"] for message in first["messages"]] == ["document a\n\nq0", "r0", "q2", "r2"]
    assert [message["content"] for message in second["messages"]] == ["document b\n\nq1", "r1"]


def test_adapters_of_other_settings_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "BUILD", tmp_path)
    texts = {"docstrings": TEXT, "debian": TEXT}
    assert lora.trained(texts) == {}
    row = tuned()[0]
    folder = lora.folder_of(texts) / row.adapter
    folder.mkdir(parents=True)
    (folder / "swaa_training.json").write_text('{"steps": 3}')
    assert lora.trained(texts) == {}, "an adapter that is still being trained has no GGUF file"
    folder.with_suffix(".gguf").touch()
    assert lora.trained(texts)[row.adapter].training == {"steps": 3}
    assert lora.trained(texts | {"debian": TEXT[1:]}) == {}
    monkeypatch.setitem(lora.TRAIN, "learning_rate", 1e-5)
    assert lora.trained(texts) == {}


@pytest.mark.parametrize("row", tuned(), ids=lambda row: row.adapter)
def test_an_adapter_is_measured_with_the_tail_it_was_trained_with(row):
    assert row.tails == (row.swaa.tail_count,)
    assert row.adapter.endswith(f"-{row.swaa.tail_count}")
