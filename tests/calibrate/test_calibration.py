"""`calibrate` from Python: a choice by the engine's losses, files, a journal; the example of docs/calibrate.md."""

import json

import pytest

from support.docs import run_example
from swaa_edge import SwaaConfig
from swaa_edge.calibrate import calibrate
from swaa_edge.calibrate.settings import CalibrateSettings
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError
from swaa_edge.support.sample_text import real_text


@pytest.mark.native
def test_calibrate_from_python(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "notes.txt"
    text.write_text(real_text()[:4000], encoding="utf-8")
    steps, notes = [], []
    arguments = {
        "text": text,
        "method": "keep",
        "keep": 1,
        "samples": 2,
        "prompt_tokens": 96,
        "answer_tokens": 8,
        "engine": EngineSettings(n_threads=1, n_batch=64, n_ubatch=64),
        "journal_file": str(tmp_path / "journal"),
        "on_progress": steps.append,
        "on_note": notes.append,
    }
    found = calibrate(path, SwaaConfig(16, 2), output=str(tmp_path / "config.json"), **arguments)
    assert found.stopped is None and len(found.config.fa_layers) == 1
    assert SwaaConfig.from_json(tmp_path / "config.json") == found.config
    assert found.written == (str(tmp_path / "config.json"),)
    assert steps[-1].done == steps[-1].total == 2 * (2 + 4) + 2 and notes == []
    document = found.to_dict()
    assert document["prompt_tokens"] == 96 and document["answer_tokens"] == 16 and len(document["ranking"]) == 4
    again = calibrate(path, SwaaConfig(16, 2), json_file=str(tmp_path / "all.json"), **arguments)
    assert again.to_dict() == document == json.loads((tmp_path / "all.json").read_text())
    assert notes == ["resuming after 12 measurements"]


@pytest.mark.native
def test_the_example_of_the_docs(path, tmp_path):
    (tmp_path / "model.gguf").symlink_to(path)
    (tmp_path / "notes.txt").write_text(real_text()[:4000], encoding="utf-8")
    output = run_example("docs/calibrate.md", 0, tmp_path)
    assert "loss saved when only this layer keeps full attention:" in output and "\n--fa-layers " in output


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, -0.5])
def test_keep_is_a_number_of_layers_or_a_fraction(keep):
    with pytest.raises(
        ConfigError, match=f"keep = {keep} must be a number of layers, at least 1, or a fraction such as 0.25"
    ):
        CalibrateSettings(keep=keep)


def test_the_layers_to_keep():
    assert [CalibrateSettings(keep=keep).layers_to_keep(28) for keep in (3, 0.25, 0.01)] == [3, 7, 1]
