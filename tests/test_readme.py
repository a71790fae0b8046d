"""The README's Python example runs as printed, and the commands it names exist."""

import re
import subprocess
import sys

import pytest

from support import ROOT
from support.models import sample_text
from swaa_edge.cli import COMMANDS

README = ROOT / "README.md"


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    return [text for name, text in fenced if name == language]


@pytest.mark.native
def test_the_example_runs_as_printed(tmp_path, gguf_model):
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    (tmp_path / "model.gguf").symlink_to(gguf_model("qwen3"))
    (tmp_path / "long.txt").write_text(sample_text(7000), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"SwaaConfig\(window_size=2048, .* s of prefill$", done.stdout.strip().splitlines()[-1])


def test_every_command_is_shown_and_no_other():
    shown = set(re.findall(r"^swaa-edge ([a-z]+)", "\n".join(blocks("")), re.M)) | {"demo"}
    assert shown == set(COMMANDS)
