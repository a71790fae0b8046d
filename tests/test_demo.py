"""The demo: end to end with a short prompt, and what it says when something is missing."""

import json

import pytest
from click.testing import CliRunner

from swaa_edge import SwaaConfig
from swaa_edge.cli import cli

TABLE = {
    "table": [
        {"config": "full", "prefill_seconds": 12.0, "prefill_tok_s": 1365.3, "prefill_ratio": 1.0, "decode_tok_s": 30.5,
         "tokens": [5, 6], "text": "a \"b\"\n", "swaa": None},
        {"config": "balanced", "prefill_seconds": 6.0, "prefill_tok_s": 2730.7, "prefill_ratio": 2.0,
         "decode_tok_s": None, "tokens": [7], "text": "x" * 40, "swaa": {}},
    ],
    "prompt_tokens": 16384, "prompt": "Python's language reference", "model": {}, "kept": "DIR/demo-Q4_K_M.gguf",
}  # fmt: skip


def run(*args):
    return CliRunner().invoke(cli, ["demo", *map(str, args)], prog_name="swaa-edge")


@pytest.mark.native
def test_the_table_by_its_text():
    # Native: the module derives from llama_cpp's class.
    from swaa_edge.cli.demo import table

    assert table(TABLE) == """\
prompt: 16,384 tokens of Python's language reference

config      prefill    tok/s  ratio  decode tok/s  first tokens
full         12.0 s    1,365  1.00x          30.5  "a \\"b\\"\\n"
balanced      6.0 s    2,731  2.00x             -  "xxxxxxxxxxxxxxxxxxxxxxxx"

The model has random weights, so what it writes is noise; the times are what counts. They depend on a model's
shape and not on its weights. Ratio: full attention's prefill time over this one's.
kept: DIR/demo-Q4_K_M.gguf"""


@pytest.mark.native
def test_the_whole_way_with_a_short_prompt(tmp_path):
    pytest.importorskip("transformers")
    keep = tmp_path / "demo"
    result = run("--json", "--keep", keep, "--prompt-tokens", 700)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    report = json.loads(result.stdout)
    rows = {row["config"]: row for row in report["table"]}
    assert list(rows) == ["full", "quality", "balanced", "fast"] and report["prompt_tokens"] == 700
    full = rows["full"]
    for row in rows.values():
        assert row["prefill_seconds"] > 0 and len(row["tokens"]) == 16
        assert row["prefill_tok_s"] == pytest.approx(700 / row["prefill_seconds"], rel=1e-6)
        assert row["prefill_ratio"] == pytest.approx(full["prefill_seconds"] / row["prefill_seconds"])
        # Within the window of 2048 every configuration computes the same.
        assert row["tokens"] == full["tokens"] and row["text"] == full["text"]
    assert full["swaa"] is None and rows["fast"]["swaa"]["fa_layers"] in ("none", [])
    assert rows["quality"]["swaa"]["fa_layers"] == [1, 3]
    assert SwaaConfig.from_gguf(report["kept"]) == SwaaConfig(2048, 100, [1], True)
    assert (keep / "checkpoint" / "model.safetensors").is_file() and (keep / "checkpoint" / "tokenizer.json").is_file()
    again = run("--keep", keep)
    assert again.exit_code == 1
    assert again.stderr == f"Error: {keep} is there already and not an empty folder; choose another\n"


@pytest.mark.native
def test_a_longer_prompt_than_the_text_is_refused(tmp_path, monkeypatch):
    from swaa_edge import demo

    monkeypatch.setattr("swaa_edge.vocabulary.tokenize", lambda path, text: list(range(100)))
    assert demo._prompt(tmp_path, 100) == list(range(100))
    with pytest.raises(ValueError, match="prompt_tokens = 101 is out of range: the text has 100 tokens"):
        demo._prompt(tmp_path, 101)


@pytest.mark.native
def test_missing_packages_are_one_line(monkeypatch, tmp_path):
    import importlib.util

    found = importlib.util.find_spec

    def no_torch(name, *rest):
        return None if name == "torch" else found(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", no_torch)
    result = run("--keep", tmp_path / "demo")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: the demo makes a model, which needs torch; pip install 'swaa-edge[convert]'\n"
    assert not (tmp_path / "demo").exists()
