"""bench(): the order of turns, jobs per side, early ends, progress and what is refused, on made-up times."""

import dataclasses

import pytest

from swaa_edge import SwaaConfig
from swaa_edge.bench import bench
from swaa_edge.bench.client import PATCHED, UNPATCHED
from swaa_edge.bench.run import alternating, rounds_of
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError, GenerationError, NativeLibraryError

SLIDES = SwaaConfig(64, 4, fa_decode=True)


def test_sides_take_turns_and_every_second_round_goes_backwards(fake_runner, bench_model):
    configs = {"a": SLIDES, "b": SwaaConfig(65)}
    bench(bench_model, configs, [64, 32, 32], repeat=2, decode=2, engine=EngineSettings(n_batch=16))
    names = {None: "full", 64: "a", 65: "b"}
    order = [(len(job.tokens), names[job.overrides.get("swaa.window_size")]) for _, job in fake_runner.jobs]
    rounds = ["full", "a", "b", "b", "a", "full"]
    assert order == list(zip([32] * 6 + [64] * 6, rounds * 2, strict=True))
    assert {len(job.tokens) + job.decode for _, job in fake_runner.jobs} == {34, 66}
    # llama.cpp caps a ubatch at the batch.
    assert all(job.n_ctx == 256 and job.engine.n_ubatch == 16 for _, job in fake_runner.jobs)


def test_rounds_by_default():
    assert [rounds_of(None, n) for n in (1, 8192, 8193)] == [3, 3, 2]
    assert rounds_of(5, 100_000) == 5
    assert list(alternating("abc", 3)) == ["abc", "cba", "abc"]


def test_a_baseline_is_one_more_side_without_overrides(fake_runner, bench_model, baseline):
    report = bench(bench_model, {"a": SLIDES}, [32], repeat=1, baseline=baseline)
    (first, unpatched), (second, full), (third, ours) = fake_runner.jobs
    assert (first, second, third) == ("base", "ours", "ours")
    assert (unpatched.overrides, full.overrides) == ({}, {"swaa.enabled": False})
    assert unpatched == dataclasses.replace(full, overrides={}) == dataclasses.replace(ours, overrides={})
    assert ours.overrides["swaa.sink_count"] == 4
    assert {name: library["patched"] for name, library in report.libraries.items()} == {PATCHED: True, UNPATCHED: False}


def test_full_attention_alone_is_compared_with_a_baseline_only(fake_runner, bench_model, baseline):
    report = bench(bench_model, {}, [32], repeat=1, baseline=baseline)
    assert [row["config"] for row in report.rows()] == [UNPATCHED, "full"]
    with pytest.raises(ConfigError, match="there is nothing to compare with full attention; give a configuration or"):
        bench(bench_model, "full", [32])
    with pytest.raises(ConfigError, match="unpatched is the name of the baseline"):
        bench(bench_model, {"unpatched": SLIDES}, [32], baseline=baseline)


def test_a_baseline_must_be_an_unpatched_build_of_the_same_release(fake_runner, bench_model, tmp_path, monkeypatch):
    with pytest.raises(NativeLibraryError, match=r"holds no llama\.cpp library; `make baseline` builds one"):
        bench(bench_model, {"a": SLIDES}, [32], baseline=tmp_path)
    (tmp_path / "libllama.so").touch()
    monkeypatch.setattr(fake_runner, "all_patched", True)
    with pytest.raises(NativeLibraryError, match="holds a patched library; `make baseline` builds an unpatched one"):
        bench(bench_model, {"a": SLIDES}, [32], baseline=tmp_path)


def test_without_configurations_bench_takes_those_of_eval(fake_runner, bench_model):
    report = bench(bench_model, prompt_tokens=[32], repeat=1)
    assert [row["config"] for row in report.rows()] == ["full", "naive", "quality", "balanced", "fast"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), GenerationError("out of memory")])
def test_an_early_end_keeps_the_results(fake_runner, bench_model, monkeypatch, stop):
    monkeypatch.setattr(fake_runner, "fail_at", (3, stop))
    report = bench(bench_model, {"a": SLIDES, "b": SLIDES}, [32, 64], repeat=1)
    assert report.stopped == ("interrupted" if isinstance(stop, KeyboardInterrupt) else stop)
    assert [(row["config"], row["prompt_tokens"]) for row in report.rows()] == [("full", 32), ("a", 32), ("b", 32)]
    assert report.to_dict()["stopped"] == (str(stop) or "interrupted")


def test_an_error_before_any_result_is_raised(fake_runner, bench_model, monkeypatch):
    monkeypatch.setattr(fake_runner, "fail_at", (0, GenerationError("out of memory")))
    with pytest.raises(GenerationError, match="out of memory"):
        bench(bench_model, {"a": SLIDES}, [32])


def test_progress_counts_prompt_tokens(fake_runner, bench_model):
    seen = []
    bench(bench_model, {"a": SLIDES}, [32, 64], repeat=1, on_progress=seen.append)
    assert [(at.text, at.done) for at in seen] == [
        ("1/4 full, 32 tokens", 0),
        ("1/4 full, 32 tokens", 32),
        ("2/4 a, 32 tokens", 32),
        ("2/4 a, 32 tokens", 64),
        ("3/4 full, 64 tokens", 64),
        ("3/4 full, 64 tokens", 128),
        ("4/4 a, 64 tokens", 128),
        ("4/4 a, 64 tokens", 192),
    ]
    assert {at.total for at in seen} == {192}


@pytest.mark.parametrize(
    "configs, lengths, settings, message",
    [
        ({"a": SLIDES}, [4090], {}, "a prompt of 4090 tokens and 32 more exceed the 4096 tokens that the model was"),
        ({"a": SLIDES}, [100], {"n_ctx": 131}, "100 tokens and 32 more don't fit a context of 131; they need 132"),
        ({"a": SLIDES}, [0], {}, "give at least one prompt length"),
        ({"a": SLIDES}, [], {}, "give at least one prompt length"),
        ({"a": SwaaConfig(8, 0, [4])}, [100], {}, "fa_layers has layer 4, but the model has 4 layers"),
        ({"a": SLIDES}, [100], {"n_ubatch": 0}, "n_ubatch = 0 is out of range"),
        ({"a": SLIDES}, [100], {"lora_path": "a.gguf"}, "bench can't run an adapter; merge it into the model"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    fake_runner, bench_model, configs, lengths, settings, message
):
    with pytest.raises(ConfigError, match=message):
        bench(bench_model, configs, lengths, engine=EngineSettings(**settings))
    assert fake_runner.jobs == []
