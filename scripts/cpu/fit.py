"""Attention's seconds out of the times of a prompt's ubatches, without a profiler and without a second run.

    attention_seconds(timing.ubatch_seconds, n_tokens=8192, n_ubatch=512)

The method. All work of a ubatch but attention is the same wherever it stands in the prompt, and attention's grows with
the columns it sees: its queries see v = start + (count + 1) / 2 of them on average. So a ubatch takes a + b * v, and
b * v of it is attention's. The slope b is Theil and Sen's: the median of the slopes between every two ubatches. A
few ubatches that another program held up don't move it (it bears 29% of them), where a mean would follow each.
What attention costs beside its columns (per query, per task) stays in a, and so does the half ubatch of masked columns
that a library without flash attention computes as well: its attention comes out a little cheaper than it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

from swaa_edge.bench.bound import Line, ubatches, visible_full


def robust_line(seconds: Sequence[float], n_tokens: int, n_ubatch: int) -> Line | None:
    """a and b of the full ubatches among `seconds`, which are those of a prompt of `n_tokens` in order.

    None if they tell no line: fewer than three, or times that don't grow.
    """
    full = n_tokens // n_ubatch
    points = [(visible_full(i * n_ubatch, n_ubatch), took) for i, took in enumerate(seconds[:full])]
    if len(points) < 3:
        return None
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.combinations(points, 2)]
    b = statistics.median(slopes)
    return Line(statistics.median(y - b * x for x, y in points), b) if b > 0 else None


def attention_seconds(seconds: Sequence[float], n_tokens: int, n_ubatch: int) -> float | None:
    """Seconds of a prompt's prefill that are attention's; None where `robust_line` finds no line."""
    line = robust_line(seconds, n_tokens, n_ubatch)
    return line and prefill_seconds(dataclasses.replace(line, a=0.0), n_tokens, n_ubatch)


def prefill_seconds(line: Line, n_tokens: int, n_ubatch: int) -> float:
    """Seconds of a prompt of `n_tokens` by `line`, which may come from a shorter one; a last short ubatch its share."""
    parts = ubatches(n_tokens, n_ubatch)
    return sum((line.a + line.b * visible_full(*part)) * part[1] / n_ubatch for part in parts)
