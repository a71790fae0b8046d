"""The speed-up that a configuration could have at best: the bound that `bench` prints beside what it measured.

A sliding layer can't save more than the attention it leaves out. How much that is depends on the model and
the machine, so it is taken from the measured times of full attention and not from a count of operations.

    line = fit_line(ubatch_seconds, n_ubatch=512)
    best = bound(line, config, n_tokens=8192, n_ubatch=512, heads=[16] * 4)

The method. A ubatch of u tokens from position p on sees v = p + (u + 1) / 2 keys per query on average. All its
work but attention is the same at every p, so its time is t = a + b * v: least squares (of relative errors) over
the ubatches of a prompt give a and b, and b * v is the attention. Where a layer slides, a query at position q
sees min(q + 1, W) keys and of the sinks min(S, max(0, q + 1 - W)) more. Each layer has a share of b that goes by
its number of heads; sliding layers get their mean of visible keys in place of v. The bound is the sum of the
full times over the sum of these. docs/bench.md says what it leaves out.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence

from swaa_edge.config import SwaaConfig


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds of a full ubatch under full attention: a + b * (mean of visible keys per query)."""

    a: float
    b: float


def visible_full(start: int, count: int) -> float:
    """Mean number of keys that `count` queries from position `start` on see under full attention."""
    return start + (count + 1) / 2


def visible_sliding(start: int, count: int, window: int, sinks: int) -> float:
    """The same in a sliding layer with `window` and `sinks` tokens."""

    # min(q + 1, W) + min(S, max(0, q + 1 - W)) is min(q + 1, W + S): until then a query sees all before it.
    limit = window + sinks
    growing = range(min(start + 1, limit), min(start + count + 1, limit))
    return (sum(growing) + limit * (count - len(growing))) / count


def ubatches(n_tokens: int, n_ubatch: int) -> Iterator[tuple[int, int]]:
    """The ubatches of a prompt of `n_tokens`: (first position, tokens)."""
    for start in range(0, n_tokens, n_ubatch):
        yield start, min(n_ubatch, n_tokens - start)


def fit_line(seconds: Sequence[float], n_ubatch: int) -> Line | None:
    """Least squares of relative errors over the times of full ubatches, in order from position 0.

    Relative, because a machine's speed drifts by a factor: else the long late ubatches alone would place the
    line, and its start, which decides the bound of a long prompt, would be anywhere. None if the times tell
    no line: fewer than three, or noise that keeps them from growing.
    """
    if len(seconds) < 3:
        return None
    keys = [visible_full(i * n_ubatch, n_ubatch) for i in range(len(seconds))]
    weights = [second**-2 for second in seconds]
    total = sum(weights)
    mean_keys = sum(map(operator.mul, weights, keys)) / total
    mean_seconds = sum(map(operator.mul, weights, seconds)) / total
    spread = sum(weight * (key - mean_keys) ** 2 for weight, key in zip(weights, keys, strict=True))
    rise = sum(
        weight * (key - mean_keys) * (second - mean_seconds)
        for weight, key, second in zip(weights, keys, seconds, strict=True)
    )
    b = rise / spread
    a = mean_seconds - b * mean_keys
    return Line(a, b) if a > 0 and b > 0 else None


def modelled_seconds(
    line: Line, config: SwaaConfig | None, n_tokens: int, n_ubatch: int, heads: Sequence[int]
) -> float:
    """Seconds of a prefill by `line` if each sliding layer costs its visible keys' share; config None: all are FA.

    heads: query heads of each layer.
    """
    sliding = config.sliding_layers(len(heads)) if config else [False] * len(heads)
    share = sum(count for count, slides in zip(heads, sliding, strict=True) if slides) / sum(heads)
    total = 0.0
    for start, count in ubatches(n_tokens, n_ubatch):
        keys = (1 - share) * visible_full(start, count)
        if config:
            keys += share * visible_sliding(start, count, config.window_size, config.sink_count)
        total += (line.a + line.b * keys) * count / n_ubatch
    return total


def bound(line: Line, config: SwaaConfig | None, n_tokens: int, n_ubatch: int, heads: Sequence[int]) -> float:
    """The highest prefill ratio of full attention to `config`: above 1 where the prompt outgrows W + S."""
    full = modelled_seconds(line, None, n_tokens, n_ubatch, heads)
    return full / modelled_seconds(line, config, n_tokens, n_ubatch, heads)


def attention_share(line: Line, n_tokens: int, n_ubatch: int) -> float:
    """Which part of a full-attention prefill is attention, from 0 to 1."""
    total = modelled_seconds(line, None, n_tokens, n_ubatch, [1])
    linear = line.a * n_tokens / n_ubatch
    return 1 - linear / total
