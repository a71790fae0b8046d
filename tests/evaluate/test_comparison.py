"""`evaluate.compare` from Python: equal to the command, adapters, files, stopped runs; the example of docs/eval.md."""

import json
import re
import subprocess
import sys
import types

import pytest
from click.testing import CliRunner

from support import ROOT
from support.fakes.evaluate import Reader, fake_engine, write_model
from swaa_edge import SwaaConfig, evaluate
from swaa_edge.cli import cli
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError, GenerationError

FAST = SwaaConfig(60, 4, fa_decode=True)
SMALL = {"tasks": "needle,kv", "prompt_tokens": 200, "samples": 4, "pairs": 5, "beyond": 80}


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    return fake_engine(monkeypatch, tmp_path / "cache")


@pytest.fixture
def file(tmp_path):
    return write_model(tmp_path / "model.gguf")


def test_python_gives_what_the_command_gives(fake, file, tmp_path):
    target = tmp_path / "eval.json"
    comparison = evaluate.compare(
        file, "naive,fast", changes={"window_size": 60, "sink_count": 4}, json_file=str(target), **SMALL
    )
    assert comparison.stopped is None and json.loads(target.read_text()) == comparison.to_dict()
    options = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", value)]
    options[options.index("--tasks")] = "--task"
    arguments = ["eval", file, *options, "--configs", "naive,fast", "--window", 60, "--sinks", 4]
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json", "-"])
    assert result.exit_code == 0 and json.loads(result.stdout) == comparison.to_dict()
    assert CliRunner().invoke(cli, list(map(str, arguments))).stdout == f"{comparison}\n"
    assert list(fake.cache.iterdir()) == [] and Reader.open == 0


def test_configurations_as_values_and_settings_of_the_engine(fake, file):
    engine = EngineSettings(n_ctx=512, n_ubatch=128)
    document = evaluate.compare(file, {"mine": FAST}, engine=engine, **SMALL).to_dict()
    assert [row["config"] for row in document["table"]] == ["full", "mine"]
    assert document["table"][1]["swaa"] == FAST.to_dict()
    assert document["settings"]["engine"] == {
        "n_ctx": 512,
        "n_batch": 512,
        "n_ubatch": 128,
        "n_threads": None,
        "cache_type": "f16",
        "swa_full": False,
        "n_gpu_layers": -1,
        "lora_path": None,
    }
    assert fake.engines == [(engine, str(file))] * 2 and {n_ctx for _, n_ctx in Reader.loaded} == {512}


def test_an_adapter_with_a_recipe_is_left_out_of_full_attention(fake, file, monkeypatch):
    adapter = types.SimpleNamespace(swaa=FAST, fingerprint="a")
    monkeypatch.setattr("swaa_edge.evaluate.comparison.read_lora", lambda path, model: adapter)
    monkeypatch.setattr("swaa_edge.evaluate.comparison.resolve_swaa", lambda *_, **__: None)
    document = evaluate.compare(file, engine=EngineSettings(lora_path="a.gguf"), **SMALL).to_dict()
    assert [row["config"] for row in document["table"]] == ["full", "custom"]
    loaded = {
        bool(config): engine.lora_path for (engine, _), (config, _) in zip(fake.engines, Reader.loaded, strict=True)
    }
    assert loaded == {False: None, True: "a.gguf"}


def test_a_run_that_stops_keeps_its_answers_and_writes_no_file(fake, file, tmp_path):
    target, notes = tmp_path / "eval.json", []
    arguments = {
        "configs": {"mine": FAST},
        "json_file": target,
        "journal_file": tmp_path / "journal",
        "on_note": notes.append,
        **SMALL,
    }
    Reader.fail_at = (5, GenerationError("out of memory"))
    comparison = evaluate.compare(file, **arguments)
    assert str(comparison.stopped) == "out of memory" == comparison.to_dict()["stopped"]
    assert comparison.to_dict()["progress"] == {"answers": 5, "of": 16, "windows": 0, "of_windows": 0, "kept": True}
    assert not target.exists() and notes == [] and sorted(tmp_path.iterdir()) == [tmp_path / "journal", file]
    Reader.fail_at = None
    assert evaluate.compare(file, **arguments).stopped is None and target.exists()
    assert notes == ["resuming after 5 of 16 answers"] and len(Reader.asked) == 16


def test_wrong_questions_are_refused(file):
    with pytest.raises(
        ConfigError, match=r"^there is no scorer same; there are contains, in-order, exact, regex, judge$"
    ):
        evaluate.compare(file, scorer="same")
    with pytest.raises(ConfigError, match=r"^there is no style loud; there are direct, spoken$"):
        evaluate.compare(file, style="loud")
    with pytest.raises(TypeError, match="depth"):
        evaluate.compare(file, depth=0.5)
    assert Reader.loaded == ()


@pytest.mark.native
def test_the_example_of_the_docs(gguf_model, tmp_path):
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "eval.md").read_text(), re.M | re.S)
    (tmp_path / "model.gguf").symlink_to(gguf_model("qwen3", layers=4))
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "eval.json").read_text())
    rows = [f"{row['config']} {row['accuracy']} {row['prefill_ratio']}" for row in document["table"]]
    assert [row.split()[0] for row in rows] == ["full", "naive", "fast"]
    assert done.stdout.splitlines()[-3:] == rows and "95% interval" in done.stdout
