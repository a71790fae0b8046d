"""bench: the bound against brute force, the order and arithmetic of a run on made-up times, the command, and a run."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from support.fakes.gguf_bytes import kv, model
from swaa_edge import SwaaConfig
from swaa_edge.bench import bench, bound, client, worker
from swaa_edge.bench.client import Timing
from swaa_edge.bench.random_model import write_shape
from swaa_edge.bench.report import Settings, plot
from swaa_edge.bench.report import machine as report_machine
from swaa_edge.cli import cli
from swaa_edge.cli.bench import compared, table
from swaa_edge.errors import ConfigError, GenerationError, NativeLibraryError
from swaa_edge.files.model import read_model


def run(*args):
    return CliRunner().invoke(cli, ["bench", *map(str, args)], prog_name="swaa-edge")


@pytest.fixture
def file(tmp_path):
    """A model file of four layers, eight heads each, trained for 4096 tokens; no engine could run it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(model(extra=[kv("tokenizer.ggml.model", "str", "none")]))
    return path


# The bound


def brute_force(start, count, window, sinks):
    """Visible keys per query from the definition of the mask, one pair after the other."""
    seen = sum(q - j < window or j < sinks for q in range(start, start + count) for j in range(q + 1))
    return seen / count


def test_visible_keys_are_those_of_the_mask():
    generator = random.Random(0)
    cases = [(0, 1, 1, 0), (0, 8, 8, 0), (0, 8, 7, 1), (0, 8, 9, 0), (5, 3, 4, 40), (100, 16, 1, 0)]
    cases += [tuple(generator.randint(low, 40) for low in (0, 1, 1, 0)) for _ in range(200)]
    for start, count, window, sinks in cases:
        expected = brute_force(start, count, window, sinks)
        assert bound.visible_sliding(start, count, window, sinks) == pytest.approx(expected), (start, count)
        assert bound.visible_full(start, count) == brute_force(start, count, 1000, 0)


def test_the_fit_finds_the_line():
    seconds = [0.5 + 0.001 * (512 * i + 256.5) for i in range(5)]
    line = bound.fit_line(seconds, 512)
    assert (line.a, line.b) == (pytest.approx(0.5), pytest.approx(0.001))
    assert bound.attention_share(line, 5 * 512, 512) == pytest.approx(1 - 2.5 / sum(seconds))
    # A machine twice as slow has twice the line.
    slow = bound.fit_line([2 * second for second in seconds], 512)
    assert (slow.a, slow.b) == (pytest.approx(1.0), pytest.approx(0.002))


def test_the_start_of_a_long_prompt_is_not_lost_to_noise_at_its_end():
    generator = random.Random(0)
    for _ in range(20):
        # Off by up to 10% each, as on a laptop: absolute errors at the end are larger than the first times.
        noisy = [(0.55 + 0.0004 * bound.visible_full(512 * i, 512)) * generator.uniform(0.9, 1.1) for i in range(64)]
        line = bound.fit_line(noisy, 512)
        assert line.a == pytest.approx(0.55, rel=0.15) and line.b == pytest.approx(0.0004, rel=0.05)


@pytest.mark.parametrize("seconds", [[], [1.0, 2.0], [3.0, 2.0, 1.0], [1.0, 100.0, 200.0, 300.0]])
def test_no_line_from_times_that_tell_none(seconds):
    assert bound.fit_line(seconds, 64) is None


def test_the_bound_by_hand():
    config = SwaaConfig(4, 2)
    # Nothing but attention, so the bound is visible keys over visible keys: 136 of 16 queries, and
    # 1 + 2 + 3 + 4 + 5 + 6 * 11 = 81.
    pure = bound.Line(0.0, 1.0)
    assert bound.bound(pure, config, 16, 8, [1]) == pytest.approx(136 / 81)
    # Half of the heads slide; uneven layers count by their heads.
    half = dataclasses.replace(config, fa_layers=[0])
    assert bound.bound(pure, half, 16, 8, [1, 1]) == pytest.approx(136 / (136 / 2 + 81 / 2))
    assert bound.bound(pure, half, 16, 8, [3, 1]) == pytest.approx(136 / (136 * 3 / 4 + 81 / 4))
    # Two ubatches of a = 17 / 2 each cost as much as all attention of full attention does.
    assert bound.bound(bound.Line(8.5, 1.0), config, 16, 8, [1]) == pytest.approx((17 + 17) / (17 + 81 / 8))
    # A last ubatch of half the size has half of everything.
    seconds = bound.modelled_seconds(bound.Line(8.0, 1.0), None, 12, 8, [1])
    assert seconds == pytest.approx(8 + 4.5 + (8 + 10.5) / 2)


def test_nothing_is_gained_within_the_window_or_without_sliding_layers():
    line = bound.Line(0.5, 0.001)
    assert bound.bound(line, SwaaConfig(500, 12), 512, 128, [2] * 4) == pytest.approx(1)
    assert bound.bound(line, SwaaConfig(8, 0, "all"), 512, 128, [2] * 4) == 1
    assert bound.bound(line, None, 512, 128, [2] * 4) == 1
    assert bound.bound(line, SwaaConfig(500, 11), 512, 128, [2] * 4) > 1


# A run, on made-up times


class FakeRunner:
    """Answers jobs with made-up times: full attention 1 + keys / 100 per ubatch, sliding half of it."""

    jobs = ()  # of (library, job), over all instances
    all_patched = False
    gpus = ()
    fail_at = None  # (number of the job, exception)

    def __init__(self, library):
        self.library = library
        self.facts = {"swaa": self.all_patched or library.name == "ours", "version": "1.0", "commit": "abc"}
        self.facts["gpus"] = list(self.gpus)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, job, on_progress=None):
        if self.fail_at and len(self.jobs) == self.fail_at[0]:
            raise self.fail_at[1]
        self.jobs.append((str(self.library), job))
        on_progress(len(job.tokens))
        slides = "swaa.window_size" in job.overrides
        # One round is ten times as slow as the others: a median must not care.
        speed = (0.5 if slides else 1.0) * (10 if len(self.jobs) <= 2 else 1)
        full = [(1 + bound.visible_full(*part) / 100) * speed for part in bound.ubatches(len(job.tokens), job.n_ubatch)]
        return Timing(full, sum(full), [0.25 * speed] * job.decode, 4 << 20, 2 << 20)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "Runner", FakeRunner)
    monkeypatch.setattr(bench.native, "library_dir", lambda: tmp_path / "ours")
    monkeypatch.setattr(FakeRunner, "jobs", [])
    return FakeRunner


SLIDES = SwaaConfig(64, 4, fa_decode=True)


def test_sides_take_turns_and_every_second_round_goes_backwards(fake, file):
    configs = {"a": SLIDES, "b": SwaaConfig(65)}
    bench.bench(file, configs, [64, 32, 32], settings=Settings(repeat=2, batch=16, decode=2))
    names = {None: "full", 64: "a", 65: "b"}
    order = [(len(job.tokens), names[job.overrides.get("swaa.window_size")]) for _, job in fake.jobs]
    rounds = ["full", "a", "b", "b", "a", "full"]
    assert order == list(zip([32] * 6 + [64] * 6, rounds * 2, strict=True))
    assert {len(job.tokens) + job.decode for _, job in fake.jobs} == {34, 66}
    assert all(job.n_ctx == 256 and job.n_ubatch == 16 for _, job in fake.jobs)


def test_rounds_by_themselves():
    assert [Settings().rounds(n) for n in (1, 8192, 8193)] == [3, 3, 2]
    assert Settings(repeat=5).rounds(100_000) == 5


def test_full_attention_runs_on_the_baseline_without_overrides(fake, file, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "libllama.so").touch()
    report = bench.bench(file, {"a": SLIDES}, [32], settings=Settings(repeat=1), baseline=base)
    (full, full_job), (ours, our_job) = fake.jobs
    assert (full, full_job.overrides) == (str(base), {})
    assert ours == str(tmp_path / "ours") and our_job.overrides["swaa.sink_count"] == 4
    assert report.libraries["full"]["patched"] is False and report.libraries["swaa"]["patched"] is True


def test_without_a_baseline_full_attention_is_swaa_turned_off(fake, file, tmp_path):
    report = bench.bench(file, {"a": SLIDES}, [32], settings=Settings(repeat=1))
    (full, full_job), (ours, our_job) = fake.jobs
    assert full == ours == str(tmp_path / "ours")
    assert full_job == dataclasses.replace(our_job, overrides={"swaa.enabled": False})
    assert report.libraries["full"]["patched"] is True


def test_rows_are_ratios_of_medians_beside_the_bound(fake, file):
    report = bench.bench(file, {"a": SLIDES}, [200], settings=Settings(repeat=3, ubatch=50, decode=4))
    full, ours = report.rows()
    assert [row["config"] for row in (full, ours)] == ["full", "a"]
    seconds = 4 + 4 * 100.5 / 100
    assert (full["prefill_seconds"], full["prefill_tok_s"]) == (pytest.approx(seconds), pytest.approx(200 / seconds))
    assert (full["prefill_ratio"], full["bound"], full["ratio_to_bound"]) == (1, pytest.approx(1), pytest.approx(1))
    assert ours["prefill_ratio"] == pytest.approx(2) and ours["decode_ratio"] == pytest.approx(2)
    assert ours["ratio"] == pytest.approx(2) and ours["decode_tok_s"] == pytest.approx(8)
    best = bound.bound(bound.Line(1, 0.01), SLIDES, 200, 50, [8] * 4)
    assert ours["bound"] == pytest.approx(best) and ours["ratio_to_bound"] == pytest.approx(2 / best)
    assert (ours["compute_buffer_bytes"], ours["kv_bytes"], ours["swaa"]["window_size"]) == (4 << 20, 2 << 20, 64)
    # The raw samples are all there, the slow round too.
    assert [len(sample["ubatch_seconds"]) for sample in ours["repeats"]] == [4, 4, 4]
    assert sum(ours["repeats"][0]["ubatch_seconds"]) == pytest.approx(5 * seconds)


def test_rows_name_the_device(fake, file, monkeypatch):
    def devices(**settings):
        report = bench.bench(file, {"a": SLIDES}, [32], settings=Settings(repeat=1, **settings))
        assert report.to_dict()["libraries"]["full"]["gpus"] == list(fake.gpus)
        return [row["device"] for row in report.rows()], table(report.to_dict()).splitlines()[1]

    cpu = report_machine()["cpu"]
    assert devices()[0] == [cpu] * 2 and devices()[1].startswith(f"{cpu}, threads")
    monkeypatch.setattr(fake, "gpus", ["Card 1", "Card 2"])
    assert devices(gpu_layers=0)[0] == [cpu] * 2
    assert devices()[0] == devices(gpu_layers=5)[0] == ["Card 1 + Card 2"] * 2
    assert devices(gpu_layers=3)[0] == ["Card 1 + Card 2, 3 of 4 layers"] * 2
    assert devices()[1].startswith(f"on Card 1 + Card 2; {cpu}, threads")


def test_a_large_ubatch_is_handed_over_at_once(fake, file):
    result = run(file, "--prompt-tokens", 2500, "--ubatch", 2048, "--n-gpu-layers", 7, "--window", 64, "--repeat", 1)
    assert result.exit_code == 0, result.output
    jobs = [job for _, job in fake.jobs]
    assert [(job.n_batch, job.n_ubatch, job.gpu_layers) for job in jobs] == [(2048, 2048, 7)] * 2
    fake.jobs.clear()
    run(file, "--prompt-tokens", 2500, "--ubatch", 2048, "--batch", 256, "--window", 64, "--repeat", 1)
    run(file, "--prompt-tokens", 2500, "--ubatch", 64, "--window", 64, "--repeat", 1)
    assert [(job.n_batch, job.n_ubatch) for _, job in fake.jobs] == [(256, 256)] * 2 + [(512, 64)] * 2


def test_a_short_last_ubatch_is_no_point_of_the_line(fake, file):
    report = bench.bench(file, {"a": SLIDES}, [210], settings=Settings(ubatch=50))
    line = report.line(210)
    assert (line.a, line.b) == (pytest.approx(1), pytest.approx(0.01))


def test_a_document_is_plain_json(fake, file):
    document = bench.bench(file, {"a": SLIDES}, [200, 20], settings=Settings(ubatch=50)).to_dict()
    assert json.loads(json.dumps(document)) == document
    assert [(row["prompt_tokens"], row["config"]) for row in document["rows"]] == [
        (20, "full"),
        (20, "a"),
        (200, "full"),
        (200, "a"),
    ]
    assert document["rows"][1]["bound"] is None
    fit = {"prompt_tokens": 200, "a": pytest.approx(1), "b": pytest.approx(0.01)}
    assert document["fit"] == [fit | {"attention_share": pytest.approx(4.02 / 8.02)}]
    assert document["machine"]["cpu"] and document["model"]["layers"] == 4 and document["stopped"] is None


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), GenerationError("out of memory")])
def test_what_was_measured_survives_a_stop(fake, file, monkeypatch, stop):
    monkeypatch.setattr(fake, "fail_at", (3, stop))
    report = bench.bench(file, {"a": SLIDES, "b": SLIDES}, [32, 64], settings=Settings(repeat=1))
    assert report.stopped == ("interrupted" if isinstance(stop, KeyboardInterrupt) else stop)
    assert [(row["config"], row["prompt_tokens"]) for row in report.rows()] == [("full", 32), ("a", 32), ("b", 32)]
    assert report.to_dict()["stopped"] == (str(stop) or "interrupted")


def test_a_first_error_is_raised(fake, file, monkeypatch):
    monkeypatch.setattr(fake, "fail_at", (0, GenerationError("out of memory")))
    with pytest.raises(GenerationError, match="out of memory"):
        bench.bench(file, {"a": SLIDES}, [32])


def test_progress_counts_turns_and_guesses_the_time_left(fake, file):
    seen = []
    bench.bench(file, {"a": SLIDES}, [32, 64], settings=Settings(repeat=1), on_progress=seen.append)
    assert [(at.turn, at.config, at.prompt_tokens, at.done) for at in seen] == [
        (1, "full", 32, 0),
        (1, "full", 32, 32),
        (2, "a", 32, 0),
        (2, "a", 32, 32),
        (3, "full", 64, 0),
        (3, "full", 64, 64),
        (4, "a", 64, 0),
        (4, "a", 64, 64),
    ]
    assert seen[0].seconds_left is None and all(at.seconds_left is not None and at.turns == 4 for at in seen[1:])


def test_the_guess_goes_by_the_nearest_turn():
    took = {("full", 100): 10.0, ("a", 100): 4.0}
    assert bench._guess(took, ("full", 100)) == 10.0
    assert bench._guess(took, ("full", 300)) == 30.0
    assert bench._guess(took, ("a", 50)) == 2.0
    assert bench._guess({("full", 100): 10.0}, ("a", 100)) == 10.0


@pytest.mark.parametrize(
    "configs, lengths, settings, message",
    [
        ({"a": SLIDES}, [4090], {}, "4090 tokens and 32 more exceed the 4096 that the model was trained for"),
        ({"a": SLIDES}, [100], {"ctx": 131}, "100 tokens and 32 more don't fit a context of 131; it takes 132"),
        ({}, [100], {}, "give at least one configuration to compare"),
        ({"full": SLIDES}, [100], {}, "give at least one configuration to compare, and none of the name full"),
        ({"a": SLIDES}, [0], {}, "give at least one prompt length"),
        ({"a": SwaaConfig(8, 0, [4])}, [100], {}, "fa_layers has layer 4, but the model has 4 layers"),
        ({"a": SLIDES}, [100], {"ubatch": 0}, "n_ubatch = 0 is out of range"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(fake, file, configs, lengths, settings, message):
    with pytest.raises(ConfigError, match=message):
        bench.bench(file, configs, lengths, settings=Settings(**settings))
    assert fake.jobs == []


@pytest.mark.parametrize(
    "settings, lengths", [({}, [4064]), ({"decode": 0}, [4096]), ({"ctx": 9000}, [4096, 8192]), ({"ctx": 50}, [18])]
)
def test_lengths_by_default_are_those_that_fit(fake, file, settings, lengths):
    bench.bench(file, {"a": SLIDES}, settings=Settings(**settings))
    assert sorted({len(job.tokens) for _, job in fake.jobs}) == lengths


def test_a_context_of_ones_own_goes_beyond_the_training(fake, file):
    bench.bench(file, {"a": SLIDES}, [5000], settings=Settings(ctx=6000, repeat=1))
    assert [job.n_ctx for _, job in fake.jobs] == [6144, 6144]


def test_a_baseline_must_be_an_unpatched_build_of_the_same_release(fake, file, tmp_path, monkeypatch):
    with pytest.raises(NativeLibraryError, match=r"holds no llama\.cpp library; `make baseline` builds one"):
        bench.bench(file, {"a": SLIDES}, [32], baseline=tmp_path)
    (tmp_path / "libllama.so").touch()
    monkeypatch.setattr(fake, "all_patched", True)
    with pytest.raises(NativeLibraryError, match="holds a patched library; `make baseline` builds an unpatched one"):
        bench.bench(file, {"a": SLIDES}, [32], baseline=tmp_path)


def test_the_prompt_is_the_same_every_time(file):
    facts = read_model(file)
    tokens, what = bench.prompt_ids(facts, 50)
    assert (tokens, what) == bench.prompt_ids(facts, 50) and what == "random tokens"
    assert len(tokens) == 50 and set(tokens) <= {0, 1, 2} and len(set(tokens)) > 1
    assert bench.prompt_ids(facts, 20)[0] == tokens[:20]


def test_buffer_sizes_come_from_the_log():
    log = ["llama_kv_cache:        CPU KV buffer size =  ", "128.50 MiB\n", "x:  CPU  output buffer size = 9.00 MiB\n"]
    log += ["sched_reserve:      CUDA0 compute buffer size =   300.75 MiB\n"]
    log += ["sched_reserve:        CPU compute buffer size =     1.25 MiB\n"]
    assert worker._buffer_bytes(log, "KV") == int(128.5 * 2**20)
    assert worker._buffer_bytes(log, "compute") == 302 << 20
    assert worker._buffer_bytes([], "KV") == 0


# The command


def test_the_table_by_its_text(fake, file, monkeypatch):
    monkeypatch.setattr("swaa_edge.bench.report.machine", lambda: {"cpu": "A Processor", "cores": 8, "system": "Linux"})
    settings = Settings(ubatch=50, repeat=3, decode=4)
    report = bench.bench(file, {"a": SLIDES, "off": False}, [20, 2000], settings=settings)
    report.libraries["full"] |= {"path": "DIR", "patched": False}
    report.load = 2.0
    assert (
        table(report.to_dict() | {"stopped": "interrupted"})
        == """\
tiny (llama, 4 layers, F32, 0.00 GB)
A Processor, threads: 8 in prefill, 4 in decode; f16 KV cache, ubatch 50; prompt: random tokens
full attention: the unpatched library in DIR (ggml 1.0)

prompt  config  prefill tok/s  prefill  bound  of bound  decode tok/s  decode  request  compute MiB  KV MiB
    20    full           18.1    1.00x      -         -           4.0   1.00x    1.00x          4.0     2.0
    20       a           36.2    2.00x      -         -           8.0   2.00x    2.00x          4.0     2.0
    20     off           18.1    1.00x      -         -           4.0   1.00x    1.00x          4.0     2.0

 2,000    full            4.5    1.00x  1.00x      100%           4.0   1.00x    1.00x          4.0     2.0
 2,000       a            9.1    2.00x  6.60x       30%           8.0   2.00x    2.00x          4.0     2.0
 2,000     off            4.5    1.00x  1.00x      100%           4.0   1.00x    1.00x          4.0     2.0

Stopped early (interrupted); this is what was measured until then.
prefill, decode, request (both): full attention's time over this one's; above 1.00x is faster.
bound: the prefill ratio if sliding layers cost just their window's share of the measured attention time."""
    )
    report.load = 2.1
    busy = "\nThe machine was busy when this began (load 2.1 on 8 cores); the times may be noise.\nprefill, decode"
    assert busy in table(report.to_dict())


def test_json_on_stdout_is_one_document_and_nothing_else(fake, file):
    result = run(file, "--prompt-tokens", "20,100", "--recipes", "fast, off", "--json", "-", "--window", 64)
    document = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert list(dict.fromkeys(row["config"] for row in document["rows"])) == ["full", "fast", "off", "custom"]


def test_files_are_written_beside_the_table(fake, file, tmp_path):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    args = (file, "--prompt-tokens", "20,200", "--ubatch", 20, "--json", out, "--plot", picture)
    assert run(*args).stdout.startswith("tiny (llama, 4 layers")
    assert json.loads(out.read_text())["settings"]["ubatch"] == 20
    assert picture.read_bytes().startswith(b"\x89PNG")
    before, jobs = out.read_bytes(), len(fake.jobs)
    refused = run(*args)
    assert refused.exit_code == 1 and "exists already; pass --force to replace it" in refused.stderr
    # Said before the minutes of measuring, not after.
    assert out.read_bytes() == before and len(fake.jobs) == jobs
    assert run(*args, "--force").exit_code == 0


def test_a_plot_takes_its_kind_from_the_name(fake, file, tmp_path):
    pytest.importorskip("matplotlib")
    plot(bench.bench(file, {"a": SLIDES}, [20, 200]).to_dict(), tmp_path / "out.svg")
    assert "<svg" in (tmp_path / "out.svg").read_text()


def test_a_plot_without_matplotlib_is_one_line(file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = run(file, "--plot", "out.png")
    assert (result.exit_code, result.stderr) == (1, "Error: a plot needs matplotlib; pip install 'swaa-edge[plot]'\n")


@pytest.mark.parametrize("left", [1, 2])
def test_an_interrupted_run_prints_what_it_has(fake, file, monkeypatch, left, tmp_path):
    monkeypatch.setattr(fake, "fail_at", (left - 1, KeyboardInterrupt()))
    result = run(file, "--json", tmp_path / "out.json")
    assert result.exit_code == 130 and result.stderr == "Interrupted\n"
    assert ("Stopped early (interrupted)" in result.stdout) is (left == 2)
    assert (tmp_path / "out.json").exists() is (left == 2)


def test_an_error_comes_after_what_was_measured(fake, file, monkeypatch):
    monkeypatch.setattr(fake, "fail_at", (2, GenerationError("out of memory")))
    result = run(file, "--recipes", "fast")
    assert (result.exit_code, result.stderr) == (1, "Error: out of memory\n")
    assert "Stopped early (out of memory)" in result.stdout and "fast" in result.stdout


def test_progress_is_lines_where_stderr_is_no_terminal(fake, file):
    result = run(file, "--prompt-tokens", 20, "--recipes", "fast", "--repeat", 1, "--progress")
    assert result.stderr.splitlines() == [
        "1/2 full: 0/20 tokens",
        "1/2 full: 20/20 tokens, about 0 s left",
        "2/2 fast: 0/20 tokens, about 0 s left",
        "2/2 fast: 20/20 tokens, about 0 s left",
    ]


def test_what_is_compared(tmp_path, file):
    annotated, settings = tmp_path / "own.gguf", tmp_path / "mine.json"
    settings.write_text('{"sliding_window_size": 5}')
    assert run_annotate(file, annotated) == 0
    assert list(compared(file, None, None)) == ["quality", "balanced", "fast"]
    assert compared(annotated, None, None) == {"stream": SwaaConfig.from_gguf(annotated)}
    assert compared(file, f"off,memory,{settings}", SwaaConfig(7)) == {
        "off": False,
        "memory": SwaaConfig.from_recipe("memory"),
        "mine": SwaaConfig(5),
        "custom": SwaaConfig(7),
    }
    assert list(compared(annotated, "fast", None)) == ["fast"]


def run_annotate(source, output):
    return CliRunner().invoke(cli, ["annotate", str(source), "-o", str(output), "--recipe", "stream"]).exit_code


@pytest.mark.parametrize(
    "args, code, message",
    [
        ([], 2, "Error: give either MODEL.gguf or --shape NAME"),
        (["MODEL", "--shape", "qwen3-4b"], 2, "Error: give either MODEL.gguf or --shape NAME"),
        (["MODEL", "--layers", 2], 2, "Error: --layers, --type and --vocab belong to --shape"),
        (["--shape", "qwen3-5b"], 1, "Error: unknown shape 'qwen3-5b'; did you mean qwen3-4b?"),
        (["--shape", "../x"], 1, "Error: unknown shape '../x'; there are: qwen3-0.6b, qwen3-4b, llama-3.1-8b"),
        (["MODEL", "--prompt-tokens", "4k"], 2, "Error: Invalid value for '--prompt-tokens': '4k' must be numbers"),
        (["MODEL", "--prompt-tokens", "16,"], 2, "Error: Invalid value for '--prompt-tokens': '16,' must be numbers"),
        (["MODEL", "--prompt-tokens", "0"], 2, "Error: Invalid value for '--prompt-tokens': '0' must be numbers"),
        (["MODEL", "--recipes", "fsat"], 1, "Error: unknown recipe 'fsat'; did you mean fast?"),
        (["MODEL", "--recipes", "no.json"], 1, "Error: cannot read the settings file no.json: No such file"),
        (["MODEL", "--baseline", "nowhere"], 1, "Error: nowhere holds no llama.cpp library; `make baseline` builds"),
        (["none.gguf"], 1, "Error: none.gguf does not exist; give the path of a .gguf file"),
        (["MODEL", "--prompt-tokens", "32,8192"], 1, "Error: a prompt of 8192 tokens and 32 more exceed the 4096 that"),
    ],
)
def test_mistakes_are_one_line(fake, file, args, code, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = run(*(file if arg == "MODEL" else arg for arg in args))
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1, result.stderr


# With the engine


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """Two layers of Qwen3-0.6B and a vocabulary of 256."""
    return write_shape(tmp_path_factory.mktemp("shape") / "shape.gguf", "qwen3-0.6b", layers=2, vocab=256)


@pytest.mark.native
def test_a_run_on_the_engine(shape, tmp_path):
    # Tiny ubatches in a large context: there the full mask is what the compute buffer is made of.
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
    assert document["libraries"]["full"]["patched"] and document["model"]["heads"] == [16, 16]
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
def test_a_model_with_a_tokenizer_reads_real_text(gguf_model):
    path = gguf_model("qwen3", outtype="f16")
    tokens, what = bench.prompt_ids(read_model(path), 3000)
    assert what == "Python's language reference" and len(tokens) == 3000 and len(set(tokens)) > 200
    assert bench.prompt_ids(read_model(path), 100)[0] == tokens[:100]


@pytest.mark.native
def test_a_child_that_dies_is_one_line(shape):
    from swaa_edge import native

    with client.Runner(native.library_dir()) as runner:
        job = client.Job(model=str(shape), tokens=[1, 2, 3], n_ctx=256)
        assert len(runner.measure(job).ubatch_seconds) == 1
        # A refusal leaves the child alive.
        with pytest.raises(GenerationError, match="the engine failed at token 0"):
            runner.measure(dataclasses.replace(job, tokens=[1 << 20]))
        with pytest.raises(GenerationError, match=r"llama\.cpp can't load none\.gguf"):
            runner.measure(dataclasses.replace(job, model="none.gguf"))
        assert len(runner.measure(job).ubatch_seconds) == 1
        os.kill(runner._child.pid, signal.SIGABRT)
        with pytest.raises(GenerationError, match="died of SIGABRT"):
            runner.measure(job)


@pytest.mark.native
def test_a_folder_without_a_library_is_refused(tmp_path):
    (tmp_path / "libllama.so").write_text("no library")
    with pytest.raises(NativeLibraryError, match=f"the library in {tmp_path} does not load: ") as error:
        client.Runner(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.native
@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_ctrl_c_prints_the_table_and_ends_the_children(shape):
    args = ["--prompt-tokens", "16,100000", "--ubatch", "16", "--recipes", "fast", "--repeat", "1", "--decode", "0"]
    command = [sys.executable, "-m", "swaa_edge", "bench", str(shape), *args, "--progress"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in child.stderr:
        if line.startswith("3/4 full: 0/100,000"):
            break
    # The whole group gets it, as from a terminal.
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "Interrupted\n")
    assert "Stopped early (interrupted)" in out and " fast " in out and "100,000" not in out
    _expect_no_process_left(child.pid)


@pytest.mark.native
@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_measuring_processes_end_with_the_one_that_started_them(shape):
    # One ubatch of very many tokens under one thread: half a minute without a word from the child.
    args = ["--prompt-tokens", "8192", "--ubatch", "8192", "--batch", "8192", "--threads", "1", "--recipes", "fast"]
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
