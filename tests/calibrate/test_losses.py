"""Losses of reference answers: arithmetic, labels, and the engine's figures against the oracle."""

import itertools
import math

import numpy as np
import pytest

from swaa_edge import SwaaConfig
from swaa_edge.calibrate.cases import Case
from swaa_edge.calibrate.losses import Losses, Measured, answer_nll, label, read_answers
from swaa_edge.evaluate.perplexity import nll


def test_labels_of_choices():
    assert [label(kept, 4) for kept in ({0, 1, 2, 3}, (), {2, 0}, {0, 1, 3})] == ["all", "none", "0,2", "all but 2"]
    assert label({1}, 2) == "1"


def test_the_error_of_a_difference():
    one, other = Measured((3.0, 5.0, 10.0), 6), Measured((1.0, 4.0, 6.0), 6)
    # Differences 2, 1, 4: their sum is 7, their variance 7/3, that of the sum of three 7.
    assert one.above(other) == (pytest.approx(7 / 6), pytest.approx(math.sqrt(7) / 6))
    assert one.loss == 3.0
    assert Measured((3.0,), 2).above(Measured((1.0,), 2)) == (1.0, None)


def random_tokens(count, seed):
    return tuple(np.random.default_rng(seed).integers(6, 768, count).tolist())


def oracle_nll(case, swaa):
    """The loss of a case by transformers in fp32; the tokens of the answer that are fed back are decode tokens."""
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
        # The match is not a coincidence: choices differ by more.
        for one, other in itertools.combinations(found.values(), 2):
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.1


@pytest.mark.native
@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("fa_decode", [False, True])
def test_a_reused_prefix_changes_nothing_but_the_time(load, swa_full, fa_decode):
    document = random_tokens(700, 0)
    cases = [Case(str(i), (*document, *random_tokens(6 + i, i + 1)), random_tokens(5, i + 9)) for i in range(3)]
    # The second prompt is the first one with its answer: what was decode there must be prefill here.
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
            assert sum(evaluated) < 50, "the document is not evaluated again"


@pytest.mark.native
def test_no_prompt_reuses_what_its_own_tail_must_see(load):
    """The tail of a short question begins earlier in the document than that of a long one."""
    document = random_tokens(300, 0)
    cases = [Case(str(size), (*document, *random_tokens(size, size)), random_tokens(5, 9)) for size in (30, 4, 60)]
    swaa = SwaaConfig(24, 2, fa_decode=True, tail_count=20)
    warm = load(swaa, 512)
    for case in cases:
        assert answer_nll(warm, case) == pytest.approx(answer_nll(load(swaa, 512), case), abs=0.02), case.id


@pytest.mark.native
def test_one_model_reads_answers_with_any_tail(load):
    """read_answers with tail_count gives what a model loaded with that tail gives, after other tails on the way."""
    case = Case("x", random_tokens(300, 5), random_tokens(8, 6))
    warm, found = load(SwaaConfig(24, 2, fa_decode=True), 512), {}
    for tail in (0, 1, 40, 16, 400, 0):
        losses: list[float] = []
        read_answers(warm, [case], lambda rows, tokens, to=losses: to.extend(nll(rows, tokens)), tail)
        cold = load(SwaaConfig(24, 2, fa_decode=True, tail_count=tail), 512)
        assert math.fsum(losses) == pytest.approx(answer_nll(cold, case), abs=0.02), tail
        found[tail] = math.fsum(losses)
    assert abs(found[0] - found[40]) > 0.1  # the tail matters here


@pytest.mark.native
def test_questions_share_the_tail_of_their_document(load, monkeypatch):
    """Prompts of equal length evaluate the document's part of the tail once; the answers are those of a new model."""
    document = random_tokens(100, 5)
    ends = [random_tokens(size, seed) for size, seed in ((12, 1), (12, 2), (20, 3), (12, 4), (4, 5), (12, 6))]
    cases = [Case(str(at), (*document, *end), random_tokens(6, 9 + at)) for at, end in enumerate(ends)]
    swaa = SwaaConfig(24, 2, fa_decode=True, tail_count=40)
    warm, losses, evaluated = load(swaa, 512), [], []
    monkeypatch.setattr(
        warm, "eval", lambda tokens, **given: evaluated.append(len(tokens)) or type(warm).eval(warm, tokens, **given)
    )
    read_answers(warm, cases, lambda rows, tokens: losses.extend(nll(rows, tokens)))
    assert warm.n_tokens == 112 - 40, "what saw more than a prompt does is not left for the next call"
    prompts = [sum(evaluated[at : at + 2]) for at in range(0, len(evaluated), 3)]
    assert prompts == [112, 12, 120 - 72, 112 - 72, 104 - 64, 112 - 64]
    for case, first in zip(cases, range(0, len(losses), 6), strict=True):
        found = math.fsum(losses[first : first + 6])
        assert found == pytest.approx(answer_nll(load(swaa, 512), case), abs=0.02), case.id


@pytest.mark.native
def test_an_interrupted_case_leaves_no_tail_behind(load):
    document = random_tokens(100, 5)
    swaa = SwaaConfig(24, 2, fa_decode=True, tail_count=40)
    warm = load(swaa, 512)

    def interrupt(rows, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_answers(warm, [Case("a", document, random_tokens(3, 1))], interrupt)
    longer = Case("b", (*document, *random_tokens(60, 2)), random_tokens(6, 3))
    assert answer_nll(warm, longer) == pytest.approx(answer_nll(load(swaa, 512), longer), abs=0.02)


@pytest.mark.native
def test_the_prompt_is_prefill_up_to_its_last_token(load):
    """Otherwise FA decode would show the first answer token more than it sees in use."""
    prompt, answer = random_tokens(200, 5), random_tokens(1, 6)
    swaa = SwaaConfig(16, 1, fa_decode=True)
    found = answer_nll(load(swaa, 512), Case("x", prompt, answer))
    assert found == pytest.approx(oracle_nll(Case("x", prompt, answer), swaa), abs=0.02)
    # The loss if the last token of the prompt were decode.
    last = Case("x", prompt[:-1], prompt[-1:])
    wrong = oracle_nll(Case("x", last.prompt, last.answer + answer), swaa) - oracle_nll(last, swaa)
    assert abs(found - wrong) > 0.1
