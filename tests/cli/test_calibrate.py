"""The command calibrate: exact output, files, an interrupted run that resumes, and mistakes in one line."""

import json
import types

import pytest
from click.testing import CliRunner

from support.fakes.gguf_bytes import kv, model
from swaa_edge import SwaaConfig
from swaa_edge.calibrate import calibration, losses
from swaa_edge.calibrate.cases import Case
from swaa_edge.cli import cli
from swaa_edge.engine.settings import EngineSettings
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
    """Made-up losses; `asked` holds the measurements, `fail_at` = (count, error) ends the run after so many."""
    state = types.SimpleNamespace(asked=[], fail_at=None, settings=None)

    def load(engine, model, *, swaa, n_ctx):
        sliding = swaa.sliding_layers(N) if swaa else [False] * N
        assert engine.swa_full and n_ctx >= 6
        return types.SimpleNamespace(kept={i for i in range(N) if not sliding[i]}, close=lambda: None)

    def answer_nll(llm, case):
        if state.fail_at and state.fail_at[0] == len(state.asked):
            raise state.fail_at[1]
        state.asked.append((tuple(sorted(llm.kept)), case.id))
        tilt = 0.25 if case.id.endswith("1") and 3 in llm.kept else 0.0
        return (2.0 - sum(WORTH[layer] for layer in llm.kept) + tilt) * len(case.answer)

    def cases(file, length, swaa, settings):
        state.settings = swaa
        made = [Case(f"{name}{i}", (1, 2, 3, 4), (5, 6)) for name in "ab" for i in range(2)]
        return made[:2], made[2:] if settings.compare else []

    monkeypatch.setattr(EngineSettings, "load", load)
    monkeypatch.setattr(losses, "answer_nll", answer_nll)
    monkeypatch.setattr(calibration, "_cases", cases)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    state.cache = tmp_path / "cache" / "swaa-edge"
    return state


EXPECTED = """\
tiny, 4 layers; window 1024, 100 sinks, FA decode, tail 128
2 samples of 4,096 tokens; loss in nats per token, over 4 answer tokens
full attention:   0.3750
all layers slide: 2.0000

loss added when only this layer slides:
layer   1  FA  +1.0000 ± 0.0000  ########################################
layer   3      +0.3750 ± 0.1250  ###############
layer   0      +0.2500 ± 0.0000  ##########
layer   2      +0.0000 ± 0.0000

on 2 held-out samples, by FA layers:
 all  loss 0.3750  (+0.0000 ± 0.0000)
1::4  loss 1.0000  (+0.6250 ± 0.1250)  <- chosen
3::4  loss 1.6250  (+1.2500 ± 0.0000)
0::4  loss 1.7500  (+1.3750 ± 0.1250)
none  loss 2.0000  (+1.6250 ± 0.1250)
2::4  loss 2.0000  (+1.6250 ± 0.1250)

--fa-layers 1  (1 of 4 layers; loss 1.0000, recovers 62% of the loss that sliding adds)
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
        "tail_count": 128,
        "recipe": "custom",
        "adapter": None,
    }
    assert SwaaConfig.from_json(output) == read_swaa(annotated) == SwaaConfig(1024, 100, [1], True, 128)
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
        ([], SwaaConfig(1024, 100, fa_decode=True, tail_count=128)),
        (["--prompt-tokens", "512"], SwaaConfig(128, 16, fa_decode=True, tail_count=128)),
        (["--window", "64"], SwaaConfig(64)),
        (["--recipe", "quality"], SwaaConfig(2048, 100, "1::2", True, 128)),
    ],
)
def test_settings(fake, file, args, expected):
    assert run("calibrate", file, *args).exit_code == 0 and fake.settings == expected


def test_in_place_with_greedy_and_a_fraction(fake, file):
    result = run("calibrate", file, "--in-place", "--method", "greedy", "--keep", "0.5", "--window", 64)
    assert result.exit_code == 0 and result.stdout.endswith(f"wrote {file}\n")
    assert read_swaa(file) == SwaaConfig(64, fa_layers=[1, 3])
    assert "loss saved by adding this layer to those above it:\nlayer   1  FA  +1.0000 ± 0.0000  ####" in result.stdout


@pytest.mark.parametrize(
    "failure, code, error",
    [
        (KeyboardInterrupt(), 130, "Interrupted"),
        (GenerationError("out of memory"), 1, "Error: out of memory"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_what_ends_early_resumes(fake, file, tmp_path, failure, code, error, own):
    args = ["calibrate", file, "-o", tmp_path / "config.json"] + ([] if own else ["--journal", tmp_path / "journal"])
    fake.fail_at = (7, failure)
    result = run(*args)
    assert (result.exit_code, result.stderr) == (code, error + "\n")
    reason = "interrupted" if code == 130 else "out of memory"
    assert result.stdout.endswith(
        f"layer   0      +0.2500 ± 0.0000  {'#' * 40}\n\nStopped early ({reason}); "
        "the same command resumes from here.\n"
    )
    assert not (tmp_path / "config.json").exists()
    assert len(list(fake.cache.iterdir()) if own else [tmp_path / "journal"]) == 1
    fake.fail_at, before = None, fake.asked[:]
    again = run(*args)
    assert (again.exit_code, again.stderr, fake.asked[:7]) == (0, "resuming after 7 measurements\n", before)
    # Full, none, each alone, the choice: two samples each, none twice.
    assert len(fake.asked) == len(set(fake.asked)) == 14
    if own:
        assert list(fake.cache.iterdir()) == []
    else:
        # The user's file stays, and another method reuses its measurements.
        assert run(*args, "--force", "--method", "keep").exit_code == 0
        assert {kept for kept, _ in fake.asked[14:]} == {(0,), (2,), (3,)}


def test_ctrl_c_before_the_first_loss(fake, file):
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
    choices = ["all", "none", "all but 0", "all but 1", "all but 2", "all but 3", "1"]
    assert result.stderr.splitlines() == [f"full attention in layers: {layers}" for layers in choices]


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--keep", "0"], 1, "Error: keep = 0 must be a number of layers, at least 1, or a fraction such as 0.25"),
        (["--keep", "half"], 2, "Error: Invalid value for '--keep': 'half' must be a number of layers, or a fraction"),
        (["--keep", "4"], 1, "Error: keep = 4 keeps all 4 layers in full attention; keep fewer"),
        (
            ["--candidates", "2"],
            1,
            "Error: candidates = 2 needs the method greedy, and must be from 1 (the layers to keep) to 4",
        ),
        (["--method", "magic"], 2, "Error: Invalid value for '--method': 'magic' is not one of"),
        (
            ["--prompt-tokens", "5000"],
            1,
            "Error: prompt_tokens = 5000 exceeds the 4096 tokens that the model was trained for",
        ),
        (
            ["--window", "4000", "--sinks", "96"],
            1,
            "Error: window 4000 and 96 sinks cover all 4096 tokens of a prompt, so no layer slides; lower",
        ),
        (
            ["--annotate", "x.gguf", "--in-place"],
            1,
            "Error: annotate and in_place exclude each other; give one of them",
        ),
        (
            ["-o", "MODEL"],
            1,
            "Error: MODEL is used for an output and for another file of this command; give the output",
        ),
        (["-o", "nowhere/x.json"], 1, "Error: the folder nowhere does not exist; create it or choose another output"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(fake, file, args, code, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = run("calibrate", file, *(file if arg == "MODEL" else arg for arg in args))
    assert (result.exit_code, result.stdout, fake.asked) == (code, "", [])
    message = message.replace("MODEL", str(file))
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1, result.stderr
