"""The command recommend: exact output, files, mistakes in one line; the example of docs/calibrate.md."""

import json

import pytest
from click.testing import CliRunner

from support.docs import run_example
from swaa_edge import SwaaConfig
from swaa_edge.cli import cli


def run(*args):
    return CliRunner().invoke(cli, ["recommend", *map(str, args)], prog_name="swaa-edge")


def row(config, accuracy, ratio, swaa=None, interval=None):
    return {
        "config": config,
        "swaa": swaa,
        "accuracy": accuracy,
        "interval": interval or [accuracy - 0.04, accuracy],
        "prefill_seconds": 1.0,
        "prefill_ratio": ratio,
    }


TABLE = [
    row("full", 0.98, 1.0),
    row("quality", 0.95, 1.5, {"window_size": 256, "fa_layers": "1::2", "fa_decode": True}),
    row("worse", 0.94, 1.4, {"window_size": 255}),
    row("fast", 0.5, 3.0, {"window_size": 128}),
    row("unknown", 0.99, None, {"window_size": 127}),
]


@pytest.fixture
def measured(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"table": TABLE}))
    return path


@pytest.mark.parametrize(
    "args, expected",
    [
        (
            ["--target-speedup", 1.4],
            "quality, 95.0% accurate, prefill 1.50x: the most accurate of 4 configurations with a prefill speed-up of "
            "at least 1.40x",
        ),
        (
            ["--min-accuracy", 0.5],
            "fast, 50.0% accurate, prefill 3.00x: the fastest of 4 configurations with at least 50.0% accuracy "
            "(uncertain: its 95% interval is 46.0% to 50.0%; take more samples)",
        ),
        (
            ["--min-accuracy", 0.9],
            "quality, 95.0% accurate, prefill 1.50x: the fastest of 4 configurations with at least 90.0% accuracy",
        ),
        (
            ["--min-accuracy", 0.4, "--target-speedup", 2],
            "fast, 50.0% accurate, prefill 3.00x: the most accurate of 4 configurations with a prefill speed-up of at "
            "least 2.00x and at least 40.0% accuracy",
        ),
        (
            ["--target-speedup", 1],
            "full, 98.0% accurate, prefill 1.00x: the most accurate of 4 configurations with a prefill speed-up of at "
            "least 1.00x",
        ),
    ],
)
def test_recommend(measured, args, expected):
    result = run(measured, *args)
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_recommend_writes_settings(measured, tmp_path):
    output = tmp_path / "config.json"
    result = run(measured, "--min-accuracy", 0.9, "-o", output)
    assert result.stdout.endswith(f"accuracy\nwrote {output}\n")
    assert SwaaConfig.from_json(output) == SwaaConfig(256, fa_layers="1::2", fa_decode=True)
    document = json.loads(run(measured, "--min-accuracy", 0.9, "--json").stdout)
    assert (document["config"], document["swaa"]["window_size"], document["prefill_ratio"]) == ("quality", 256, 1.5)
    assert document["front"] == [
        {"config": "fast", "accuracy": 0.5, "prefill_ratio": 3.0},
        {"config": "quality", "accuracy": 0.95, "prefill_ratio": 1.5},
        {"config": "full", "accuracy": 0.98, "prefill_ratio": 1.0},
    ]


@pytest.mark.parametrize(
    "args, code, message",
    [
        ([], 2, "Error: give --target-speedup X, --min-accuracy Y or both"),
        (
            ["--target-speedup", 4],
            1,
            "Error: no configuration has a prefill speed-up of 4.00x; the fastest is fast, 50.0% accurate, prefill "
            "3.00x; the most accurate is full, 98.0% accurate, prefill 1.00x\n",
        ),
        (
            ["--target-speedup", 2, "--min-accuracy", 0.6],
            1,
            "Error: no configuration has a prefill speed-up of 2.00x and 60.0% accuracy; the fastest is fast,",
        ),
        (["--min-accuracy", 1.1], 2, "Error: Invalid value for '--min-accuracy'"),
        (
            ["--target-speedup", 1, "-o", "x.json"],
            1,
            "Error: full attention was chosen, which has no settings to write to x.json: full, 98.0% accurate,",
        ),
    ],
)
def test_no_recommendation(measured, args, code, message):
    result = run(measured, *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not a JSON file: "),
        ("[]", 'has no "table"; give a file written by swaa-edge eval --json'),
        ('{"table": []}', "has no configuration with accuracy and prefill ratio; evaluate full attention too"),
        ('{"table": [1]}', "row 1 of the table is not a JSON object"),
        ('{"table": [{"config": "a", "accuracy": 1}]}', "row 1 of the table lacks prefill_ratio"),
        (json.dumps({"table": [row("a", 1, 1) | {"accuracy": "x"}]}), "row 1 of the table: accuracy = 'x' must be a"),
        (json.dumps({"table": [row("a", 1, 1, {"window_size": 0})]}), "row 1 of the table: window_size = 0 is out of"),
        (json.dumps({"table": [row("a", 1, 1, interval=[1])]}), "row 1 of the table: interval = [1] must be two"),
    ],
)
def test_files_that_are_not_evaluations(tmp_path, text, message):
    path = tmp_path / "eval.json"
    path.write_text(text)
    result = run(path, "--target-speedup", 1)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {path}") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_example_of_the_docs(measured, tmp_path):
    output = run_example("docs/calibrate.md", 1, tmp_path)
    assert output.startswith("quality, 95.0% accurate, prefill 1.50x: ") and "fa_layers='1::2'" in output
