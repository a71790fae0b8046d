"""calibrate and recommend as commands: exact output, files, a journal that goes on, and mistakes in one line."""

import json
import types

import pytest
from click.testing import CliRunner

from support.fakes.gguf_bytes import kv, model
from swaa_edge import SwaaConfig
from swaa_edge.calibrate import lazy, losses
from swaa_edge.calibrate.cases import Case
from swaa_edge.cli import calibrate as command
from swaa_edge.cli import cli
from swaa_edge.cli.options.engine import Engine
from swaa_edge.errors import GenerationError
from swaa_edge.metadata import read_swaa

N = 4
WORTH = (0.25, 1.0, 0.0, 0.5)


def run(name, *args):
    return CliRunner().invoke(cli, [name, *map(str, args)], prog_name="swaa-edge")


@pytest.fixture
def file(tmp_path):
    """A model file of four layers, trained for 4096 tokens; no engine could run it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(model(extra=[kv("tokenizer.ggml.model", "str", "none")]))
    return path


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Made-up losses; `asked` is what was measured, `fail_at` = (count, error) ends it after so many."""
    state = types.SimpleNamespace(asked=[], fail_at=None, settings=None)

    def load(engine, path, *, swaa, n_ctx):
        sliding = swaa.sliding_layers(N) if swaa else [False] * N
        assert engine.swa_full and n_ctx >= 6
        return types.SimpleNamespace(kept={i for i in range(N) if not sliding[i]}, close=lambda: None)

    def answer_nll(llm, case):
        if state.fail_at and state.fail_at[0] == len(state.asked):
            raise state.fail_at[1]
        state.asked.append((tuple(sorted(llm.kept)), case.id))
        tilt = 0.25 if case.id.endswith("1") and 3 in llm.kept else 0.0
        return (2.0 - sum(WORTH[layer] for layer in llm.kept) + tilt) * len(case.answer)

    def cases(model, text_file, length, swaa, *, compare, **_):
        state.settings = swaa
        made = [Case(f"{name}{i}", (1, 2, 3, 4), (5, 6)) for name in "ab" for i in range(2)]
        return made[:2], made[2:] if compare else []

    monkeypatch.setattr(Engine, "load", load)
    monkeypatch.setattr(losses, "answer_nll", answer_nll)
    monkeypatch.setattr(command, "_cases", cases)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    state.cache = tmp_path / "cache" / "swaa-edge"
    return state


EXPECTED = """\
tiny, 4 layers; window 1024, 100 sinks, FA decode
2 samples of 4,096 tokens; loss in nats per answer token, of 4
full attention:   0.3750
all layers slide: 2.0000

loss added when the layer alone slides:
layer   1  FA  +1.0000 ± 0.0000  ########################################
layer   3      +0.3750 ± 0.1250  ###############
layer   0      +0.2500 ± 0.0000  ##########
layer   2      +0.0000 ± 0.0000

on 2 other samples, by FA layers:
 all  loss 0.3750  (+0.0000 ± 0.0000)
1::4  loss 1.0000  (+0.6250 ± 0.1250)  <- chosen
3::4  loss 1.6250  (+1.2500 ± 0.0000)
0::4  loss 1.7500  (+1.3750 ± 0.1250)
none  loss 2.0000  (+1.6250 ± 0.1250)
2::4  loss 2.0000  (+1.6250 ± 0.1250)

--fa-layers 1  (1 of 4 layers; loss 1.0000, which takes back 62% of what sliding adds)
"""


def test_the_output(fake, file, tmp_path):
    output, annotated = tmp_path / "config.json", tmp_path / "out.gguf"
    result = run("calibrate", file, "--compare", "-o", output, "--annotate", annotated, "--json", tmp_path / "all.json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == EXPECTED + f"wrote {output}\nwrote {annotated}\n" and result.stderr == ""
    assert json.loads(output.read_text()) == {
        "window_size": 1024,
        "sink_count": 100,
        "fa_layers": [1],
        "fa_decode": True,
        "recipe": "custom",
        "adapter": None,
    }
    assert SwaaConfig.from_json(output) == read_swaa(annotated) == SwaaConfig(1024, 100, [1], True)
    document = json.loads((tmp_path / "all.json").read_text())
    assert document["chosen"] == [1] and document["recovered"] == pytest.approx(1.0 / 1.625)
    assert document["model"] == {"path": str(file), "name": "tiny"} and document["prompt_tokens"] == 4096
    assert list(fake.cache.iterdir()) == [], "a complete run leaves no journal"


def test_json_on_stdout_is_all_there_is(fake, file, tmp_path):
    result = run("calibrate", file, "--json", "-", "--keep", "2", "-o", tmp_path / "config.json")
    assert json.loads(result.stdout)["config"]["fa_layers"] == [1, 3] and result.stderr == ""
    assert SwaaConfig.from_json(tmp_path / "config.json").fa_layers == (1, 3)


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], SwaaConfig(1024, 100, fa_decode=True)),
        (["--length", "512"], SwaaConfig(128, 16, fa_decode=True)),
        (["--window", "64"], SwaaConfig(64)),
        (["--recipe", "quality"], SwaaConfig(2048, 100, "1::2", True)),
    ],
)
def test_settings(fake, file, args, expected):
    assert run("calibrate", file, *args).exit_code == 0 and fake.settings == expected


def test_in_place_with_greedy_and_a_share(fake, file):
    result = run("calibrate", file, "--in-place", "--method", "greedy", "--keep", "0.5", "--window", 64)
    assert result.exit_code == 0 and result.stdout.endswith(f"wrote {file}\n")
    assert read_swaa(file) == SwaaConfig(64, fa_layers=[1, 3])
    assert "loss saved by the layer beside those above it:\nlayer   1  FA  +1.0000 ± 0.0000  ####" in result.stdout


def test_lazy(fake, file, monkeypatch):
    monkeypatch.setattr(lazy, "attention_shares", lambda load, swaa, n, cases, using: [0.5, 0.75, 1.0, 0.25])
    lines = run("calibrate", file, "--method", "lazy").stdout.splitlines()
    assert lines[5:8] == [
        "share of the layer's attention outside window and sinks:",
        f"layer   3  FA  +0.7500  {'#' * 40}",
        f"layer   0      +0.5000  {'#' * 27}",
    ]
    assert lines[-1] == "--fa-layers 3  (1 of 4 layers; loss 1.6250, which takes back 23% of what sliding adds)"


@pytest.mark.parametrize(
    "failure, code, error",
    [
        (KeyboardInterrupt(), 130, "Interrupted"),
        (GenerationError("out of memory"), 1, "Error: out of memory"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_what_ends_early_goes_on(fake, file, tmp_path, failure, code, error, own):
    args = ["calibrate", file, "-o", tmp_path / "config.json"] + ([] if own else ["--journal", tmp_path / "journal"])
    fake.fail_at = (7, failure)
    result = run(*args)
    assert (result.exit_code, result.stderr) == (code, error + "\n")
    reason = "interrupted" if code == 130 else "out of memory"
    assert result.stdout.endswith(
        f"layer   0      +0.2500 ± 0.0000  {'#' * 40}\n\nStopped early ({reason}); "
        "the same command goes on from here.\n"
    )
    assert not (tmp_path / "config.json").exists()
    assert len(list(fake.cache.iterdir()) if own else [tmp_path / "journal"]) == 1
    fake.fail_at, before = None, fake.asked[:]
    again = run(*args)
    assert (again.exit_code, again.stderr, fake.asked[:7]) == (0, "resuming: 7 measurements are in\n", before)
    # Full, none, each alone, the choice: two samples each, none twice.
    assert len(fake.asked) == len(set(fake.asked)) == 14
    if own:
        assert list(fake.cache.iterdir()) == []
    else:
        # It is the user's file, and another method finds what it needs in it.
        assert run(*args, "--force", "--method", "keep").exit_code == 0
        assert {kept for kept, _ in fake.asked[14:]} == {(0,), (2,), (3,)}


def test_ctrl_c_before_anything_is_known(fake, file):
    fake.fail_at = (1, KeyboardInterrupt())
    result = run("calibrate", file)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted\n")


def test_a_journal_of_other_settings_is_refused(fake, file, tmp_path):
    assert run("calibrate", file, "--journal", tmp_path / "journal").exit_code == 0
    result = run("calibrate", file, "--journal", tmp_path / "journal", "--window", 99)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is the journal of another run" in result.stderr and result.stderr.count("\n") == 1


def test_progress_is_a_line_per_choice(fake, file):
    result = run("calibrate", file, "--progress")
    lines = [line.split(", about")[0] for line in result.stderr.splitlines()]
    assert lines == [
        "0/14 FA layers: all",
        "2/14 FA layers: none",
        "4/14 FA layers: all but 0",
        "6/14 FA layers: all but 1",
        "8/14 FA layers: all but 2",
        "10/14 FA layers: all but 3",
        "12/14 FA layers: 1",
    ]


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--keep", "0"], 2, "Error: Invalid value for '--keep': '0' must be a number of layers from 1, or a fraction"),
        (["--keep", "1.5"], 2, "Error: Invalid value for '--keep': '1.5' must be a number of layers from 1, or a"),
        (["--keep", "4"], 1, "Error: --keep 4 leaves none of the model's 4 layers to slide; keep fewer"),
        (["--candidates", "2"], 1, "Error: --candidates 2 goes with --method greedy, from 1 (those kept) to 4 layers"),
        (["--method", "magic"], 2, "Error: Invalid value for '--method': 'magic' is not one of"),
        (["--length", "5000"], 1, "Error: --length 5000 exceeds the 4096 tokens that the model was trained for"),
        (["--window", "4000", "--sinks", "96"], 1, "Error: window 4000 and 96 sinks show all of 4096 tokens, so"),
        (["--annotate", "x.gguf", "--in-place"], 2, "Error: give either --annotate OUT.gguf or --in-place"),
        (["-o", "MODEL"], 1, "Error: MODEL exists already; pass --force to replace it, or choose another name"),
        (["-o", "nowhere/x.json"], 1, "Error: the folder nowhere does not exist; create it or choose another output"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(fake, file, args, code, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = run("calibrate", file, *(file if arg == "MODEL" else arg for arg in args))
    assert (result.exit_code, result.stdout, fake.asked) == (code, "", [])
    message = message.replace("MODEL", str(file))
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1, result.stderr


# recommend


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
            "quality, 95.0% accurate, 1.50x in prefill: the most accurate of 4 configurations that is at least 1.40x "
            "as fast in prefill",
        ),
        (
            ["--min-accuracy", 0.5],
            "fast, 50.0% accurate, 3.00x in prefill: the fastest of 4 configurations that is at least 50.0% accurate "
            "(its 95% interval, 46.0% to 50.0%, leaves doubt: take more samples)",
        ),
        (
            ["--min-accuracy", 0.9],
            "quality, 95.0% accurate, 1.50x in prefill: the fastest of 4 configurations that is at least 90.0% "
            "accurate",
        ),
        (
            ["--min-accuracy", 0.4, "--target-speedup", 2],
            "fast, 50.0% accurate, 3.00x in prefill: the most accurate of 4 configurations that is at least 2.00x as "
            "fast in prefill and 40.0% accurate",
        ),
        (
            ["--target-speedup", 1],
            "full, 98.0% accurate, 1.00x in prefill: the most accurate of 4 configurations that is at least 1.00x as "
            "fast in prefill",
        ),
    ],
)
def test_recommend(measured, args, expected):
    result = run("recommend", measured, *args)
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_recommend_writes_settings(measured, tmp_path):
    output = tmp_path / "config.json"
    result = run("recommend", measured, "--min-accuracy", 0.9, "-o", output)
    assert result.stdout.endswith(f"accurate\nwrote {output}\n")
    assert SwaaConfig.from_json(output) == SwaaConfig(256, fa_layers="1::2", fa_decode=True)
    document = json.loads(run("recommend", measured, "--min-accuracy", 0.9, "--json").stdout)
    assert (document["config"], document["swaa"]["window_size"], document["prefill_ratio"]) == ("quality", 256, 1.5)
    assert document["front"] == [
        {"config": "fast", "accuracy": 0.5, "prefill_ratio": 3.0},
        {"config": "quality", "accuracy": 0.95, "prefill_ratio": 1.5},
        {"config": "full", "accuracy": 0.98, "prefill_ratio": 1.0},
    ]


@pytest.mark.parametrize(
    "args, code, message",
    [
        ([], 2, "Error: say what you aim at: --target-speedup X, --min-accuracy Y or both"),
        (
            ["--target-speedup", 4],
            1,
            "Error: no configuration reaches 4.00x in prefill; the fastest is fast, 50.0% accurate, 3.00x in prefill, "
            "the most accurate full, 98.0% accurate, 1.00x in prefill\n",
        ),
        (
            ["--target-speedup", 2, "--min-accuracy", 0.6],
            1,
            "Error: no configuration reaches 2.00x in prefill and is 60.0% accurate; the fastest is fast,",
        ),
        (["--min-accuracy", 1.1], 2, "Error: Invalid value for '--min-accuracy'"),
        (["--target-speedup", 1, "-o", "x.json"], 1, "Error: nothing to write: the choice is full, 98.0% accurate,"),
    ],
)
def test_no_recommendation(measured, args, code, message):
    result = run("recommend", measured, *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not a JSON file: "),
        ("[]", 'has no "table"; give a file of swaa-edge eval --json'),
        ('{"table": []}', "has no configuration with accuracy and prefill ratio; evaluate full attention, too"),
        ('{"table": [1]}', "row 1 of the table is no JSON object"),
        ('{"table": [{"config": "a", "accuracy": 1}]}', "row 1 of the table lacks prefill_ratio"),
        (json.dumps({"table": [row("a", 1, 1) | {"accuracy": "x"}]}), "row 1 of the table: accuracy = 'x' must be a"),
        (json.dumps({"table": [row("a", 1, 1, {"window_size": 0})]}), "row 1 of the table: window_size = 0 is out of"),
        (json.dumps({"table": [row("a", 1, 1, interval=[1])]}), "row 1 of the table: interval = [1] must be two"),
    ],
)
def test_files_that_are_no_evaluation(tmp_path, text, message):
    path = tmp_path / "eval.json"
    path.write_text(text)
    result = run("recommend", path, "--target-speedup", 1)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {path}") and message in result.stderr
    assert result.stderr.count("\n") == 1
