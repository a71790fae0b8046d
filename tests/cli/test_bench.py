"""`swaa-edge bench`: what its options do, its files and errors on made-up times, and runs on the engine."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from swaa_edge.cli import cli
from swaa_edge.errors import GenerationError
from swaa_edge.shapes import write_shape


def run(*args):
    return CliRunner().invoke(cli, ["bench", *map(str, args)], prog_name="swaa-edge")


def test_json_on_stdout_is_one_document_and_nothing_else(fake_runner, bench_model):
    result = run(bench_model, "--prompt-tokens", "20,100", "--configs", "fast, naive", "--json", "-", "--window", 64)
    document = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert list(dict.fromkeys(row["config"] for row in document["rows"])) == ["full", "fast", "naive"]
    assert {row["swaa"]["window_size"] for row in document["rows"] if row["swaa"]} == {64}


def test_one_configuration_by_its_settings(fake_runner, bench_model):
    result = run(bench_model, "--prompt-tokens", 20, "--window", 64, "--sinks", 2, "--json", "-")
    rows = json.loads(result.stdout)["rows"]
    assert [row["config"] for row in rows] == ["full", "custom"] and rows[1]["swaa"]["sink_count"] == 2


def test_a_large_ubatch_enlarges_the_batch(fake_runner, bench_model):
    result = run(bench_model, "--prompt-tokens", 2500, "--ubatch", 2048, "--n-gpu-layers", 7, "--window", 64)
    assert result.exit_code == 0, result.output
    sizes = {(job.engine.n_batch, job.engine.n_ubatch, job.engine.n_gpu_layers) for _, job in fake_runner.jobs}
    assert sizes == {(2048, 2048, 7)}
    fake_runner.jobs.clear()
    run(bench_model, "--prompt-tokens", 2500, "--ubatch", 2048, "--batch", 256, "--window", 64, "--repeat", 1)
    run(bench_model, "--prompt-tokens", 2500, "--ubatch", 64, "--window", 64, "--repeat", 1)
    sizes = [(job.engine.n_batch, job.engine.n_ubatch) for _, job in fake_runner.jobs]
    assert sizes == [(256, 256)] * 2 + [(512, 64)] * 2


def test_files_are_written_beside_the_table(fake_runner, bench_model, tmp_path):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    args = (bench_model, "--prompt-tokens", "20,200", "--ubatch", 20, "--json", out, "--plot", picture)
    assert run(*args).stdout.startswith("tiny (llama, 4 layers")
    assert json.loads(out.read_text())["settings"]["n_ubatch"] == 20
    assert picture.read_bytes().startswith(b"\x89PNG")
    before, jobs = out.read_bytes(), len(fake_runner.jobs)
    refused = run(*args)
    assert refused.exit_code == 1 and "exists already; pass --force to replace it" in refused.stderr
    # Refused before the minutes of measuring, not after.
    assert out.read_bytes() == before and len(fake_runner.jobs) == jobs
    assert run(*args, "--force").exit_code == 0


def test_a_plot_without_matplotlib_is_one_line(bench_model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = run(bench_model, "--plot", "out.png")
    assert (result.exit_code, result.stderr) == (1, "Error: a plot needs matplotlib; pip install 'swaa-edge[plot]'\n")


@pytest.mark.parametrize("left", [1, 2])
def test_an_interrupted_run_prints_its_results(fake_runner, bench_model, monkeypatch, left, tmp_path):
    monkeypatch.setattr(fake_runner, "fail_at", (left - 1, KeyboardInterrupt()))
    result = run(bench_model, "--json", tmp_path / "out.json")
    assert result.exit_code == 130 and result.stderr == "Interrupted\n"
    assert ("Stopped early (interrupted)" in result.stdout) is (left == 2)
    assert (tmp_path / "out.json").exists() is (left == 2)


def test_an_error_comes_after_the_results(fake_runner, bench_model, monkeypatch):
    monkeypatch.setattr(fake_runner, "fail_at", (2, GenerationError("out of memory")))
    result = run(bench_model, "--configs", "fast")
    assert (result.exit_code, result.stderr) == (1, "Error: out of memory\n")
    assert "Stopped early (out of memory)" in result.stdout and "fast" in result.stdout


def test_progress_in_a_log_is_a_line_per_turn(fake_runner, bench_model):
    result = run(bench_model, "--prompt-tokens", 20, "--configs", "fast", "--repeat", 1, "--progress")
    assert result.stderr.splitlines() == ["1/2 full, 20 tokens", "2/2 fast, 20 tokens"]


@pytest.mark.parametrize(
    "args, layers, lengths, configs",
    [
        (["--attention"], 4, {2048, 8192, 32768}, ["full"]),
        (["--attention", "--quick"], 2, {8192}, ["full"]),
        (["--attention", "--quick", "--layers", 3], 3, {8192}, ["full"]),
        (["--attention", "--shape", "qwen3-0.6b", "--prompt-tokens", 512], 4, {512}, ["full"]),
        (["--attention", "--prompt-tokens", 512, "--configs", "fast"], 4, {512}, ["full", "fast"]),
        (["--attention", "--prompt-tokens", 512, "--window", 8], 4, {512}, ["full", "custom"]),
    ],
)
def test_attention_measures_a_shape_by_default(fake_runner, monkeypatch, args, layers, lengths, configs):
    monkeypatch.setattr("swaa_edge.bench.attention.bandwidth", lambda threads: 20.0)
    # Its tokens take the native library, which is not what this is about.
    monkeypatch.setattr("swaa_edge.bench.workload.prompt_ids", lambda model, count: [1] * count)
    result = run(*args, "--vocab", 300, "--json", "-")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["model"]["name"] == f"qwen3-0.6b, {layers} layers, random weights"
    assert {row["prompt_tokens"] for row in document["rows"]} == lengths
    assert list(dict.fromkeys(row["config"] for row in document["rows"])) == configs
    assert document["decode_vs_no_flash"] > 0


@pytest.mark.parametrize(
    "args, code, message",
    [
        ([], 2, "Error: give either MODEL.gguf or --shape NAME"),
        (["MODEL", "--shape", "qwen3-4b"], 2, "Error: give either MODEL.gguf or --shape NAME"),
        (["MODEL", "--layers", 2], 2, "Error: --layers, --type and --vocab work only with --shape"),
        (["MODEL", "--attention", "--layers", 2], 2, "Error: --layers, --type and --vocab work only with --shape"),
        (["MODEL", "--quick"], 2, "Error: --quick works only with --attention"),
        (["MODEL", "--attention", "--plot", "a.png"], 2, "Error: --attention draws no plot"),
        (["MODEL", "--attention", "--decode", 0], 1, "Error: decode = 0 must be at least 1"),
        (["--shape", "qwen3-5b"], 1, "Error: unknown shape 'qwen3-5b'; did you mean qwen3-4b?"),
        (["--shape", "../x"], 1, "Error: unknown shape '../x'; the shapes are qwen3-0.6b, qwen3-4b, llama-3.1-8b"),
        (["MODEL", "--prompt-tokens", "4k"], 2, "Error: Invalid value for '--prompt-tokens': '4k' must be numbers"),
        (["MODEL", "--prompt-tokens", "16,"], 2, "Error: Invalid value for '--prompt-tokens': '16,' must be numbers"),
        (["MODEL", "--prompt-tokens", "0"], 2, "Error: Invalid value for '--prompt-tokens': '0' must be numbers"),
        (["MODEL", "--configs", "fsat"], 1, "Error: there is no configuration fsat (is it fast?)"),
        (["MODEL", "--configs", "no.json"], 1, "Error: cannot read the settings file no.json: No such file"),
        (["MODEL", "--configs", "full"], 1, "Error: there is nothing to compare with full attention; give a"),
        (["MODEL", "--baseline", "nowhere"], 1, "Error: nowhere holds no llama.cpp library; `make baseline` builds"),
        (["MODEL", "--plot", "a.txt"], 1, "Error: a.txt must end in one of .png, .svg, .pdf"),
        (["MODEL", "--lora", "a.gguf"], 2, "Error: No such option '--lora'"),
        (
            ["MODEL", "--window", "8", "--plot", "-"],
            1,
            "Error: a picture can't be written to stdout",
        ),
        (["MODEL", "--json", "x.png", "--plot", "x.png"], 1, "Error: x.png is used for an output and for another file"),
        (["none.gguf"], 1, "Error: none.gguf does not exist; give the path of a .gguf file"),
        (
            ["MODEL", "--prompt-tokens", "32,8192"],
            1,
            "Error: a prompt of 8192 tokens and 32 more exceed the 4096 tokens that",
        ),
    ],
)
def test_mistakes_are_one_line(fake_runner, bench_model, args, code, message, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    result = run(*(bench_model if arg == "MODEL" else arg for arg in args))
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1, result.stderr
    assert fake_runner.jobs == []


# With the engine


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """Two layers of Qwen3-0.6B and a vocabulary of 300."""
    return write_shape(tmp_path_factory.mktemp("shape") / "shape.gguf", "qwen3-0.6b", layers=2, vocab=300)


@pytest.mark.native
def test_a_run_on_the_engine(shape):
    # Tiny ubatches in a large context: there the full mask is most of the compute buffer.
    args = [shape, "--prompt-tokens", 96, "--ubatch", 16, "--ctx", 32768, "--decode", 3, "--repeat", 2, "--threads", 1]
    done = subprocess.run(
        [sys.executable, "-m", "swaa_edge", "bench", *map(str, args), "--window", "32", "--sinks", "4", "--json", "-"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    full, ours = document["rows"]
    assert document["libraries"]["patched"]["patched"] and document["model"]["heads"] == [16, 16]
    # K and V, 2 layers, 8 heads of 128 numbers of 2 bytes; window, sinks and ubatch fit the smallest ring.
    row = 2 * 2 * 8 * 128 * 2
    assert (full["kv_bytes"], ours["kv_bytes"]) == (row * 32768, row * 256)
    assert 0 < ours["compute_buffer_bytes"] < full["compute_buffer_bytes"]
    for row in (full, ours):
        assert [len(sample["ubatch_seconds"]) for sample in row["repeats"]] == [6, 6]
        assert [len(sample["decode_seconds"]) for sample in row["repeats"]] == [3, 3]
        assert all(sample["cpu_seconds"] > 0 for sample in row["repeats"])
        assert min(itertools.chain(*(sample["ubatch_seconds"] for sample in row["repeats"]))) > 0


@pytest.mark.native
@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_ctrl_c_prints_the_table_and_ends_the_children(shape):
    args = ["--prompt-tokens", "16,100000", "--ubatch", "16", "--configs", "fast", "--repeat", "1", "--decode", "0"]
    command = [sys.executable, "-m", "swaa_edge", "bench", str(shape), *args, "--progress"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in child.stderr:
        if line.startswith("3/4 full, 100,000 tokens"):
            break
    # The whole group gets it, as from a terminal.
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "Interrupted\n")
    assert "Stopped early (interrupted)" in out and " fast " in out and "100,000" not in out
    _expect_no_process_left(child.pid)


@pytest.mark.native
@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_children_end_with_their_parent(shape):
    # One ubatch of very many tokens under one thread: the child sends nothing for half a minute.
    args = ["--prompt-tokens", "8192", "--ubatch", "8192", "--batch", "8192", "--threads", "1", "--configs", "fast"]
    command = [sys.executable, "-m", "swaa_edge", "bench", str(shape), *args, "--progress"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    child.stderr.readline()
    time.sleep(1.5)  # the line comes just before the job is sent
    child.kill()
    child.communicate()
    _expect_no_process_left(child.pid, within=3)


def _expect_no_process_left(group, within=30):
    deadline = time.monotonic() + within
    while _group_lives(group):
        assert time.monotonic() < deadline, "a measuring process is left over"
        time.sleep(0.05)


def _group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
