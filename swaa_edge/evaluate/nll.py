"""Negative log likelihoods from logits, in float64; perplexity and calibration take them from here.

nll(logits, tokens).mean()
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities of each row: [n, n_vocab] to float64 [n, n_vocab]."""
    rows = np.asarray(logits).astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows


def nll(logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """-log p of each token, in nats: logits [n, n_vocab], one row before each of the n tokens; float64 [n]."""
    return -log_softmax(logits)[np.arange(len(logits)), np.asarray(tokens, np.intp)]
