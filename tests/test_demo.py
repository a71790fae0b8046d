"""The demo: its text, its JSON, and that the model in the package does what the demo shows."""

import dataclasses
import hashlib
import importlib.util
import json

import pytest
from click.testing import CliRunner

from support import ROOT
from swaa_edge import SwaaConfig
from swaa_edge.cli import cli
from swaa_edge.evaluate.table import speed_up

TASKS = ("needle", "multi-needle", "kv", "chain")


def run(*args):
    return CliRunner().invoke(cli, ["demo", *map(str, args)], prog_name="swaa-edge")


def test_recipes_at_the_size_of_the_model():
    from swaa_edge.config import RECIPES
    from swaa_edge.demo import SINKS, TAIL, WINDOW, configurations

    configs = configurations()
    assert list(configs) == ["full", "naive", *RECIPES, "fast, no tail", "calibrated"]
    assert configs["full"] is False and configs["naive"] == SwaaConfig(WINDOW)
    for name, recipe in RECIPES.items():
        tail = TAIL if recipe.config.fa_decode else 0
        sized = {"window_size": WINDOW, "sink_count": SINKS, "tail_count": tail}
        assert configs[name] == dataclasses.replace(recipe.config, **sized)
    assert configs["fast, no tail"] == dataclasses.replace(configs["fast"], tail_count=0)


@pytest.mark.native
def test_what_the_demo_shows_is_so(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("swaa_edge.demo.LONG", 4096)
    plot = tmp_path / "demo.png"
    result = run("--json", "--samples", 2, "--plot", plot, "--threads", 2)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    report = json.loads(result.stdout)
    rows = {row["config"]: row for row in report["table"]}
    assert list(rows) == [
        "full",
        "naive",
        "quality",
        "balanced",
        "early",
        "fast",
        "memory",
        "stream",
        "fast, no tail",
        "calibrated",
    ]
    for shown in rows.values():
        assert 0 <= shown["accuracy"] <= 1 and shown["prefill_seconds"] > 0 and shown["prefill_ratio"] > 0
        assert shown["samples"] == 8
    assert rows["full"]["accuracy"] >= 7 / 8 and rows["naive"]["accuracy"] <= 1 / 8
    assert rows["calibrated"]["accuracy"] >= 7 / 8
    # With their tails the recipes are as good as full attention; without, half of the answers come too early.
    assert all(rows[name]["accuracy"] >= 7 / 8 for name in ("quality", "balanced", "fast"))
    assert 2 / 8 <= rows["fast, no tail"]["accuracy"] <= 6 / 8
    timed = report["long_prompt"]
    assert (timed["prompt_tokens"], timed["config"]) == (4096, "fast")
    assert timed["prefill_ratio"] == timed["full_seconds"] / timed["seconds"]
    end = f", and evaluates a prompt of 4,096 tokens at a {speed_up(timed['prefill_ratio'])}."
    assert report["conclusion"].startswith("fast keeps ") and report["conclusion"].endswith(end)
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
    assert list((tmp_path / "cache").rglob("*.jsonl")) == []


def test_the_text_ends_with_the_long_prompt_and_the_conclusion(monkeypatch):
    from swaa_edge import demo

    monkeypatch.setattr(demo.Comparison, "__str__", lambda self: f"table, {self.document['conclusion']}")
    timed = {"shape": "s", "layers": 2, "prompt_tokens": 16384, "config": "fast", "full_seconds": 9.04, "seconds": 3.0}
    document = {"conclusion": "One sentence.", "long_prompt": timed | {"prefill_ratio": 3.013}}
    line = "prefill of 16,384 tokens in 2 layers of s: full attention 9.0 s, fast 3.0 s, ratio 3.01x"
    assert str(demo.Demo(document)) == f"table, None\n\n{line}\n\nOne sentence."
    assert str(demo.Demo(document | {"long_prompt": None})) == "table, One sentence."


@pytest.mark.parametrize(
    ("options", "found", "end"),
    [
        (["--plot", "a.png"], object(), "\n\nplot: a.png\n"),
        ([], object(), "\n\nplot: swaa-edge-demo.png\n"),
        ([], None, "\n\nno plot: it needs matplotlib; pip install 'swaa-edge[plot]'\n"),
        (["--no-plot"], object(), "the table\n"),
    ],
)
def test_the_command_prints_the_table_and_the_plots_name(monkeypatch, options, found, end):
    from swaa_edge import demo

    asked = {}

    class Shown:
        stopped = None

        def __str__(self):
            return "the table"

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(demo, "demo", lambda **given: asked.update(given) or Shown())
    result = run("--samples", 3, *options)
    assert result.exit_code == 0 and result.stdout == "the table" + end.removeprefix("the table")
    assert asked["samples"] == 3 and (asked["plot_file"] is None) == (not end.startswith("\n\nplot"))


def test_the_model_ships_small_and_plain():
    from swaa_edge.demo import CONTEXT, MODEL
    from swaa_edge.files.model import read_model
    from swaa_edge.metadata import read_swaa

    model = read_model(MODEL)
    assert model.architecture == "qwen3" and model.n_layers == 8 and model.context_length == CONTEXT
    assert MODEL.stat().st_size < 12_000_000 and read_swaa(MODEL) is None
    assert model.header.value("tokenizer.chat_template")
    log = [json.loads(line) for line in (MODEL.parent / "train-log.jsonl").read_text(encoding="utf-8").splitlines()]
    recipe = json.loads((MODEL.parent / "train-recipe.json").read_text(encoding="utf-8"))
    assert log[-1]["step"] + 1 == sum(stage["steps"] for stage in recipe["curriculum"])
    assert all(len(source["sha256"]) == 64 for source in recipe["text"])


def test_the_results_are_of_this_model_and_support_the_page():
    document = json.loads((ROOT / "docs" / "results" / "demo.json").read_text(encoding="utf-8"))
    model = (ROOT / "swaa_edge" / "models" / document["model"]["file"]).read_bytes()
    assert hashlib.sha256(model).hexdigest() == document["model"]["sha256"]
    rows = {row["config"]: row for row in document["table"]}
    assert all(cell["samples"] >= 200 for row in rows.values() for cell in row["tasks"].values())
    from swaa_edge.demo import CHOSEN

    assert tuple(document["calibration"]["greedy"]["chosen"]) == CHOSEN
    full, naive = rows["full"]["tasks"], rows["naive"]["tasks"]
    # No strategy alone recovers everything, a combination keeps at least nine tenths, calibrated layers beat patterns.
    mean = {name: row["accuracy"] for name, row in rows.items()}
    for alone in ("sinks", "FA decode", "interleaving"):
        assert mean[alone] < 0.9 * mean["full"], alone
    assert mean["quarter calibrated"] >= 0.9 * mean["full"]
    assert all(mean["quarter calibrated"] > mean[f"quarter {offset}::4"] for offset in range(4))
    # LoRA lifts the presets out of their intervals, the best to within two points of full attention.
    for name in ("sinks + FA decode", "quarter 1::4"):
        assert rows[f"{name} + LoRA"]["interval"][0] > rows[name]["interval"][1]
    assert max(value for name, value in mean.items() if name.endswith("LoRA")) >= mean["full"] - 0.02
    for task in TASKS:
        assert full[task]["accuracy"] >= (0.95 if "needle" in task else 0.9), task
        assert naive[task]["accuracy"] <= 0.15, task


def test_errors_are_one_line(monkeypatch, tmp_path):
    from swaa_edge import demo

    result = run("--plot", "a.png", "--no-plot")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    monkeypatch.setattr(demo, "MODEL", tmp_path / "gone.gguf")
    result = run("--no-plot")
    assert result.exit_code == 1
    gone = tmp_path / "gone.gguf"
    assert (
        result.stderr
        == f"Error: {gone} is missing; reinstall swaa-edge, or train the model with scripts/demo/train.py\n"
    )
