"""The demo: its text, its JSON, and that the model which ships really does what the demo is to show."""

import dataclasses
import hashlib
import json

import pytest
from click.testing import CliRunner

from swaa_edge import SwaaConfig
from swaa_edge.cli import cli

ROW = {"samples": 40, "prefill_seconds": 0.25, "decode_tok_s": 400.0, "prompt_tokens": 2000, "swaa": None}
TASKS = ("needle", "multi-needle", "kv", "chain")


def row(config, correct, ratio, seconds):
    accuracy = correct / 40
    tasks = {task: {"accuracy": accuracy, "samples": 10} for task in TASKS}
    interval = [max(0.0, accuracy - 0.05), accuracy + 0.05]
    return ROW | {
        "config": config,
        "correct": correct,
        "accuracy": accuracy,
        "interval": interval,
        "tasks": tasks,
        "prefill_ratio": ratio,
        "prefill_seconds": seconds,
    }


REPORT = {
    "table": [
        row("full", 36, 1.0, 0.25),
        row("naive", 2, 2.0, 0.125),
        row("quality", 32, 1.25, 0.2),
        row("stream", 2, 1.5, 0.167),
    ],
    "model": "demo-Q8_0.gguf",
    "prompt_tokens": 2000,
    "window": 128,
    "sinks": 8,
    "conclusion": "So.",
}


def run(*args):
    return CliRunner().invoke(cli, ["demo", *map(str, args)], prog_name="swaa-edge")


@pytest.mark.native
def test_the_table_by_its_text():
    from swaa_edge.cli.demo import table

    assert (
        table(REPORT)
        == """\
demo-Q8_0.gguf: prompts of 2,000 tokens, window 128, 8 sinks in the recipes; 40 questions each

config               accuracy        needle  multi-needle            kv         chain   prefill   ratio
full          90.0% (85%-95%)           90%           90%           90%           90%   0.250 s   1.00x *
naive           5.0% (0%-10%)            5%            5%            5%            5%   0.125 s   2.00x *
quality       80.0% (75%-85%)           80%           80%           80%           80%   0.200 s   1.25x *
stream          5.0% (0%-10%)            5%            5%            5%            5%   0.167 s   1.50x

accuracy: right answers, with Wilson's 95% interval. ratio: full attention's prefill time over this one's.
* no other configuration is both as right and as fast.

So."""
    )


@pytest.mark.native
def test_the_conclusion_is_computed():
    from swaa_edge.demo import conclusion

    table = REPORT["table"]
    assert conclusion(table) == (
        "A bare sliding window answers 5% of the questions right, full attention 90%; the recipe quality 80%, and it "
        "reads the prompt 1.25 times as fast."
    )
    slower = [*table[:2], table[2] | {"prefill_ratio": 0.8}]
    assert conclusion(slower).endswith("the recipe quality 80%, and it reads the prompt in 1.25 times the time.")
    better = [*table, row("calibrated", 36, 1.5, 0.1)]
    assert conclusion(better).endswith(
        "; FA decode with calibrated layers 90%, and it reads the prompt 1.50 times as fast."
    )


@pytest.mark.native
def test_recipes_at_the_size_of_the_model():
    from swaa_edge.config import RECIPES
    from swaa_edge.demo import SINKS, WINDOW, configurations

    configs = configurations()
    assert list(configs) == ["full", "naive", *RECIPES, "calibrated"]
    assert configs["full"] is False and configs["naive"] == SwaaConfig(WINDOW)
    for name, recipe in RECIPES.items():
        assert configs[name] == dataclasses.replace(recipe.config, window_size=WINDOW, sink_count=SINKS)


@pytest.mark.native
def test_what_the_demo_shows_is_so(tmp_path):
    from swaa_edge.cli.demo import table

    pytest.importorskip("matplotlib")
    plot = tmp_path / "demo.png"
    result = run("--json", "--samples", 2, "--plot", plot, "--threads", 2)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    report = json.loads(result.stdout)
    rows = {row["config"]: row for row in report["table"]}
    assert list(rows) == ["full", "naive", "quality", "balanced", "fast", "memory", "stream", "calibrated"]
    for shown in rows.values():
        assert 0 <= shown["accuracy"] <= 1 and shown["prefill_seconds"] > 0 and shown["prefill_ratio"] > 0
        assert shown["samples"] == 8
    assert rows["full"]["accuracy"] >= 7 / 8 and rows["naive"]["accuracy"] <= 1 / 8
    assert rows["calibrated"]["accuracy"] >= 7 / 8
    assert 3 / 8 <= max(rows[name]["accuracy"] for name in ("quality", "balanced", "fast")) <= 7 / 8
    assert report["conclusion"] in table(report)
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000


@pytest.mark.native
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


@pytest.mark.native
def test_the_results_are_of_this_model_and_show_what_the_page_says():
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    document = json.loads((root / "docs" / "results" / "demo.json").read_text(encoding="utf-8"))
    model = (root / "swaa_edge" / "models" / document["model"]["file"]).read_bytes()
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


@pytest.mark.native
def test_errors_are_one_line(monkeypatch, tmp_path):
    from swaa_edge import demo

    result = run("--plot", "a.png", "--no-plot")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    monkeypatch.setattr(demo, "MODEL", tmp_path / "gone.gguf")
    result = run("--no-plot")
    assert result.exit_code == 1
    gone = tmp_path / "gone.gguf"
    assert result.stderr == f"Error: {gone} is missing; reinstall swaa-edge, or train it with scripts/demo/train.py\n"
