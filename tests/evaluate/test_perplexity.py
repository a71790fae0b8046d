"""Perplexity: figures against torch's from the same logits, windows, resuming, and errors."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.evaluate import perplexity
from swaa_edge.evaluate.perplexity import divergence, measure, nll
from swaa_edge.support.journal import Journal

VOCAB = 768


def test_nll_is_that_of_a_softmax():
    logits = np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)
    picked = zip(logits.tolist(), (4, 0, 10), strict=True)
    expected = [-math.log(math.exp(row[token]) / sum(map(math.exp, row))) for row, token in picked]
    assert nll(logits, (4, 0, 10)) == pytest.approx(expected, rel=1e-12)
    assert nll(np.array([[1e5, 0.0]], np.float32), [1]) == [1e5]  # exp() of such a number overflows


def independent(full, other, targets):
    """The same four figures by torch's own functions, in float64."""
    p, q = (torch.log_softmax(torch.tensor(np.array(rows), dtype=torch.float64), -1) for rows in (full, other))
    targets = torch.tensor(targets)
    return {
        "nll": torch.nn.functional.nll_loss(q, targets, reduction="none").numpy(),
        "full_nll": torch.nn.functional.nll_loss(p, targets, reduction="none").numpy(),
        "kl": torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).numpy(),
        "same": (p.argmax(-1) == q.argmax(-1)).double().numpy(),
    }


# The arithmetic


def test_figures_per_position(monkeypatch):
    # Positions are compared in several lots, the last one smaller.
    monkeypatch.setattr(perplexity, "_CHUNK", 3000)
    generator = np.random.default_rng(0)
    full = generator.normal(0, 4, (7, 1000)).astype(np.float32)
    other = full + generator.normal(0, 1, full.shape).astype(np.float32)
    other[3] = full[3]
    targets = generator.integers(0, full.shape[1], 7).tolist()
    found, expected = divergence(full, other, targets), independent(full, other, targets)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-9, atol=1e-12, err_msg=key)
    assert found["kl"][3] == 0.0 and found["kl"].min() >= 0.0 and 0 < found["same"].sum() < 7


def test_a_token_without_probability_and_one_far_ahead():
    full = np.float32([[0, math.log(3), -np.inf], [5000, 0, 0]])
    other = np.float32([[0, 0, -np.inf], [0, 0, 0]])
    found = divergence(full, other, [1, 0])
    # By hand: p = (1/4, 3/4, 0), q = (1/2, 1/2, 0); then p = (1, 0, 0), q = a third each.
    assert found["kl"] == pytest.approx([math.log(2) - (math.log(4) - 0.75 * math.log(3)), math.log(3)], rel=1e-6)
    assert found["full_nll"] == pytest.approx([math.log(4 / 3), 0], abs=1e-6)
    assert found["nll"] == pytest.approx([math.log(2), math.log(3)])
    assert found["same"].tolist() == [0, 1]


# A run, on made-up logits


class FakeLlama:
    """Logits are a function of token and position, and of the configuration from its first hidden key on."""

    closed = 0

    def __init__(self, config, n_ctx, bos=None, fail_at=None):
        self.config, self.n_ctx, self.bos, self.fail_at = config, n_ctx, bos, fail_at
        self._model = SimpleNamespace(add_bos_token=lambda: bos is not None)
        self.context_params, self.n_batch = SimpleNamespace(n_ubatch=4), 8
        self.read = []

    def token_bos(self):
        return self.bos

    def reset(self):
        self.read.append([])

    def eval(self, tokens, decode_from, on_logits):
        assert decode_from == 2**31 - 1 and len(tokens) <= 4
        start = len(self.read[-1])
        if self.fail_at and len(self.read) == self.fail_at[0] and start >= self.fail_at[1]:
            raise self.fail_at[2]
        self.read[-1] += tokens
        assert len(self.read[-1]) <= self.n_ctx
        on_logits(np.stack([self.logits(start + at, token) for at, token in enumerate(tokens)]))

    def logits(self, position, token):
        row = np.random.default_rng([position, token]).normal(size=16).astype(np.float32)
        if self.config and position >= self.config.window_size + self.config.sink_count:
            row = row * np.float32(self.config.window_size / 10)
        return row

    def close(self):
        self.closed += 1


class Loader:
    """Makes `FakeLlama`s, and keeps them."""

    def __init__(self, **settings):
        self.settings, self.made = settings, []

    def __call__(self, config, n_ctx):
        settings = dict(self.settings)
        if config:  # only the sliding side fails
            settings["fail_at"] = settings.pop("fail_at", None)
        else:
            settings.pop("fail_at", None)
        self.made.append(FakeLlama(config, n_ctx, **settings))
        return self.made[-1]


TEXT = [(7 * at) % 16 for at in range(35)]
CONFIGS = {"full": False, "a": SwaaConfig(5, 1), "b": SwaaConfig(2, 0)}


def expected_rows(config, length=10, count=3, bos=None):
    """All and past figures of each window, by torch, from the fake's logits of the whole window at once."""
    whole, past = [], []
    for at in range(count):
        part = TEXT[at * length : (at + 1) * length]
        read = [part[0] if bos is None else bos, *part[1:]]
        sides = [np.stack([FakeLlama(c, 0).logits(p, t) for p, t in enumerate(read[:-1])]) for c in (False, config)]
        figures = independent(*sides, part[1:])
        first = config.window_size + config.sink_count if config else length
        whole.append(figures)
        past.append({key: values[first:] for key, values in figures.items()})
    return whole, past


@pytest.mark.parametrize("bos", [None, 3])
def test_rows(bos):
    loader = Loader(bos=bos)
    report = measure(loader, CONFIGS, TEXT, 10)
    rows = report.rows()
    assert [row["config"] for row in rows] == ["full", "a", "b"] and report.stopped is None
    assert [row["swaa"] for row in rows] == [None, CONFIGS["a"].to_dict(), CONFIGS["b"].to_dict()]
    for row, config in zip(rows, CONFIGS.values(), strict=True):
        parts = expected_rows(config, bos=bos)
        assert row["windows"] == 3
        for found, windows in ((row, parts[0]), (row["past_window"], parts[1])):
            if not windows[0]["nll"].size:
                assert found is None
                continue
            joined = {key: np.concatenate([window[key] for window in windows]) for key in windows[0]}
            means = {key: [window[key].mean() for window in windows] for key in ("nll", "kl")}
            means["nll_increase"] = [(window["nll"] - window["full_nll"]).mean() for window in windows]
            assert found["tokens"] == joined["nll"].size
            assert found["nll"] == pytest.approx(joined["nll"].mean())
            assert found["ppl"] == pytest.approx(np.exp(joined["nll"].mean()))
            assert found["kl"] == pytest.approx(joined["kl"].mean())
            assert found["same_top"] == pytest.approx(joined["same"].mean())
            assert found["nll_increase"] == pytest.approx((joined["nll"] - joined["full_nll"]).mean())
            for key, each in means.items():
                assert found[f"{key}_error"] == pytest.approx(np.std(each, ddof=1) / 3**0.5), key
    assert rows[0]["kl"] == 0.0 and rows[0]["same_top"] == 1.0 and rows[0]["tokens"] == 27
    assert rows[1]["past_window"]["tokens"] == 3 * 3 and rows[1]["kl"] > 0
    assert json.loads(json.dumps(report.to_dict())) == {
        "perplexity": rows,
        "length": 10,
        "windows": 3,
        "stopped": None,
    }
    # Full attention is loaded once, and everything is closed.
    assert [llm.config for llm in loader.made] == [False, CONFIGS["a"], CONFIGS["b"]]
    assert [llm.closed for llm in loader.made] == [1, 1, 1] and {llm.n_ctx for llm in loader.made} == {10}
    # The last token of a window is predicted only.
    first = [TEXT[0] if bos is None else bos, *TEXT[1:9]]
    assert [llm.read[0] for llm in loader.made] == [first] * 3


def test_full_attention_alone_and_without():
    alone = measure(Loader(), {"plain": False}, TEXT, 10).rows()
    both = measure(Loader(), {"plain": False, "a": CONFIGS["a"]}, TEXT, 10).rows()
    without = measure(Loader(), {"a": CONFIGS["a"]}, TEXT, 10).rows()
    assert alone == both[:1] and without == both[1:]


def test_one_window_has_no_error_and_a_short_one_nothing_past_it():
    (row,) = measure(Loader(), {"a": CONFIGS["a"]}, TEXT, 7, windows=1).rows()
    assert row["tokens"] == 6 and row["past_window"] is None
    assert row["nll_error"] is row["kl_error"] is row["nll_increase_error"] is None
    assert row["kl"] == 0.0 and row["nll_increase"] == 0.0 and row["same_top"] == 1.0


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), GenerationError("out of memory")])
def test_complete_windows_are_kept_and_not_measured_again(tmp_path, stop):
    path, key = tmp_path / "ppl.jsonl", {"text": "x"}
    with Journal(path, key) as journal:
        report = measure(Loader(fail_at=(2, 4, stop)), CONFIGS, TEXT, 10, journal=journal)
    assert report.stopped == "interrupted" if isinstance(stop, KeyboardInterrupt) else report.stopped is stop
    assert [(row["config"], row["windows"]) for row in report.rows()] == [("full", 1), ("a", 1)]
    loader = Loader()
    with Journal(path, key) as journal:
        report = measure(loader, CONFIGS, TEXT, 10, journal=journal)
        assert report.rows() == measure(Loader(), CONFIGS, TEXT, 10).rows()
    assert [len(llm.read) for llm in loader.made] == [5, 2, 3]  # windows, of which full attention reads those of both
    with Journal(path, key) as journal:
        loader = Loader()
        assert measure(loader, CONFIGS, TEXT, 10, journal=journal).rows() == report.rows()
    assert loader.made == []


def test_full_attention_without_comparisons_left_is_measured_alone():
    journal = Journal(None, {})
    measure(Loader(), {"a": CONFIGS["a"]}, TEXT, 10, journal=journal)
    loader, seen = Loader(), []
    report = measure(loader, {"full": False, "a": CONFIGS["a"]}, TEXT, 10, journal=journal, on_progress=seen.append)
    assert report.rows() == measure(Loader(), {"full": False, "a": CONFIGS["a"]}, TEXT, 10).rows()
    assert [len(llm.read) for llm in loader.made] == [3]
    assert [(at.done, at.text) for at in seen] == [
        (9 * window + tokens, f"{3 + window + (tokens == 9)}/6 windows, full")
        for window in range(3)
        for tokens in (0, 4, 8, 9)
    ]
    assert {at.total for at in seen} == {3 * 9}


def test_the_work_of_a_run_adds_up():
    journal, seen = Journal(None, {}), []
    measure(Loader(), {"full": False, "a": CONFIGS["a"]}, TEXT, 10, windows=1, journal=journal)
    measure(Loader(), CONFIGS, TEXT, 10, journal=journal, on_progress=seen.append)
    # Two windows of a and three of b, each beside full attention.
    assert {at.total for at in seen} == {(2 + 3) * 2 * 9} and seen[-1].done == seen[-1].total
    assert seen[-1].text == "9/9 windows, b"


def test_an_error_before_anything_is_done_is_raised():
    with pytest.raises(GenerationError, match=r"^out of memory$"):
        measure(Loader(fail_at=(1, 4, GenerationError("out of memory"))), CONFIGS, TEXT, 10)


def test_each_model_works_under_what_is_held_for_it(monkeypatch):
    held, loader = [], Loader()

    @contextlib.contextmanager
    def using(llm):
        before = sum(map(len, llm.read))
        yield
        held.append((llm.config, sum(map(len, llm.read)) - before))

    monkeypatch.setattr(perplexity, "interruptible", using)
    measure(loader, {"a": CONFIGS["a"]}, TEXT, 10, windows=1)
    assert held == [(c, n) for n in (4, 4, 1) for c in (False, CONFIGS["a"])]


def test_logits_that_are_nan(monkeypatch):
    monkeypatch.setattr(FakeLlama, "logits", lambda *_: np.full(16, np.nan, np.float32))
    with pytest.raises(GenerationError) as caught:
        measure(Loader(), CONFIGS, TEXT, 10)
    assert str(caught.value) == "the logits of a are NaN or infinite in window 0; the model file may be damaged"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (({}, TEXT, 10), "there is nothing to measure; give at least one configuration"),
        ((CONFIGS, TEXT, 36), "the text has 35 tokens, fewer than a window of 36; use a longer text"),
        ((CONFIGS, [], 10), "the text has 0 tokens, fewer than a window of 10; use a longer text"),
        ((CONFIGS, TEXT, 1), "length = 1 must be at least 2: one token to evaluate and one to predict"),
    ],
)
def test_what_can_not_be_measured(arguments, message):
    loader = Loader()
    with pytest.raises(ConfigError) as caught:
        measure(loader, *arguments)
    assert str(caught.value) == message and loader.made == []
    with pytest.raises(ConfigError, match=r"^windows = 0 must be at least 1$"):
        measure(loader, CONFIGS, TEXT, 10, windows=0)


# A run, on the engine


LENGTH = 203


@pytest.fixture(scope="module")
def words():
    return np.random.default_rng(1).integers(6, VOCAB, 2 * LENGTH + 5).tolist()


@pytest.fixture
def loading(load):
    return lambda config, n_ctx: load(swaa=config, n_ctx=n_ctx, ring_snapshots=0)


@pytest.mark.native
def test_the_engine_against_its_own_logits_of_the_whole_text(load, loading, words):
    config = SwaaConfig(41, 3, fa_layers=[1])
    full_row, row = measure(loading, {"full": False, "a": config}, words, LENGTH).rows()
    figures = []
    sides = [load(swaa=swaa, n_ctx=LENGTH, logits_all=True) for swaa in (False, config)]
    for at in (0, LENGTH):
        part, logits = words[at : at + LENGTH], []
        for llm in sides:
            llm.reset()
            llm.eval(part)
            logits.append(llm.scores[: LENGTH - 1].copy())
        figures.append(independent(*logits, part[1:]))
    for first, found in ((0, row), (44, row["past_window"])):
        joined = {key: np.concatenate([window[key][first:] for window in figures]) for key in figures[0]}
        assert found["tokens"] == joined["nll"].size == 2 * (LENGTH - 1 - first)
        assert found["nll"] == pytest.approx(joined["nll"].mean(), rel=1e-6)
        assert found["kl"] == pytest.approx(joined["kl"].mean(), rel=1e-4)
        assert found["same_top"] == pytest.approx(joined["same"].mean())
    assert full_row["nll"] == pytest.approx(np.mean([window["full_nll"] for window in figures]), rel=1e-6)
    # Nothing differs before the first key is hidden, and much does after it.
    assert all((window["kl"][:44] == 0).all() for window in figures) and row["past_window"]["kl"] > 0.01
    assert row["kl"] * row["tokens"] == pytest.approx(row["past_window"]["kl"] * row["past_window"]["tokens"])


@pytest.mark.native
def test_the_engine_against_transformers(model_dir, loading, words):
    from transformers import AutoModelForCausalLM

    from support.oracle.oracle import oracle_logits
    from support.oracle.rule import Rule

    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3", layers=4), dtype=torch.float32).eval()
    config = SwaaConfig(41, 3, fa_layers=[1])
    part = words[:LENGTH]
    sliding = (True, False, True, True)
    logits = [
        oracle_logits(model, part, [False] * LENGTH, Rule(41, 3, slide, (False,) * 4))[:-1]
        for slide in ((False,) * 4, sliding)
    ]
    expected = independent(*logits, part[1:])
    (row,) = measure(loading, {"a": config}, words, LENGTH, windows=1).rows()
    past = row["past_window"]
    # K and V are of half precision in the engine.
    assert row["nll"] == pytest.approx(expected["nll"].mean(), rel=2e-3)
    assert past["nll_increase"] == pytest.approx((expected["nll"] - expected["full_nll"])[44:].mean(), abs=0.02)
    assert past["kl"] == pytest.approx(expected["kl"][44:].mean(), rel=0.05)


@pytest.mark.native
@pytest.mark.parametrize("config", [SwaaConfig(LENGTH), SwaaConfig(4, 0, fa_layers="all"), SwaaConfig(1, LENGTH)])
def test_what_hides_nothing_is_full_attention_exactly(loading, words, config):
    full, row = measure(loading, {"full": False, "a": config}, words, LENGTH).rows()
    assert row["kl"] == 0.0 and row["same_top"] == 1.0 and row["nll_increase"] == 0.0
    assert row["nll"] == full["nll"] and full["kl"] == 0.0
    if config.fa_layers == "none":
        assert row["past_window"] is None
    else:
        assert row["past_window"]["kl"] == 0.0
