"""The command finetune: it trains, draws and writes, Ctrl-C keeps the training state, mistakes take one line."""

import json
import signal
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner

from swaa_edge import SwaaConfig
from swaa_edge.cli import cli
from swaa_edge.files.lora_training import read_training


def command(*words, code=0):
    result = CliRunner().invoke(cli, ["finetune", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_the_command_trains_and_draws(base, data, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "loss.png"
    options = ("--lora-rank", 4, "--batch-size", 2, "--gradient-accumulation-steps", 1, "--val-fraction", 0.2)
    options += ("--max-steps", 3, "--eval-steps", 1)
    result = command(
        base,
        "--data",
        data,
        "-o",
        tmp_path / "mine",
        "--window",
        12,
        "--sinks",
        2,
        "--fa-decode",
        *options,
        "--gradient-checkpointing",
        "--plot",
        plot,
        "--json",
        "-",
    )
    document = json.loads(result.stdout)
    assert document["step"] == 3 and document["swaa"]["window_size"] == 12 and document["history"]
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert read_training(tmp_path / "mine").swaa == SwaaConfig(12, 2, "none", True)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("BASE", "--data", "DATA", "-o", "OUT"), 2, "an adapter is trained under one recipe; give --recipe NAME"),
        (("BASE", "--data", "no.jsonl", "-o", "OUT", "--window", "9"), 1, "cannot read the data file no.jsonl"),
        (("nowhere", "--data", "DATA", "-o", "OUT", "--window", "9"), 1, "there is no folder nowhere"),
        (
            ("BASE", "--data", "DATA", "-o", "OUT", "--window", "9", "--lora-rank", "0"),
            1,
            "lora_rank = 0 must be at least 1",
        ),
        (("BASE", "--data", "DATA", "-o", "OUT", "--window", "9", "--fa-layers", "7"), 1, "fa_layers"),
    ],
)
def test_mistakes_are_one_line(base, data, tmp_path, words, code, message):
    names = {"BASE": base, "DATA": data, "OUT": tmp_path / "out"}
    result = command(*(names.get(word, word) for word in words), code=code)
    assert message in result.output and len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch():
    code = "import sys; from swaa_edge.cli import cli; cli(['finetune', '--help'], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_ctrl_c_keeps_the_training_state(base, data, tmp_path):
    words = [base, "--data", data, "-o", tmp_path / "mine", "--window", 12, "--val-fraction", 0, "--max-steps", 4000]
    words += ["--lora-rank", 4, "--eval-steps", 4000, "--progress"]
    # Background jobs of a shell ignore Ctrl-C, and their children inherit that.
    process = subprocess.Popen(
        [sys.executable, "-m", "swaa_edge", "finetune", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    watchdog = threading.Timer(200, process.kill)
    watchdog.start()
    for line in process.stderr:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    watchdog.cancel()
    assert "the same command resumes from there" in rest and "Traceback" not in rest
    states = [*(tmp_path / "mine" / "training").glob("checkpoint-*/trainer_state.json")]
    assert len(states) == 1 and json.loads(states[0].read_text())["global_step"] > 0
