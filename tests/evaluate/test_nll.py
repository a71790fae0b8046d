"""Negative log likelihoods against a plain softmax."""

import math

import numpy as np
import pytest

from swaa_edge.evaluate.nll import nll


def test_nll_is_that_of_a_softmax():
    logits = np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)
    picked = zip(logits.tolist(), (4, 0, 10), strict=True)
    expected = [-math.log(math.exp(row[token]) / sum(map(math.exp, row))) for row, token in picked]
    assert nll(logits, (4, 0, 10)) == pytest.approx(expected, rel=1e-12)
    assert nll(np.array([[1e5, 0.0]], np.float32), [1]) == [1e5]  # exp() of such a number overflows
