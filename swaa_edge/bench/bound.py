"""The bound on a configuration's prefill speed-up. `bench` prints the bound beside the measured speed-up.

A sliding layer saves at most the time to attend to the keys outside its window. The time of attention depends on the
model and the machine. So the bound is computed from measured times, not from a count of operations. These are the times
of the patched library under full attention. Full attention and SWAA run the same kernels, so a measured speed-up can
exceed the bound only by noise.

    line = fit_line(ubatch_seconds, n_ubatch=512)
    best = bound(line, config, n_tokens=8192, n_ubatch=512, heads=[16] * 4)

Definition. Under full attention, a ubatch of u tokens from position p sees v = p + (u + 1) / 2 keys per query on
average. The ubatch takes the time a + b * v: attention takes b * v, and all other work takes a at every position. A
weighted least-squares fit over a prompt's ubatches gives a and b.

In a sliding layer with W window tokens and S sinks, the query at position q sees min(q + 1, W + S) keys. If the layer
decodes with full attention, a query in the prompt's tail sees q + 1 keys. Let k be the mean number of visible keys over
a ubatch's queries and the model's query heads. Under the configuration, the ubatch takes at least the time a + b * k.

The bound is T / M. T is the sum of a + b * v over all ubatches, and M is the sum of a + b * k. A shorter last ubatch
counts by its length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from swaa_edge.config import SwaaConfig


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds of a full ubatch under full attention: a + b * (mean number of visible keys per query)."""

    a: float
    b: float


def visible_full(start: int, count: int) -> float:
    """Return the mean number of visible keys for `count` queries from position `start`, under full attention."""
    return start + (count + 1) / 2


def visible_sliding(start: int, count: int, reach: int) -> float:
    """Return the mean number of visible keys for `count` queries from position `start`, in a sliding layer.

    reach: number of window tokens plus number of sinks.
    """
    growing = range(min(start + 1, reach), min(start + count + 1, reach))
    return (sum(growing) + reach * (count - len(growing))) / max(count, 1)


def ubatches(n_tokens: int, n_ubatch: int) -> Iterator[tuple[int, int]]:
    """Yield the ubatches of a prompt, each as (first position, number of tokens)."""
    for start in range(0, n_tokens, n_ubatch):
        yield start, min(n_ubatch, n_tokens - start)


def fit_line(seconds: Sequence[float], n_ubatch: int) -> Line | None:
    """Fit a line to the times of full ubatches by least squares of relative errors.

    With absolute errors, the slow late ubatches alone would determine the line. Then a would be uncertain, and a
    decides the bound of a long prompt.

    seconds: times of consecutive ubatches, starting at position 0.

    Returns None if there are fewer than three times, or if a or b is not positive.
    """
    import numpy as np

    if len(seconds) < 3:
        return None
    times = np.asarray(seconds)
    keys = [visible_full(i * n_ubatch, n_ubatch) for i in range(len(seconds))]
    b, a = np.polyfit(keys, times, 1, w=1 / times)
    return Line(float(a), float(b)) if a > 0 and b > 0 else None


def prefill_seconds(line: Line, config: SwaaConfig | None, n_tokens: int, n_ubatch: int, heads: Sequence[int]) -> float:
    """Return the seconds of a prefill if attention time is proportional to the number of visible keys.

    config: settings, or None for full attention.
    heads: number of query heads of each layer.
    """
    slides = _fraction(heads, config.sliding_layers(len(heads))) if config else 0.0
    with_tail = _fraction(heads, config.fa_decode_layers(len(heads))) if config else 0.0
    total = 0.0
    for start, count in ubatches(n_tokens, n_ubatch):
        keys = (1 - slides) * count * visible_full(start, count)
        if config:
            keys += (slides - with_tail) * count * visible_sliding(start, count, config.reach)
            tail = min(max(start + count - n_tokens + config.tail_count, 0), count)
            keys += with_tail * (count - tail) * visible_sliding(start, count - tail, config.reach)
            keys += with_tail * tail * visible_full(start + count - tail, tail)
        total += (line.a * count + line.b * keys) / n_ubatch
    return total


def _fraction(heads: Sequence[int], chosen: Sequence[bool]) -> float:
    return sum(count for count, wanted in zip(heads, chosen, strict=True) if wanted) / sum(heads)


def bound(line: Line, config: SwaaConfig | None, n_tokens: int, n_ubatch: int, heads: Sequence[int]) -> float:
    """Return the highest possible prefill speed-up of `config`."""
    full = prefill_seconds(line, None, n_tokens, n_ubatch, heads)
    return full / prefill_seconds(line, config, n_tokens, n_ubatch, heads)


def attention_seconds(line: Line, n_tokens: int, n_ubatch: int) -> float:
    """Return the attention time of a full-attention prefill, in seconds."""
    return prefill_seconds(dataclasses.replace(line, a=0.0), None, n_tokens, n_ubatch, [1])


def attention_fraction(line: Line, n_tokens: int, n_ubatch: int) -> float:
    """Return the attention's share of the time of a full-attention prefill, from 0 to 1."""
    return attention_seconds(line, n_tokens, n_ubatch) / prefill_seconds(line, None, n_tokens, n_ubatch, [1])
