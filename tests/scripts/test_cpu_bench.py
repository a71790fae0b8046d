"""scripts/cpu_bench.py: attention's part out of made-up times, the plan and its time limit, ratios of known samples,
the roofline program, the command's errors, and small runs on the engine.

pytest tests/scripts/test_cpu_bench.py
"""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swaa_edge import native
from swaa_edge.bench import bound
from swaa_edge.bench.client import Timing

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import cpu_bench
from cpu import figures, fit, measuring, plan, report, roofline
from cpu.measuring import Run, Sample
from cpu.plan import FLASH, FLASH_Q8_0, MINE, MINE_Q8_0, NO_FLASH, Settings, Side, Turn

BASELINE = ROOT / "build/baseline/lib"
KEYS = {
    "decode_vs_no_flash",
    "prefill_attention_speedup",
    "q8_0_over_f16",
    "rows",
    "decode_ratio",
    "decode_flash_ratio",
    "decode_bandwidth_share",
    "ratio_depth",
    "swaa",
    "roofline",
    "machine",
    "libraries",
    "settings",
    "skipped",
    "seconds",
    "stopped",
}


# Attention's seconds


def times(a, b, n_tokens, n_ubatch=512):
    """Seconds of the ubatches of a prompt: a + b * (mean of columns), a short last one its share."""
    return [(a + b * bound.visible_full(*part)) * part[1] / n_ubatch for part in bound.ubatches(n_tokens, n_ubatch)]


@pytest.mark.parametrize("n_tokens", [1536, 8192, 8192 + 100])
def test_attention_is_the_part_that_grows(n_tokens):
    b = 1e-4
    # Every token sees those before it and itself.
    columns = sum(range(1, n_tokens + 1)) / 512
    assert fit.attention_seconds(times(0.3, b, n_tokens), n_tokens, 512) == pytest.approx(b * columns)
    # Work that is the same in every ubatch is none of it.
    assert fit.attention_seconds(times(3.0, b, n_tokens), n_tokens, 512) == pytest.approx(b * columns)


def test_held_up_ubatches_do_not_move_the_line():
    generator = random.Random(0)
    clean = times(0.3, 1e-4, 8192)
    right = fit.attention_seconds(clean, 8192, 512)
    for _ in range(20):
        noisy = list(clean)
        for i in generator.sample(range(16), 3):
            noisy[i] *= generator.uniform(2, 10)
        assert fit.attention_seconds(noisy, 8192, 512) == pytest.approx(right, rel=0.1)
    # Also where all of them are at one end, which moves the mean of the slopes most.
    for late in ([*clean[:14], *(10 * second for second in clean[14:])], [9.0, 9.0, *clean[2:]]):
        assert fit.attention_seconds(late, 8192, 512) == pytest.approx(right, rel=0.15)


@pytest.mark.parametrize("seconds", [[], [1.0, 2.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
def test_times_that_tell_no_line(seconds):
    assert fit.attention_seconds(seconds, 512 * len(seconds), 512) is None


def test_a_line_foretells_a_longer_prompt():
    line = fit.robust_line(times(0.3, 1e-4, 2048), 2048, 512)
    assert fit.prefill_seconds(line, 8292, 512) == pytest.approx(sum(times(0.3, 1e-4, 8292)))


# The plan


def test_rounds_go_forwards_and_backwards():
    first, second, third = plan.blocks(Settings.quickly(2, rounds=3))
    assert [block.number for block in (first, second, third)] == [1, 2, 3]
    sides = [turn.side for turn in first.turns]
    assert set(sides) == {NO_FLASH, FLASH, MINE, MINE_Q8_0} and {turn.depth for turn in first.turns} == {8192}
    assert {turn.layers for turn in first.turns} == {2}
    assert [turn.side for turn in second.turns] == sides[::-1] and third.turns == first.turns


def test_the_whole_plan():
    planned = list(plan.blocks(Settings(2)))
    turns = [turn for block in planned for turn in block.turns]
    # The slow one at most once, and not where it takes half an hour.
    assert sorted(turn.depth for turn in turns if turn.side == FLASH_Q8_0) == [2048, 8192]
    # A long prefill with few layers, once; ours more often.
    long = [turn for turn in turns if turn.depth == 32768]
    assert {turn.layers for turn in long} == {2} and len(set(long)) == 4
    assert [long.count(Turn(side, 32768, 2)) for side in (NO_FLASH, FLASH, MINE, MINE_Q8_0)] == [1, 1, 3, 3]
    sliding = {(turn.depth, turn.side.library, turn.side.config) for turn in turns if turn.side.config != plan.FULL}
    assert sliding == {
        (depth, library, name)
        for depth in (8192, 16384)
        for library in (plan.OURS, plan.STOCK)
        for name in ("quality", "balanced", "fast", "memory", "stream")
    }
    assert {turn.layers for turn in turns if turn.depth < 32768} == {4}
    # No quantized cache without flash attention: there is no such thing.
    assert all(turn.side.flash_attn or turn.side.kv == "f16" for turn in turns)
    assert plan.left_out(Settings(2)) == ["unpatched, q8_0, 32,768: its prefill would take far too long"]
    assert len(plan.left_out(Settings.quickly(2))) == 2


class FakeRunner:
    """A library whose every prefill token takes as long as told, and a decoded one a hundredth of its context."""

    def __init__(self, name, clock, jobs, pace):
        self.name, self.clock, self.jobs, self.pace = name, clock, jobs, pace

    def measure(self, job):
        self.jobs.append((self.name, job))
        n = len(job.tokens)
        seconds = [second * self.pace for second in times(1.0, 1e-3, n, job.n_ubatch)]
        decoded = [1e-3 * self.pace * (1 + n / 100)] * job.decode
        self.clock[0] += sum(seconds) + sum(decoded)
        return Timing(seconds, sum(seconds), decoded, 0, 0)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """make(**settings): a Run on fake libraries and a fake clock, and the list of its jobs."""
    clock, jobs = [0.0], []
    monkeypatch.setattr(measuring.time, "monotonic", lambda: clock[0])

    def make(quick=True, **settings):
        paces = {plan.UNPATCHED: 2.0, plan.OURS: 1.0, plan.STOCK: 1.5}
        runners = {name: FakeRunner(name, clock, jobs, pace) for name, pace in paces.items()}
        libraries = measuring.Libraries(runners)
        libraries.facts = lambda: {"ours": {"path": "DIR", "ggml": "1"}}
        small = {"layers": 2, "vocab": 64, "decode": 4}
        kind = Settings.quickly if quick else Settings
        return Run(kind(2, **(small | settings)), libraries, tmp_path), jobs

    return make


def test_a_turn_is_two_jobs_in_one_process(fake):
    run, jobs = fake(rounds=1)
    run.all()
    assert [name for name, _ in jobs] == ["unpatched"] * 2 + ["ours"] * 2 + ["unpatched"] * 2 + ["ours"] * 2
    assert [len(job.tokens) for _, job in jobs] == [8192, measuring.SHALLOW] * 4
    assert [(job.flash_attn, job.cache_type) for _, job in jobs[1::2]] == [(False, 1), (True, 1), (True, 1), (True, 8)]
    assert all((job.threads, job.prefill_threads, job.n_ubatch, job.decode) == (2, 2, 512, 4) for _, job in jobs)
    assert all(job.n_ctx % 256 == 0 and job.n_ctx >= len(job.tokens) + job.decode for _, job in jobs)
    assert all(job.overrides == {} for _, job in jobs) and len({job.model for _, job in jobs}) == 1


def test_presets_slide_in_ours_and_in_ours_with_upstreams_kernels(fake):
    run, jobs = fake(quick=False, depths=(2048,), swaa_depths=(4096,), rounds=1, seconds=1e9)
    run.all()
    sliding = [(name, job) for name, job in jobs if job.overrides and len(job.tokens) == 4096]
    assert [name for name, _ in sliding] == ["ours-stock", "ours"] * 5
    assert all(job.overrides["swaa.window_size"] == 2048 for _, job in sliding)
    rows = {(row["library"], row["config"]): row for row in figures.make_rows(run.samples, run.settings)}
    # A sliding ubatch's time is no line.
    assert rows["ours", "fast"]["attention_seconds"] is None and rows["ours", "full"]["attention_seconds"] > 0
    found = figures.ratios(list(rows.values()))["swaa"]
    assert [(row["depth"], row["config"]) for row in found] == [(4096, name) for name in plan.RECIPES]
    for row in found:
        assert [row["prefill_vs_full"], row["decode_vs_full"]] == pytest.approx([2, 2])
        assert [row["prefill_vs_stock"], row["decode_vs_stock"]] == pytest.approx([1.5, 1.5])


def test_time_ends_rounds_as_a_whole_and_says_so(fake):
    run, _ = fake(seconds=1e9, rounds=3)
    run.all()
    assert {len(samples) for samples in run.samples.values()} == {3} and run.skipped == plan.left_out(run.settings)
    one_round = run.elapsed / 3
    run, _ = fake(seconds=one_round * 2.5, rounds=3)
    began = measuring.time.monotonic()
    run.all()
    assert {len(samples) for samples in run.samples.values()} == {2}
    assert measuring.time.monotonic() - began <= one_round * 2.5
    assert run.skipped[-1] == "round 3 at 8,192: out of time"
    # The first is measured however slow the machine is, and nothing after it, known or not.
    run, _ = fake(quick=False, depths=(2048,), seconds=1.0)
    run.all()
    assert {turn.side: len(samples) for turn, samples in run.samples.items()} == dict.fromkeys(
        [NO_FLASH, FLASH, MINE, MINE_Q8_0, FLASH_Q8_0], 1
    )
    assert "ours, f16, fast, 8,192: out of time" in run.skipped


def test_a_longer_prefill_is_left_out_by_what_a_shorter_one_took(fake):
    run, _ = fake(depths=(2048, 8192, 32768), rounds=1, seconds=1e9)
    run.all()
    longest = [turn for turn in run.samples if turn.depth == 32768]
    for turn in longest:
        others = {other: samples for other, samples in run.samples.items() if other.depth < 32768}
        sample = run.samples[turn][0]
        took = sum(map(sum, (sample.shallow.decode_seconds, sample.deep.ubatch_seconds, sample.deep.decode_seconds)))
        guessing, _ = fake()
        guessing.samples = others
        assert took <= guessing.estimate(turn) < 1.25 * took
    limit = run.elapsed * 0.8
    run, _ = fake(depths=(2048, 8192, 32768), rounds=1, seconds=limit)
    began = measuring.time.monotonic()
    run.all()
    assert 0 < sum(turn.depth == 32768 for turn in run.samples) < 4
    assert measuring.time.monotonic() - began <= limit
    assert any(", 32,768: it would take about " in line for line in run.skipped)


# Ratios


def sample(prefill=(1.0, 1e-3), decode=0.02, shallow=0.01, depth=8192, cpu=2.0, at=0, reads=None):
    ubatches = times(*prefill, depth)
    return Sample(
        Timing([0.1], 0.1, [shallow] * 4, 0, 0),
        Timing(ubatches, cpu * sum(ubatches), [decode] * 4, 0, 0),
        at,
        reads,
    )


def test_rows_and_ratios_by_hand():
    settings = Settings.quickly(2)

    # The second round is one in which everything takes three times as long, of ours too: no ratio may care.
    def rounds(**given):
        slow = given | {"prefill": tuple(3 * x for x in given["prefill"])}
        slow |= {name: 3 * given[name] for name in ("decode", "shallow")} | {"reads": 20 / 3}
        given |= {"reads": 20.0}
        return [sample(**given), sample(**slow, at=1), sample(**given, at=2)]

    samples = {
        Turn(NO_FLASH, 8192, 2): rounds(prefill=(1.0, 5e-4), decode=0.020, shallow=0.010),
        Turn(MINE, 8192, 2): rounds(prefill=(1.0, 1e-4), decode=0.016, shallow=0.010),
        Turn(FLASH, 8192, 2): rounds(prefill=(1.0, 3e-4), decode=0.064, shallow=0.010),
        Turn(MINE_Q8_0, 8192, 2): rounds(prefill=(2.0, 8e-5), decode=0.0125, shallow=0.010),
    }
    rows = figures.make_rows(samples, settings)
    row = figures.find(rows, MINE, 8192)
    columns = sum(range(1, 8193)) / 512
    assert row["attention_seconds"] == pytest.approx(1e-4 * columns)
    assert row["prefill_seconds"] == pytest.approx(16 + 1e-4 * columns)
    assert row["decode_tok_s"] == pytest.approx(1 / 0.016) and row["decode_attention_seconds"] == pytest.approx(0.006)
    # Two layers, K and V, 8 heads of 128 numbers of 2 bytes.
    assert row["decode_gb_s"] == pytest.approx(2 * 2 * 8 * 128 * 2 * (8192 - measuring.SHALLOW) / 0.006 / 1e9)
    assert row["spread"]["prefill"] == pytest.approx(2) and row["cpu_share"] == pytest.approx(1)
    assert (row["library"], row["flash_attn"], row["kv_type"], row["rounds"]) == ("ours", True, "f16", 3)
    found = figures.ratios(rows)
    assert found["ratio_depth"] == 8192
    assert found["decode_vs_no_flash"] == pytest.approx(20 / 16)
    # The faster one of the other library is with flash attention here.
    assert found["prefill_attention_speedup"] == pytest.approx(3)
    assert found["q8_0_over_f16"] == pytest.approx(1e-4 / 8e-5)
    assert found["decode_ratio"] == {"8192": {"f16": pytest.approx(20 / 16), "q8_0": pytest.approx(20 / 12.5)}}
    assert found["decode_flash_ratio"] == {"8192": {"f16": pytest.approx(4), "q8_0": None}}
    shares = found["decode_bandwidth_share"]
    assert shares["f16"] == pytest.approx(row["decode_gb_s"] / 20)
    assert row["read_gb_s"] == 20 and row["repeats"]["read_share"] == [pytest.approx(shares["f16"])] * 3
    assert shares["q8_0"] == pytest.approx(shares["f16"] * (34 / 64) * 0.006 / 0.0025)


def test_only_figures_of_one_round_are_compared():
    # Ours had four rounds, of which the second and the last were its own; of what it had alone no ratio may hear.
    ours = [sample(decode=seconds, at=at) for at, seconds in enumerate((0.01, 1.0, 0.02, 1.0))]
    theirs = [sample(decode=0.02, at=0), sample(decode=0.04, at=2), sample(decode=9.0, at=7)]
    samples = {Turn(MINE, 8192, 2): ours, Turn(NO_FLASH, 8192, 2): theirs}
    rows = figures.make_rows(samples, Settings.quickly(2))
    assert figures.ratios(rows)["decode_vs_no_flash"] == pytest.approx(2)
    assert figures.paired(rows[0], None, "decode_tok_s") is None


def test_the_faster_setting_of_the_unpatched_library_may_be_without_flash_attention():
    samples = {
        Turn(NO_FLASH, 8192, 2): [sample(prefill=(1.0, 2e-4))],
        Turn(FLASH, 8192, 2): [sample(prefill=(1.0, 3e-4))],
        Turn(MINE, 8192, 2): [sample(prefill=(1.0, 1e-4))],
    }
    rows = figures.make_rows(samples, Settings.quickly(2))
    assert figures.ratios(rows)["prefill_attention_speedup"] == pytest.approx(2)
    assert figures.ratios(rows)["decode_bandwidth_share"] == {"f16": None, "q8_0": None}


def test_without_8192_the_ratios_are_of_the_longest_depth():
    turns = [Turn(side, depth, 2) for depth in (2048, 4096) for side in (NO_FLASH, MINE)]
    samples = {turn: [sample(decode=0.02 * (turn.depth / 2048), depth=turn.depth)] for turn in turns}
    samples[Turn(MINE, 4096, 2)] = [sample(decode=0.01, depth=4096)]
    found = figures.ratios(figures.make_rows(samples, Settings.quickly(2)))
    assert (found["ratio_depth"], found["decode_vs_no_flash"]) == (4096, pytest.approx(4))
    assert found["decode_ratio"]["2048"] == {"f16": pytest.approx(1), "q8_0": None}


def test_what_the_times_do_not_tell_is_none_and_a_dash(fake):
    # Decoding at the depth was faster than at none, and the prefill's ubatches don't grow.
    samples = {Turn(Side("ours"), 2048, 2): [sample(prefill=(1.0, 0.0), decode=0.01, shallow=0.02, depth=2048)]}
    run, _ = fake()
    run.samples = samples
    document = report.make_document(run, {"load": None})
    row = document["rows"][0]
    assert row["attention_seconds"] is row["decode_attention_seconds"] is row["decode_gb_s"] is None
    assert document["decode_vs_no_flash"] is document["prefill_attention_speedup"] is document["roofline"] is None
    assert set(document) == KEYS and json.loads(json.dumps(document, allow_nan=False)) == document
    shown = report.text(document)
    assert "decode_vs_no_flash: - (wanted 1.00; at 2,048)" in shown
    assert "left out: unpatched, q8_0: its prefill takes minutes" in shown


def test_the_text_by_its_lines(fake):
    run, _ = fake(rounds=2, seconds=1e9)
    run.all()
    shown = report.text(report.make_document(run, {"load": 0.5}) | {"stopped": "interrupted"}).splitlines()
    # Every side of the fake libraries takes twice as long unpatched, and half of its threads' time.
    heads = next(line for line in shown if line.startswith("side "))
    assert " ".join(heads.split()) == (
        "side depth layers rounds prefill s attention s spread decode tok/s iqr K and V GB/s reads GB/s"
    )
    rows = [line.rsplit(maxsplit=10) for line in shown if ", flash, " in line or ", no flash, " in line]
    assert [row[0] for row in rows] == [
        "unpatched, no flash, f16",
        "ours, flash, f16",
        "unpatched, flash, f16",
        "ours, flash, q8_0",
    ]
    assert [row[1:4] for row in rows] == [["8,192", "2", "2"]] * 4
    assert any(line.startswith("decode_vs_no_flash: 2.00 (wanted 1.00; at 8,192): ") for line in shown)
    assert any(line.startswith("prefill_attention_speedup: 2.00 (wanted 2.00; at 8,192): ") for line in shown)
    assert "decode_ratio at 8,192, f16: 2.00 (wanted 1.00), over its own with flash attention 2.00" in shown
    assert "Other programs took processor time (a prefill got 50% of it); the figures may be noise." in shown
    assert shown[-1] == "Stopped early (interrupted); this is what was measured until then."


# The roofline


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return roofline.Roofline.compiled(tmp_path_factory.mktemp("roofline"))


def test_the_program_measures_this_machine(program):
    assert set(program.measure(2, mib=8, seconds=0.005)) == set(roofline.UNITS)
    program.measure(1, mib=8, seconds=0.005)
    assert program.read(2, mib=8, seconds=0.005) > 0
    assert len(program.samples) == 2
    found = program.summary()
    for unit in ("f32_gflops", "read_gb_s"):
        values = [taken[unit] for taken in program.samples]
        assert all(math.isfinite(value) and value > 0 for value in values)
        assert min(values) <= found[unit] <= max(values)
    flags = report.cpu_flags()
    for unit, needed in (("bf16_gflops", "avx512_bf16"), ("int8_gops", "avx512_vnni")):
        value = found[unit]
        assert value is None or (math.isfinite(value) and value > 0)
        # A compiler may be older than the processor, but no unit is made up.
        assert value is None or sys.platform != "linux" or needed in flags or {"avx_vnni", "asimddp", "i8mm"} & {*flags}


@pytest.mark.parametrize("arguments", [["0"], ["1", "-1"], ["1", "8", "0"], ["two"], ["1", "8", "1", "write"]])
def test_the_program_refuses_nonsense(program, arguments):
    done = subprocess.run([str(program.path), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


def test_medians_go_by_the_samples_that_have_a_unit():
    samples = [dict.fromkeys(roofline.UNITS, value) | {"int8_gops": None} for value in (3.0, 1.0, 2.0)]
    samples[0]["bf16_gflops"] = None
    expected = {"f32_gflops": 2.0, "bf16_gflops": 1.5, "int8_gops": None, "read_gb_s": 2.0}
    assert roofline.medians(samples) == expected


def test_without_a_compiler_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(roofline.NoRoofline, match="no-such-compiler does not run"):
        roofline.Roofline.compiled(tmp_path)
    monkeypatch.setenv("CXX", "false --version")
    with pytest.raises(roofline.NoRoofline, match=r"false does not compile roofline\.cpp"):
        roofline.Roofline.compiled(tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(roofline.NoRoofline, match="there is no C\\+\\+ compiler"):
        roofline.Roofline.compiled(tmp_path)


def test_a_roofline_that_dies_ends_no_run(fake, tmp_path):
    run, _ = fake(rounds=1)
    script = tmp_path / "roofline"
    script.write_text("#!/bin/sh\nexit 7\n")
    script.chmod(0o755)
    run.roofline = roofline.Roofline(script, "c++")
    run.all()
    assert len(run.samples) == 4 and run.skipped[-1] == "roofline: the program for it ended with code 7"


# The command


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", "0"], "argument --layers: '0' must be a whole number from 1 to 1000000"),
        (["--threads", "-2"], "argument --threads: '-2' must be a whole number from 1 to 1000000"),
        (["--threads", "two"], "argument --threads: 'two' must be a whole number from 1 to 1000000"),
        (["--depths", "2048,0"], "argument --depths: '0' must be a whole number from 1 to 1000000"),
        (["--depths", ""], "argument --depths: '' must be a whole number from 1 to 1000000"),
        (["--depths", "2048,"], "argument --depths: '' must be a whole number from 1 to 1000000"),
        (["--quik"], "unrecognized arguments: --quik"),
        (["--qui"], "unrecognized arguments: --qui"),
        (["model.gguf"], "unrecognized arguments: model.gguf"),
        (["--baseline", "nowhere"], "--baseline: nowhere holds no llama.cpp library; `make baseline` builds one"),
        (["--library", "nowhere"], "--library: nowhere holds no llama.cpp library; `make setup` builds one"),
        (["--models", "nowhere"], "--models: nowhere is no folder; create it, or leave the option out"),
        (["--json", "nowhere/out.json"], "the folder nowhere does not exist; create it or choose another output"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libllama.so").touch()
    given = ["--baseline", "lib", "--library", "lib", *arguments]
    with pytest.raises(SystemExit) as ended:
        cpu_bench.main(given)
    assert ended.value.code == 2 and capsys.readouterr() == ("", f"Error: {message}\n")


def test_a_library_that_does_not_load_is_one_line(tmp_path, capsys):
    (tmp_path / "libllama.so").write_text("no library")
    code = cpu_bench.main(["--baseline", str(tmp_path), "--library", str(tmp_path), "--no-roofline"])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "") and err.startswith("Error: the library in ") and err.count("\n") == 1


# With the engine


@pytest.fixture
def libraries():
    """Folders of both libraries."""
    if not any(BASELINE.glob("*llama.*")):
        pytest.skip("no unpatched library; make baseline builds it")
    return native.library_dir(), BASELINE


@pytest.mark.native
def test_a_small_run_of_all_of_it(libraries, program, tmp_path):
    settings = Settings(1, layers=2, vocab=256, depths=(96,), swaa_depths=(128,), ubatch=16, decode=3, rounds=2)
    settings = dataclasses.replace(settings, seconds=1e9, read_mib=8)
    lines = []
    roof = roofline.Roofline(program.path, program.compiler)
    with measuring.Libraries.started(*libraries, stock=True) as started:
        run = Run(settings, started, tmp_path, roof, lines.append)
        run.all()
        document = report.make_document(run, {"roofline": roof, "load": None})
    assert set(document) == KEYS
    wanted = {turn for block in plan.blocks(settings) for turn in block.turns}
    assert set(run.samples) == wanted and len(document["rows"]) == len(wanted) and document["skipped"] == []
    assert len(lines) == sum(len(block.turns) for block in plan.blocks(settings))
    assert all(row["prefill_seconds"] > 0 and row["decode_tok_s"] > 0 for row in document["rows"])
    assert document["decode_vs_no_flash"] > 0 and document["decode_ratio"]["96"]["q8_0"] > 0
    assert document["decode_flash_ratio"]["96"]["q8_0"] > 0 and document["roofline"]["f32_gflops"] > 0
    assert all(row["prefill_vs_full"] > 0 and row["decode_vs_stock"] > 0 for row in document["swaa"])
    patched = {name: library["patched"] for name, library in document["libraries"].items()}
    assert patched == {"unpatched": False, "ours": True, "ours-stock": True}
    assert json.loads(json.dumps(document, allow_nan=False)) == document and report.text(document)


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads another process's environment")
def test_only_the_stock_library_is_without_our_kernels(libraries):
    before = dict(os.environ)
    with measuring.Libraries.started(*libraries, stock=True) as started:
        off = {
            name: b"GGML_CPU_FATTN=0" in Path(f"/proc/{runner._child.pid}/environ").read_bytes().split(b"\0")
            for name, runner in started.runners.items()
        }
    assert off == {plan.UNPATCHED: False, plan.OURS: False, plan.STOCK: True} and dict(os.environ) == before


@pytest.mark.native
def test_flash_attention_off_reaches_the_engine(libraries, tmp_path):
    settings = Settings(1, layers=1, vocab=256, ubatch=512, decode=1)
    sizes = {}
    with measuring.Libraries.started(*libraries, stock=False) as started:
        assert set(started.runners) == {plan.UNPATCHED, plan.OURS}
        run = Run(settings, started, tmp_path)
        for side in (NO_FLASH, FLASH):
            sizes[side] = started.runners[side.library].measure(run._job(side, 2048, 1)).compute_bytes
    # Without it the scores of all heads are a tensor: 16 heads, 512 rows, 2304 columns of 4 bytes.
    assert sizes[NO_FLASH] - sizes[FLASH] > 16 * 512 * 2304 * 4 / 2


@pytest.mark.native
def test_the_libraries_must_be_the_right_ones(libraries, capsys):
    ours, unpatched = map(str, libraries)
    assert cpu_bench.main(["--baseline", ours, "--library", ours, "--no-roofline"]) == 1
    assert "holds a patched library; `make baseline` builds an unpatched one" in capsys.readouterr().err
    assert cpu_bench.main(["--baseline", unpatched, "--library", unpatched, "--no-roofline"]) == 1
    assert "holds an unpatched library; give the patched one as --library" in capsys.readouterr().err


@pytest.mark.native
@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_ctrl_c_tells_what_there_is_and_leaves_nothing_behind(libraries, tmp_path):
    ours, unpatched = map(str, libraries)
    command = [sys.executable, str(SCRIPTS / "cpu_bench.py"), "--quick", "--layers", "1", "--depths", "512,100000"]
    command += ["--library", ours, "--baseline", unpatched, "--no-roofline", "--json", "-"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        # A shell that runs tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert "round 1, unpatched, no flash attention, f16, 512: prefill" in child.stderr.readline()
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err.splitlines()[-1]) == (130, "Interrupted"), err
    document = json.loads(out)
    assert set(document) == KEYS and document["stopped"] == "interrupted"
    assert document["rows"][0]["decode_tok_s"] > 0
    deadline = time.monotonic() + 30
    while _group_lives(child.pid):
        assert time.monotonic() < deadline, "a measuring process is left over"
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def _group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_document_names_no_folder_above_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert measuring.from_here(str(tmp_path / "build" / "lib")) == "build/lib"
    assert measuring.from_here(str(tmp_path.parent / "lib")) == str(tmp_path.parent / "lib")
