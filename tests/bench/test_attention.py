"""bench_attention: its sides, turns and time limit, and figures and ratios of made-up times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from swaa_edge.bench import attention, bench_attention, bound
from swaa_edge.bench.attention_report import AttentionReport, Sample, Side
from swaa_edge.bench.client import PATCHED, UNPATCHED, UPSTREAM_KERNELS, Timing
from swaa_edge.bench.workload import Workload
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError, GenerationError

BASELINE = Path(__file__).parents[2] / "build/baseline/lib"
NO_FLASH, FLASH, FLASH_Q8_0 = Side(UNPATCHED, flash_attn=False), Side(UNPATCHED), Side(UNPATCHED, cache_type="q8_0")
MINE, MINE_Q8_0 = Side(PATCHED), Side(PATCHED, cache_type="q8_0")
KEYS = {
    "decode_vs_no_flash",
    "prefill_attention_speedup",
    "q8_0_over_f16",
    "ratio_depth",
    "decode_ratio",
    "decode_bandwidth_share",
    "swaa",
    "rows",
    "roofline",
    "reference",
    "skipped",
    "settings",
    "prompt",
    "model",
    "machine",
    "libraries",
    "stopped",
}


@pytest.fixture
def fake(fake_runner, monkeypatch):
    """The made-up child processes; the memory reads 20 GB/s. A decoded token takes 1 ms per 10 tokens before it."""

    def times(self, job, _):
        pace = 2.0 if not self.facts["swaa"] else 1.5 if self.environment else 1.0
        n = len(job.tokens)
        ubatches = [(1 + 1e-3 * bound.visible_full(*part)) * pace for part in bound.ubatches(n, job.engine.n_ubatch)]
        return ubatches, [1e-3 * pace * (1 + n / 10)] * job.decode

    monkeypatch.setattr(fake_runner, "times", times)
    monkeypatch.setattr(attention, "bandwidth", lambda threads: 20.0)
    return fake_runner


def run(model, configs=None, lengths=(2048,), **options):
    settings = EngineSettings(n_threads=2, n_ctx=40_000, n_ubatch=options.pop("n_ubatch", 512))
    return bench_attention(model, configs, lengths, engine=settings, **({"decode": 4} | options))


def test_a_turn_is_two_jobs_in_one_process(fake, bench_model, baseline):
    report = run(bench_model, repeat=2, quick=True, baseline=baseline)
    sides = [NO_FLASH, MINE, FLASH, MINE_Q8_0]
    folders = {UNPATCHED: "base", PATCHED: "ours"}
    expected = [(folders[side.library], side.flash_attn, side.cache_type) for side in [*sides, *sides[::-1]]]
    for jobs, length in ((fake.jobs[::2], 2048), (fake.jobs[1::2], 16)):
        assert [(name, job.flash_attn, job.engine.cache_type) for name, job in jobs] == expected
        assert {len(job.tokens) for _, job in jobs} == {length}
    assert {(job.engine.n_threads, job.engine.n_gpu_layers, job.decode) for _, job in fake.jobs} == {(2, 0, 4)}
    off = {name: job.overrides for name, job in fake.jobs}
    assert off == {"base": {}, "ours": {"swaa.enabled": False}}
    assert list(report.samples) == [(side, 2048) for side in sides]
    assert report.skipped == ["llama.cpp's kernels with a q8_0 cache, 2,048 tokens: its prefill takes minutes"]


def test_without_quick_the_slow_cache_runs_once_where_it_takes_minutes(fake, bench_model, baseline):
    report = run(bench_model, lengths=(2048, 16384), repeat=2, baseline=baseline)
    assert {key: len(samples) for key, samples in report.samples.items()} == {
        **{(side, length): 2 for side in (NO_FLASH, MINE, FLASH, MINE_Q8_0) for length in (2048, 16384)},
        (FLASH_Q8_0, 2048): 1,
    }
    assert report.skipped == ["llama.cpp's kernels with a q8_0 cache, 16,384 tokens: its prefill takes minutes"]


def test_without_a_baseline_the_reference_is_our_library_with_upstreams_kernels(fake, bench_model):
    report = run(bench_model, repeat=1, quick=True)
    assert report.reference == UPSTREAM_KERNELS and set(report.libraries) == {PATCHED, UPSTREAM_KERNELS}
    assert all(job.overrides == {"swaa.enabled": False} for _, job in fake.jobs)
    assert report.to_dict()["decode_vs_no_flash"] == pytest.approx(1.5)


def test_configurations_slide_with_both_kernels(fake, bench_model, baseline):
    report = run(bench_model, "fast,quality", repeat=2, quick=True, baseline=baseline)
    sliding = [side for side, _ in report.samples if side.config != "full"]
    assert sliding == [
        Side(library, config=name) for name in ("fast", "quality") for library in (UPSTREAM_KERNELS, PATCHED)
    ]
    assert sum(job.overrides.get("swaa.window_size") == 2048 for _, job in fake.jobs) == 4 * 2 * 2
    rows = {(row["library"], row["config"]): row for row in report.rows()}
    # The times of ubatches with sliding layers lie on no line.
    assert rows[PATCHED, "fast"]["attention_seconds"] is None and rows[PATCHED, "full"]["attention_seconds"] > 0
    found = report.to_dict()["swaa"]
    assert [(row["prompt_tokens"], row["config"]) for row in found] == [(2048, "fast"), (2048, "quality")]
    for row in found:
        assert [row["prefill_vs_full"], row["decode_vs_full"]] == pytest.approx([2, 2])
        assert [row["prefill_vs_upstream"], row["decode_vs_upstream"]] == pytest.approx([1.5, 1.5])


def test_quick_begins_no_round_that_would_end_late(fake, bench_model, baseline, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(attention.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(attention, "bandwidth", lambda threads: clock.__setitem__(0, clock[0] + 25.0) or 20.0)
    # A round takes 100 seconds: two fit into 270.
    report = run(bench_model, lengths=(2048,), quick=True, baseline=baseline)
    assert {len(samples) for samples in report.samples.values()} == {2}
    assert report.skipped[-1] == "round 3 at 2,048 tokens: no time left"
    clock[0] = 0.0
    report = run(bench_model, baseline=baseline)
    assert {len(samples) for (side, _), samples in report.samples.items() if side != FLASH_Q8_0} == {3}


def test_what_quick_and_the_defaults_are(fake, bench_model):
    quick = bench_attention(bench_model, quick=True, engine=EngineSettings(n_ctx=40_000))
    assert (quick.work.lengths, quick.work.decode, quick.repeat, quick.work.engine.n_ubatch) == ((8192,), 64, 5, 512)
    whole = bench_attention(bench_model, engine=EngineSettings(n_ctx=40_000))
    assert (whole.work.lengths, whole.work.decode, whole.repeat) == ((2048, 8192, 32768), 64, 3)
    assert whole.work.engine.n_threads == attention._cores()
    with pytest.raises(ConfigError, match="decode = 0 must be at least 1"):
        bench_attention(bench_model, decode=0)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), GenerationError("out of memory")])
def test_an_early_end_keeps_the_results(fake, bench_model, monkeypatch, stop):
    monkeypatch.setattr(fake, "fail_at", (3, stop))
    report = run(bench_model, quick=True)
    assert len(report.samples) == 1 and report.to_dict()["stopped"] == (str(stop) or "interrupted")
    assert report.to_dict()["decode_vs_no_flash"] is None and "Stopped early" in str(report)


def test_an_error_before_any_result_is_raised(fake, bench_model, monkeypatch):
    monkeypatch.setattr(fake, "fail_at", (0, GenerationError("out of memory")))
    with pytest.raises(GenerationError, match="out of memory"):
        run(bench_model)


# Figures and ratios


@pytest.fixture
def report(bench_model):
    """A report without samples: ubatches of 512 tokens, two threads."""
    work = Workload.of(bench_model, [8192], decode=4, engine=EngineSettings(n_ctx=9000, n_threads=2))
    libraries = {name: {"path": "DIR", "ggml": "1"} for name in (PATCHED, UNPATCHED)}
    return AttentionReport(work, {"full": False}, 3, libraries, UNPATCHED)


def sample(prefill=(1.0, 1e-3), decode=0.02, shallow=0.01, length=8192, reads=20.0):
    """Ubatches of a + b * keys seconds, in a context of 9216 tokens whose K and V have 1000 bytes per token."""
    a, b = prefill
    ubatches = [a + b * bound.visible_full(*part) for part in bound.ubatches(length, 512)]
    deep = Timing(ubatches, 2 * sum(ubatches), [decode] * 4, 0, 9216 * 1000)
    return Sample(deep, Timing([0.1], 0.1, [shallow] * 4, 0, 0), reads, 9216)


def test_rows_and_ratios_by_hand(report):
    # In the second round everything takes three times as long, the memory too: no ratio may change.
    def rounds(a, b, decode):
        slow = sample((3 * a, 3 * b), 3 * decode, 0.03, reads=20 / 3)
        return [sample((a, b), decode), slow, sample((a, b), decode)]

    report.samples = {
        (NO_FLASH, 8192): rounds(1.0, 5e-4, 0.020),
        (MINE, 8192): rounds(1.0, 1e-4, 0.016),
        (FLASH, 8192): rounds(1.0, 3e-4, 0.064),
        (MINE_Q8_0, 8192): rounds(2.0, 8e-5, 0.0125),
    }
    row = next(row for row in report.rows() if (row["library"], row["cache_type"]) == (PATCHED, "f16"))
    # Every token sees itself and those before it, and a ubatch of 512 tokens takes b per key.
    attended = 1e-4 * sum(range(1, 8193)) / 512
    assert row["attention_seconds"] == pytest.approx(attended)
    assert row["attention_share"] == pytest.approx(attended / (16 + attended))
    assert (row["decode_tok_s"], row["decode_attention_seconds"]) == (pytest.approx(62.5), pytest.approx(0.006))
    assert row["decode_gb_s"] == pytest.approx((8192 - 16) * 1000 / 0.006 / 1e9)
    assert row["read_share"] == pytest.approx(row["decode_gb_s"] / 20) and row["cpu_share"] == pytest.approx(1)
    found = report.to_dict()
    assert found["ratio_depth"] == 8192
    assert found["decode_vs_no_flash"] == pytest.approx(20 / 16)
    assert found["prefill_attention_speedup"] == pytest.approx(3)
    assert found["q8_0_over_f16"] == pytest.approx(1e-4 / 8e-5)
    assert found["decode_ratio"] == {"8192": {"f16": pytest.approx(20 / 16), "q8_0": pytest.approx(20 / 12.5)}}
    assert found["decode_bandwidth_share"]["f16"] == pytest.approx(row["read_share"])
    assert found["roofline"]["read_gb_s"] == 20 and len(found["roofline"]["samples"]) == 12


def test_a_ratio_compares_figures_of_one_round(report):
    report.samples = {
        (MINE, 8192): [sample(decode=0.01), sample(decode=0.02), sample(decode=0.001)],
        (NO_FLASH, 8192): [sample(decode=0.02), sample(decode=0.04)],
    }
    assert report.ratios()["decode_vs_no_flash"] == pytest.approx(2)


def test_the_faster_setting_of_the_reference_may_be_without_flash_attention(report):
    slopes = {NO_FLASH: 2e-4, FLASH: 3e-4, MINE: 1e-4}
    report.samples = {(side, 8192): [sample((1.0, b))] for side, b in slopes.items()}
    assert report.ratios()["prefill_attention_speedup"] == pytest.approx(2)
    assert report.ratios()["q8_0_over_f16"] is None


def test_without_8192_tokens_the_ratios_are_those_of_the_longest_prompt(report):
    report.samples = {
        (side, n): [sample(decode=pace * n / 2048, length=n)]
        for n in (2048, 4096)
        for side, pace in ((NO_FLASH, 0.04), (MINE, 0.04 if n == 2048 else 0.01))
    }
    found = report.ratios()
    assert (found["ratio_depth"], found["decode_vs_no_flash"]) == (4096, pytest.approx(4))
    assert found["decode_ratio"]["2048"] == {"f16": pytest.approx(1), "q8_0": None}


def test_what_the_times_do_not_show_is_none_and_a_dash(report):
    # Decoding was faster after the prompt than without it, and the ubatches' times don't grow.
    report.samples = {(MINE, 8192): [sample((1.0, 0.0), decode=0.01, shallow=0.02)]}
    document = report.to_dict()
    row = document["rows"][0]
    assert row["attention_seconds"] is row["decode_attention_seconds"] is row["decode_gb_s"] is None
    assert document["decode_vs_no_flash"] is document["prefill_attention_speedup"] is None
    assert set(document) == KEYS and json.loads(json.dumps(document, allow_nan=False)) == document
    assert "decode_vs_no_flash at 8,192 tokens: - the unpatched library" in str(report)


def test_the_text_by_its_lines(fake, bench_model, baseline, monkeypatch):
    monkeypatch.chdir(baseline.parent)
    monkeypatch.setattr("swaa_edge.bench.report.machine", lambda: {"cpu": "A Processor", "cores": 8, "system": "Linux"})
    report = run(bench_model, "fast", repeat=2, quick=True, baseline=baseline)
    report.load, report.stopped = None, "interrupted"
    assert (
        str(report)
        == """\
tiny (llama, 4 layers, F32, 0.00 GB)
A Processor, threads: 2; ubatch 512; prompt: random tokens
patched library: ours (ggml 1.0)
upstream kernels library: ours (ggml 1.0)
unpatched library: base (ggml 1.0)

side                                prompt  rounds  prefill s  attention s  decode tok/s  K and V GB/s  memory GB/s
unpatched, no flash attention, f16   2,048       2      16.20         8.20           2.4           0.0         20.0
patched, f16                         2,048       2       8.10         4.10           4.9           0.0         20.0
unpatched, f16                       2,048       2      16.20         8.20           2.4           0.0         20.0
patched, q8_0                        2,048       2       8.10         4.10           4.9           0.0         20.0
upstream kernels, f16, fast          2,048       2      12.15            -           3.2             -         20.0
patched, f16, fast                   2,048       2       8.10            -           4.9             -         20.0

decode_vs_no_flash at 2,048 tokens: 2.00x the unpatched library without flash attention
prefill_attention_speedup at 2,048 tokens: 2.00x the unpatched library's faster setting
q8_0_over_f16 at 2,048 tokens: prefill attention 1.00x as fast with a q8_0 cache
decode_ratio at 2,048 tokens: f16 2.00x, q8_0 2.00x
decode_bandwidth_share, longest prompt: f16 0%, q8_0 0%
fast at 2,048 tokens: prefill 2.00x, decode 2.00x the unpatched library's full attention; \
1.50x and 1.50x the same configuration with llama.cpp's kernels
Not measured: llama.cpp's kernels with a q8_0 cache, 2,048 tokens: its prefill takes minutes.
Other programs took processor time (one prefill got 50% of it); the figures may be noise.
Stopped early (interrupted); these are the results until then."""
    )


# With the engine


@pytest.mark.native
def test_a_small_run_on_both_libraries():
    if not any(BASELINE.glob("*llama.*")):
        pytest.skip("no unpatched library; make baseline builds it")
    command = [sys.executable, "-m", "swaa_edge", "bench", "--attention", "--vocab", "300", "--layers", "1"]
    command += ["--prompt-tokens", "96", "--ubatch", "16", "--decode", "3", "--repeat", "2", "--threads", "1"]
    command += ["--configs", "fast,stream", "--baseline", str(BASELINE), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert set(document) == KEYS and len(document["rows"]) == 4 + 4 + 1
    assert all(row["prefill_seconds"] > 0 and row["decode_tok_s"] > 0 for row in document["rows"])
    assert document["decode_vs_no_flash"] > 0 and document["decode_ratio"]["96"]["q8_0"] > 0
    assert all(row["prefill_vs_full"] > 0 and row["decode_vs_upstream"] > 0 for row in document["swaa"])
    patched = {name: library["patched"] for name, library in document["libraries"].items()}
    assert patched == {PATCHED: True, UPSTREAM_KERNELS: True, UNPATCHED: False}
