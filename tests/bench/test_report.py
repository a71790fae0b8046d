"""Rows, document, table and plot of made-up times; ratios to the bound and to the unpatched library."""

import itertools
import json

import pytest

from swaa_edge import SwaaConfig
from swaa_edge.bench import Report, bench, bound, plot
from swaa_edge.bench.client import PATCHED, UNPATCHED, Timing
from swaa_edge.bench.workload import Workload
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.support.machine import machine

SLIDES = SwaaConfig(64, 4, fa_decode=True)
LIBRARY = {"path": "DIR", "patched": True, "ggml": "1.0", "commit": "abc", "gpus": []}


def test_rows_are_ratios_of_medians_beside_the_bound(fake_runner, bench_model):
    report = bench(bench_model, {"a": SLIDES}, [200], repeat=3, decode=4, engine=EngineSettings(n_ubatch=50))
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
    assert ours["prefill_vs_unpatched"] is ours["decode_vs_unpatched"] is ours["vs_unpatched"] is None
    # The raw samples are all there, also those of the slow round.
    assert [len(sample["ubatch_seconds"]) for sample in ours["repeats"]] == [4, 4, 4]
    assert sum(ours["repeats"][0]["ubatch_seconds"]) == pytest.approx(5 * seconds)


def exact(line, config, work, length, overhead=0.0):
    """The Timing of a prompt whose every ubatch takes just what its keys cost, and `overhead` of that more."""
    heads, n_ubatch = work.model.n_heads, work.engine.n_ubatch
    ends = [start + count for start, count in bound.ubatches(length, n_ubatch)]
    totals = [0.0, *(bound.prefill_seconds(line, config, end, n_ubatch, heads) for end in ends)]
    times = [(after - before) * (1 + overhead) for before, after in itertools.pairwise(totals)]
    return Timing(times, sum(times), [0.1] * work.decode, 0, 0)


@pytest.mark.parametrize("length", [1536, 1600, 3999])
@pytest.mark.parametrize("line", [bound.Line(0.2, 1e-6), bound.Line(0.2, 1e-4), bound.Line(0.01, 1e-2)])
def test_nothing_exceeds_the_bound(bench_model, length, line):
    work = Workload.of(bench_model, [length], decode=2, engine=EngineSettings(n_ubatch=128))
    configs = {
        "full": False,
        "all slide": SwaaConfig(100, 4),
        "half": SwaaConfig(500, 0, "1::2"),
        "tiny window": SwaaConfig(1),
        "wide": SwaaConfig(8000),
    }
    report = Report(work, configs, 1, {PATCHED: LIBRARY, UNPATCHED: LIBRARY | {"patched": False}})
    for name, config in configs.items():
        report.samples[name, length] = [exact(line, config or None, work, length)]
    # The unpatched library's attention is 20 times as slow: neither the bound nor the ratio to it may change.
    slow = bound.Line(line.a, 20 * line.b)
    report.samples[UNPATCHED, length] = [exact(slow, None, work, length)]
    rows = {row["config"]: row for row in report.rows()}
    for name in configs:
        assert rows[name]["ratio_to_bound"] == pytest.approx(1, rel=1e-6), name
        to_unpatched = rows[name]["prefill_ratio"] / rows[UNPATCHED]["prefill_ratio"]
        assert rows[name]["prefill_vs_unpatched"] == pytest.approx(to_unpatched)
    assert rows["full"]["prefill_ratio"] == 1 < rows["full"]["prefill_vs_unpatched"]
    assert rows[UNPATCHED]["bound"] is None and rows[UNPATCHED]["prefill_ratio"] < 1
    # With anything that costs time beside the visible keys, the bound isn't reached.
    for name, config in configs.items():
        if config:
            report.samples[name, length] = [exact(line, config, work, length, overhead=0.01)]
    assert all(row["ratio_to_bound"] < 0.995 for row in report.rows() if row["config"] not in ("full", UNPATCHED))


def test_against_a_baseline_the_bound_is_that_of_our_own_attention(fake_runner, bench_model, baseline):
    report = bench(bench_model, {"a": SLIDES}, [200], decode=4, engine=EngineSettings(n_ubatch=50), baseline=baseline)
    unpatched, full, ours = report.rows()
    # The line is that of the patched library, not of the one that takes twice as long.
    assert (report.line(200).a, report.line(200).b) == (pytest.approx(1), pytest.approx(0.01))
    assert (full["prefill_ratio"], full["prefill_vs_unpatched"]) == (1, pytest.approx(2))
    assert (ours["prefill_ratio"], ours["prefill_vs_unpatched"]) == (pytest.approx(2), pytest.approx(4))
    assert (ours["decode_vs_unpatched"], ours["vs_unpatched"]) == (pytest.approx(4), pytest.approx(4))
    assert (unpatched["config"], unpatched["prefill_vs_unpatched"], unpatched["bound"]) == (UNPATCHED, 1, None)


def test_rows_name_the_device(fake_runner, bench_model, monkeypatch):
    def devices(**settings):
        report = bench(bench_model, {"a": SLIDES}, [32], repeat=1, engine=EngineSettings(**settings))
        assert report.to_dict()["libraries"][PATCHED]["gpus"] == list(fake_runner.gpus)
        return [row["device"] for row in report.rows()], str(report).splitlines()[1]

    cpu = machine()["cpu"]
    assert devices()[0] == [cpu] * 2 and devices()[1].startswith(f"{cpu}, threads")
    monkeypatch.setattr(fake_runner, "gpus", ["Card 1", "Card 2"])
    assert devices(n_gpu_layers=0)[0] == [cpu] * 2
    assert devices()[0] == devices(n_gpu_layers=5)[0] == ["Card 1 + Card 2"] * 2
    assert devices(n_gpu_layers=3)[0] == ["Card 1 + Card 2, 3 of 4 layers"] * 2
    assert devices()[1].startswith(f"on Card 1 + Card 2; {cpu}, threads")


def test_a_short_last_ubatch_is_no_point_of_the_line(fake_runner, bench_model):
    report = bench(bench_model, {"a": SLIDES}, [210], engine=EngineSettings(n_ubatch=50))
    line = report.line(210)
    assert (line.a, line.b) == (pytest.approx(1), pytest.approx(0.01))


def test_a_document_is_plain_json(fake_runner, bench_model):
    document = bench(bench_model, {"a": SLIDES}, [200, 20], engine=EngineSettings(n_ubatch=50)).to_dict()
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
    assert document["settings"] == {
        "decode": 32,
        "repeat": None,
        "n_ctx": None,
        "n_batch": 512,
        "n_ubatch": 50,
        "n_threads": None,
        "cache_type": "f16",
        "swa_full": False,
        "n_gpu_layers": -1,
        "lora_path": None,
    }
    assert document["machine"]["cpu"] and document["model"]["layers"] == 4 and document["stopped"] is None


def test_the_table_by_its_text(fake_runner, bench_model, baseline, monkeypatch):
    monkeypatch.chdir(baseline.parent)
    facts = {"cpu": "A Processor", "cores": 8, "system": "Linux"}
    monkeypatch.setattr("swaa_edge.bench.report.machine", lambda: facts)
    settings = EngineSettings(n_ubatch=50)
    report = bench(bench_model, {"a": SLIDES}, [20, 2000], repeat=3, decode=4, engine=settings, baseline=baseline)
    report.load, report.stopped = 2.0, "interrupted"
    # fmt: off
    table = """\
prompt     config  prefill tok/s  prefill  bound  of bound  vs unpatched  decode tok/s  decode  vs unpatched  request  vs unpatched  compute MiB  KV MiB
    20  unpatched            9.0    0.50x      -         -         1.00x           2.0   0.50x         1.00x    0.50x         1.00x          4.0     2.0
    20       full           18.1    1.00x      -         -         2.00x           4.0   1.00x         2.00x    1.00x         2.00x          4.0     2.0
    20          a           36.2    2.00x      -         -         4.00x           8.0   2.00x         4.00x    2.00x         4.00x          4.0     2.0

 2,000  unpatched            2.3    0.50x      -         -         1.00x           2.0   0.50x         1.00x    0.50x         1.00x          4.0     2.0
 2,000       full            4.5    1.00x  1.00x      100%         2.00x           4.0   1.00x         2.00x    1.00x         2.00x          4.0     2.0
 2,000          a            9.1    2.00x  6.60x       30%         4.00x           8.0   2.00x         4.00x    2.00x         4.00x          4.0     2.0
"""  # noqa: E501
    # fmt: on
    assert (
        str(report)
        == f"""\
tiny (llama, 4 layers, F32, 0.00 GB)
A Processor, threads: 8 in prefill, 4 in decode; f16 KV cache, ubatch 50; prompt: random tokens
patched library: ours (ggml 1.0)
unpatched library: base (ggml 1.0)

{table}
Stopped early (interrupted); these are the results until then.
prefill, decode, request (both): speed-up over full attention on the same library.
bound: the prefill speed-up if a sliding layer cost no more than the keys that it sees.
vs unpatched: speed-up over full attention on the unpatched library."""
    )
    report.load = 2.1
    busy = "\nThe machine was busy at the start (load 2.1 on 8 cores); the times may be noise.\nStopped early"
    assert busy in str(report)


def test_without_a_baseline_nothing_names_the_unpatched_library(fake_runner, bench_model):
    assert UNPATCHED not in str(bench(bench_model, {"a": SLIDES}, [20], repeat=1))


def test_a_plot_takes_its_type_from_the_name(fake_runner, bench_model, baseline, tmp_path):
    pytest.importorskip("matplotlib")
    plot(bench(bench_model, {"a": SLIDES}, [20, 200], baseline=baseline).to_dict(), tmp_path / "out.svg")
    assert "<svg" in (tmp_path / "out.svg").read_text()
