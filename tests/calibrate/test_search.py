"""calibrate: what is chosen on made-up losses, what an interruption leaves, the engine's losses against the oracle.

A made-up engine's loss is a function of the layers that keep full attention, so each choice can be told by hand.
"""

import contextlib
import itertools
import math
import types

import numpy as np
import pytest

from swaa_edge import SwaaConfig
from swaa_edge.calibrate import losses as losses_module
from swaa_edge.calibrate.cases import Case, from_text
from swaa_edge.calibrate.losses import Clock, Losses, Measured, answer_nll, label, nll
from swaa_edge.calibrate.report import plot
from swaa_edge.calibrate.search import calibrate, periodic, quarter
from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.support.journal import Journal

SWAA = SwaaConfig(64, 4, fa_decode=True)
CASES = [Case("a", (1, 2, 3), (4, 5)), Case("b", (1, 2, 9), (4,))]
N = 6


class FakeEngine:
    """loss(FA layers) nats for each token of an answer; `asked` has what was measured, in order."""

    def __init__(self, monkeypatch, loss):
        self.loss, self.asked, self.fail_at, self.closed = loss, [], None, 0
        monkeypatch.setattr(losses_module, "answer_nll", self._answer_nll)

    def load(self, config, n_ctx):
        assert n_ctx == 5
        kept = frozenset(range(N)) if config is False else {i for i, s in enumerate(config.sliding_layers(N)) if not s}
        if config:
            assert (config.window_size, config.sink_count, config.fa_decode, config.recipe) == (64, 4, True, "custom")
        return types.SimpleNamespace(kept=frozenset(kept), close=self._close)

    def _close(self):
        self.closed += 1

    def _answer_nll(self, llm, case):
        if self.fail_at and self.fail_at[0] == len(self.asked):
            raise self.fail_at[1]
        self.asked.append((tuple(sorted(llm.kept)), case.id))
        return self.loss(llm.kept) * len(case.answer)


#: What a layer's full attention is worth, by itself.
WORTH = [0.1, 0.5, 0.0, 0.9, 0.05, 0.3]


def additive(kept):
    return 3.0 - sum(WORTH[layer] for layer in kept)


def redundant(kept):
    """Any of the layers 1 and 3 will do, and layer 5 helps only beside one of them."""
    retrieves = bool(kept & {1, 3})
    return 3.0 - 2.0 * retrieves - 0.5 * (retrieves and 5 in kept) - 0.01 * (3 in kept) - 0.1 * (0 in kept)


def misled(kept):
    """4 is the best single layer, and worth nothing beside both 1 and 2, which are worth most together."""
    both = {1, 2} <= kept
    return 3.0 - 1.0 * (4 in kept and not both) - 0.4 * (1 in kept) - 0.3 * (2 in kept) - 2.0 * both - 0.1 * (0 in kept)


@pytest.mark.parametrize("method", ["nll", "keep", "greedy"])
def test_layers_that_work_alone_are_found_by_every_method(monkeypatch, method):
    engine = FakeEngine(monkeypatch, additive)
    report = calibrate(engine.load, SWAA, N, CASES, keep=2, method=method)
    assert report.chosen == (1, 3) and report.stopped is None
    assert report.config() == SwaaConfig(64, 4, fa_layers=(1, 3), fa_decode=True)
    assert [row.layer for row in report.ranking()] == [3, 1, 5, 0, 4, 2]
    assert [row.gain for row in report.ranking()] == pytest.approx([0.9, 0.5, 0.3, 0.1, 0.05, 0.0])
    assert (report.full.loss, report.sliding.loss, report.loss.loss) == pytest.approx((1.15, 3.0, 1.6))
    assert report.recovered() == pytest.approx(1.4 / 1.85)
    assert engine.closed == len({kept for kept, _ in engine.asked}), "each choice is loaded once, and closed"
    assert len(engine.asked) == len(set(engine.asked)), "nothing is measured twice"


def test_methods_differ_where_layers_do_each_other_s_work(monkeypatch):
    chosen = {
        method: calibrate(FakeEngine(monkeypatch, redundant).load, SWAA, N, CASES, keep=2, method=method).chosen
        for method in ("nll", "keep", "greedy")
    }
    # Neither 1 nor 3 is missed while the other is there; alone, both look alike; only greedy sees what goes with what.
    assert chosen == {"nll": (0, 5), "keep": (1, 3), "greedy": (3, 5)}


@pytest.mark.parametrize(
    "keep, swaps, chosen",
    [
        (3, 0, (1, 2, 4)),  # 4 first; then 1, then 2, beside which it is worth nothing
        (3, 1, (0, 1, 2)),
        (2, 1, (1, 4)),  # of these, 1 is worth less; nothing is better beside 4
        (2, 2, (1, 2)),
    ],
)
def test_greedy_takes_layers_back(monkeypatch, keep, swaps, chosen):
    report = calibrate(FakeEngine(monkeypatch, misled).load, SWAA, N, CASES, keep=keep, method="greedy", swaps=swaps)
    assert report.chosen == chosen and report.loss.loss == pytest.approx(misled(set(chosen)))
    assert {row.layer for row in report.ranking()[:keep]} == set(chosen)
    assert sorted(row.layer for row in report.ranking()) == list(range(N))
    best = min(itertools.combinations(range(N), keep), key=lambda layers: misled(set(layers)))
    assert (chosen == best) is (swaps == keep or (keep, swaps) == (3, 1))


def test_candidates_limit_greedy(monkeypatch):
    engine = FakeEngine(monkeypatch, additive)
    report = calibrate(engine.load, SWAA, N, CASES, keep=2, method="greedy", candidates=3)
    assert report.chosen == (1, 3) and [row.layer for row in report.ranking()] == [3, 1, 5]
    pairs = {kept for kept, _ in engine.asked if len(kept) == 2}
    assert pairs == {(1, 3), (3, 5)}, "of the layers 1, 3 and 5 only; greedy never has reason to try 1 with 5"


def test_the_choice_is_compared_with_periodic_ones_on_other_samples(monkeypatch):
    engine = FakeEngine(monkeypatch, additive)
    held_out = [Case("c", (7,), (8, 8))]
    swaa = SwaaConfig(64, 4, fa_layers="0,5", fa_decode=True)
    report = calibrate(engine.load, swaa, N, CASES, keep=2, held_out=[*held_out, Case("d", (7, 1, 2), (8, 8))])
    table = report.to_dict()["held_out"]["table"]
    assert [(row["fa_layers"], row["layers"], row["chosen"]) for row in table] == [
        ("all", [0, 1, 2, 3, 4, 5], False),
        ("none", [], False),
        ("0::3", [0, 3], False),
        ("1::3", [1, 4], False),
        ("2::3", [2, 5], False),
        ("0,5", [0, 5], False),
        ("1,3", [1, 3], True),
    ]
    assert [row["loss"] for row in table] == pytest.approx([1.15, 3.0, 2.0, 2.45, 2.7, 2.6, 1.6])
    assert [row["added"] for row in table] == pytest.approx([0, 1.85, 0.85, 1.3, 1.55, 1.45, 0.45])


def test_periodic_patterns():
    assert periodic(8, 2) == {f"{i}::4": frozenset({i, i + 4}) for i in range(4)}
    assert periodic(28, 7).keys() == {"0::4", "1::4", "2::4", "3::4"}
    assert all(len(layers) == 9 for layers in periodic(36, 9).values())
    assert periodic(5, 4) == {"0::1": frozenset(range(5))}
    assert (quarter(36), quarter(3), quarter(30)) == (9, 1, 7)


def test_what_a_choice_is_called():
    assert [label(kept, 4) for kept in ({0, 1, 2, 3}, (), {2, 0}, {0, 1, 3})] == ["all", "none", "0,2", "all but 2"]
    assert label({1}, 2) == "1"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), GenerationError("out of memory")])
def test_a_run_that_ended_early_goes_on(monkeypatch, tmp_path, failure):
    engine = FakeEngine(monkeypatch, additive)
    engine.fail_at = (9, failure)
    with Journal(tmp_path / "journal", {}) as journal:
        report = calibrate(engine.load, SWAA, N, CASES, keep=2, journal=journal)
    assert report.stopped == ("interrupted" if isinstance(failure, KeyboardInterrupt) else failure)
    assert report.chosen == () and report.config() is None and report.loss is None
    # Two ends, two layers, and a half: what is whole is told.
    assert [(row.layer, row.gain) for row in report.ranking()] == [(1, pytest.approx(0.5)), (0, pytest.approx(0.1))]
    assert report.to_dict()["stopped"] == str(report.stopped)
    before, engine.asked, engine.fail_at = engine.asked, [], None
    with Journal(tmp_path / "journal", {}) as journal:
        again = calibrate(engine.load, SWAA, N, CASES, keep=2, journal=journal)
    assert again.chosen == (1, 3) and again.stopped is None
    assert not set(before) & set(engine.asked) and len(before) == 9
    whole = FakeEngine(monkeypatch, additive)
    assert calibrate(whole.load, SWAA, N, CASES, keep=2).to_dict() == again.to_dict()
    assert before + engine.asked == whole.asked


def test_an_error_before_anything_is_measured_is_raised(monkeypatch):
    engine = FakeEngine(monkeypatch, additive)
    engine.fail_at = (0, GenerationError("out of memory"))
    with pytest.raises(GenerationError, match="out of memory"):
        calibrate(engine.load, SWAA, N, CASES)


@pytest.mark.parametrize("method, candidates", [("nll", None), ("keep", None), ("greedy", None), ("greedy", 4)])
@pytest.mark.parametrize("held_out", [[], [Case("c", (1, 1, 1, 1), (2,))]])
def test_progress_counts_up_to_its_total(monkeypatch, method, candidates, held_out):
    seen = []
    engine = FakeEngine(monkeypatch, additive)
    calibrate(
        engine.load,
        SWAA,
        N,
        CASES,
        keep=2,
        method=method,
        candidates=candidates,
        held_out=held_out,
        on_progress=seen.append,
    )
    assert (seen[0].what, seen[0].done, seen[0].seconds_left) == ("all", 0, None)
    assert [at.done for at in seen] == sorted(at.done for at in seen)
    assert len({at.total for at in seen}) == 1 and seen[-1].done == seen[-1].total
    assert seen[-1].seconds_left == 0 < seen[1].seconds_left


def test_the_time_left_follows_the_pace():
    seen = []
    clock = Clock(seen.append)
    clock.expect(10)
    clock.advance("x", 4)  # found in a journal: says nothing about the pace
    clock.advance("x", 1, 3.0)
    clock.advance("x", 1, 5.0)
    assert [at.seconds_left for at in seen] == [None, 15.0, 16.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"keep": 0}, "keep = 0 must be from 1 to 5 of the model's 6 layers"),
        ({"keep": 6}, "keep = 6 must be from 1 to 5 of the model's 6 layers"),
        ({"keep": 3, "candidates": 2}, r"candidates = 2 must be from 3 \(the layers to keep\) to 6"),
        ({"cases": []}, "there is nothing to measure the loss of; give at least one sample"),
        ({"method": "lazy"}, "the method lazy needs the shares of attention; give shares"),
    ],
)
def test_numbers_that_do_not_fit(monkeypatch, arguments, message):
    engine = FakeEngine(monkeypatch, additive)
    with pytest.raises(ConfigError, match=message):
        calibrate(engine.load, SWAA, N, **{"cases": CASES} | arguments)
    assert engine.asked == []


def test_lazy_ranks_by_what_a_window_does_not_show(monkeypatch):
    report = calibrate(
        FakeEngine(monkeypatch, additive).load,
        SWAA,
        N,
        CASES,
        keep=2,
        method="lazy",
        shares=lambda: [0.9, 0.5, 0.99, 0.7, 0.2, 1.0],
    )
    assert report.chosen == (1, 4) and [row.layer for row in report.ranking()] == [4, 1, 3, 0, 2, 5]
    assert report.loss.loss == pytest.approx(3 - 0.55)


# Arithmetic


def test_nll_is_that_of_a_softmax():
    logits = np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)
    picked = zip(logits.tolist(), (4, 0, 10), strict=True)
    expected = [-math.log(math.exp(row[token]) / sum(map(math.exp, row))) for row, token in picked]
    assert nll(logits, (4, 0, 10)) == pytest.approx(expected, rel=1e-12)
    assert nll(np.array([[1e5, 0.0]], np.float32), [1]) == [1e5]  # exp() of such a number is none


def test_the_error_of_a_difference():
    one, other = Measured((3.0, 5.0, 10.0), 6), Measured((1.0, 4.0, 6.0), 6)
    # Differences 2, 1, 4: their sum is 7, their variance 7/3, that of the sum of three 7.
    assert one.above(other) == (pytest.approx(7 / 6), pytest.approx(math.sqrt(7) / 6))
    assert one.loss == 3.0
    assert Measured((3.0,), 2).above(Measured((1.0,), 2)) == (1.0, None)


# Windows of a text


def test_windows_of_a_text():
    cases, apart = from_text(range(100, 200), head=[1], length=11, answer=3, count=2)
    assert [(case.id, case.prompt, case.answer) for case in cases] == [
        ("text/0", (1, *range(100, 107)), (107, 108, 109)),
        ("text/50", (1, *range(150, 157)), (157, 158, 159)),
    ]
    assert apart == []
    cases, apart = from_text(range(100, 135), length=10, answer=3, count=9, held_out=True)
    assert [case.id for case in cases] == ["text/0"] and [case.id for case in apart] == ["text/10"]
    cases, apart = from_text(range(1000), length=10, answer=3, count=3, held_out=True)
    starts = [int(case.id.removeprefix("text/")) for case in [*cases, *apart]]
    assert len(cases) == len(apart) == 3 and len(set(starts)) == 6 and all(s % 10 == 0 for s in starts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 51}, "the text has 50 tokens, and 1 window of 51 must fit in; give a longer text, or shorter"),
        ({"length": 26, "held_out": True}, "the text has 50 tokens, and 2 windows of 26 must fit in; give a longer"),
        ({"length": 20, "answer": 20}, "20 answer tokens must be from 1 to 19 in 20 tokens"),
        ({"length": 20, "answer": 0}, "0 answer tokens must be from 1 to 19 in 20 tokens"),
    ],
)
def test_a_text_that_is_too_short(arguments, message):
    with pytest.raises(ConfigError, match=message):
        from_text(range(50), **{"answer": 5, "count": 4} | arguments)


def test_a_plot(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    report = calibrate(FakeEngine(monkeypatch, additive).load, SWAA, N, CASES, held_out=[Case("c", (1, 1, 1), (2, 3))])
    plot(report.to_dict(), tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# The engine


@pytest.fixture(scope="module")
def path(gguf_model):
    return str(gguf_model("qwen3", layers=4))


@pytest.fixture
def load(path):
    """load(swaa, n_ctx): the tiny model, closed when the test ends."""
    from swaa_edge import SwaaLlama

    with contextlib.ExitStack() as stack:

        def make(swaa, n_ctx, **more):
            settings = {"n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
            llm = SwaaLlama(path, swaa=swaa, n_ctx=n_ctx, **settings | more)
            stack.callback(llm.close)
            return llm

        yield make


def random_tokens(count, seed):
    return tuple(np.random.default_rng(seed).integers(6, 768, count).tolist())


def oracle_nll(case, swaa):
    """Of each case by transformers in fp32; the answer's tokens, once fed back, are decode."""
    from support import models
    from support.oracle.oracle import Rule, oracle_logits

    rule = Rule.full(4)
    if swaa:
        sliding, decode = swaa.sliding_layers(4), swaa.fa_decode_layers(4)
        rule = Rule(swaa.window_size, swaa.sink_count, tuple(sliding), tuple(decode))
    tokens = [*case.prompt, *case.answer[:-1]]
    is_decode = [at >= len(case.prompt) for at in range(len(tokens))]
    rows = oracle_logits(models.tiny_model("qwen3", layers=4), tokens, is_decode, rule)[len(case.prompt) - 1 :]
    rows = rows.astype(np.float64)
    return sum(np.log(np.exp(row).sum()) - row[token] for row, token in zip(rows, case.answer, strict=True))


@pytest.mark.native
def test_losses_are_the_oracle_s(load):
    """Windows shorter than the prompts, a document asked about twice, an answer of one token."""
    document = random_tokens(150, 0)
    cases = [
        Case("a", (*document, *random_tokens(9, 1)), random_tokens(12, 2)),
        Case("b", (*document, *random_tokens(5, 3)), random_tokens(1, 4)),
    ]
    for swaa in (SwaaConfig(24, 2, fa_decode=True), SwaaConfig(24, 2)):
        losses = Losses(load, swaa, 4, cases)
        found = {}
        for kept in ((), (2,), (0, 1, 3), (0, 1, 2, 3)):
            measured = losses.of(kept)
            config = SwaaConfig(24, 2, fa_layers=kept, fa_decode=swaa.fa_decode) if len(kept) < 4 else None
            expected = [oracle_nll(case, config) for case in cases]
            assert measured.nll == pytest.approx(expected, abs=0.06), (swaa, kept)
            assert measured.loss == pytest.approx(sum(expected) / 13, abs=0.005)
            found[kept] = measured.nll
        # So close is no accident: choices differ by more.
        for one, other in itertools.combinations(found.values(), 2):
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.1


@pytest.mark.native
@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("fa_decode", [False, True])
def test_a_reused_prefix_changes_nothing_but_the_time(load, swa_full, fa_decode):
    document = random_tokens(700, 0)
    cases = [Case(str(i), (*document, *random_tokens(6 + i, i + 1)), random_tokens(5, i + 9)) for i in range(3)]
    # The second's prompt is the first's with its answer: what was decode there must be prefill here.
    cases.insert(1, Case("spoken", (*cases[0].prompt, *cases[0].answer, 7), (8, 9)))
    swaa = SwaaConfig(24, 2, fa_layers=[1], fa_decode=fa_decode)
    warm = load(swaa, 1024, swa_full=swa_full)
    evaluated, evaluate = [], warm.eval
    warm.eval = lambda tokens, **more: (evaluated.append(len(tokens)), evaluate(tokens, **more))
    for case in cases:
        evaluated.clear()
        cold = load(swaa, 1024, swa_full=swa_full)
        assert answer_nll(warm, case) == pytest.approx(answer_nll(cold, case), abs=0.02), case.id
        if case is not cases[0] and (swa_full or fa_decode):
            assert sum(evaluated) < 50, "the document is not read again"


@pytest.mark.native
def test_the_prompt_is_prefill_up_to_its_last_token(load):
    """Else FA decode would show the first token of a direct answer what a user's engine can't see."""
    prompt, answer = random_tokens(200, 5), random_tokens(1, 6)
    swaa = SwaaConfig(16, 1, fa_decode=True)
    found = answer_nll(load(swaa, 512), Case("x", prompt, answer))
    assert found == pytest.approx(oracle_nll(Case("x", prompt, answer), swaa), abs=0.02)
    # What it would be if the last token of the prompt were decode.
    last = Case("x", prompt[:-1], prompt[-1:])
    wrong = oracle_nll(Case("x", last.prompt, last.answer + answer), swaa) - oracle_nll(last, swaa)
    assert abs(found - wrong) > 0.1


@pytest.mark.native
def test_shares_of_attention_are_those_of_the_reference(load):
    import torch

    from support import models
    from support.oracle.oracle import attention_modules, forward_with
    from swaa_edge.calibrate.lazy import QUERIES, attention_shares

    model = models.tiny_model("qwen3", layers=4)
    swaa, cases = SwaaConfig(40, 3), [Case("a", random_tokens(200, 0), (7, 8)), Case("b", random_tokens(20, 1), (9,))]
    expected = np.zeros(4)
    for case in cases:
        tokens = [*case.prompt, *case.answer[:-1]]
        count, weights = len(tokens), {}

        def keep(module, _, output, weights=weights):
            weights[module.layer_idx] = output[1][0]

        hooks = [module.register_forward_hook(keep) for module in attention_modules(model)]
        place = torch.arange(count)
        forward_with(model, tokens, [place[:, None] >= place] * 4, place)
        for hook in hooks:
            hook.remove()
        for layer, probabilities in weights.items():  # [heads, queries, keys]
            seen = [
                [float(head[p, [j for j in range(p + 1) if p - j < 40 or j < 3]].sum()) for head in probabilities]
                for p in range(max(0, count - QUERIES), count)
            ]
            expected[layer] += np.mean(seen) / len(cases)
    found = attention_shares(load, swaa, 4, cases)
    assert found == pytest.approx(expected.tolist(), abs=2e-3)
    assert max(found) - min(found) > 0.005 and max(found) < 0.9, "layers differ by more than that"
