"""The bound against brute force and by hand, and that exact times never exceed it."""

import dataclasses
import random

import pytest

from swaa_edge import SwaaConfig
from swaa_edge.bench import bound


def brute_force(start, count, window, sinks):
    """Visible keys per query from the definition of the mask, pair by pair."""
    seen = sum(q - j < window or j < sinks for q in range(start, start + count) for j in range(q + 1))
    return seen / count


def test_visible_keys_are_those_of_the_mask():
    generator = random.Random(0)
    cases = [(0, 1, 1, 0), (0, 8, 8, 0), (0, 8, 7, 1), (0, 8, 9, 0), (5, 3, 4, 40), (100, 16, 1, 0)]
    cases += [tuple(generator.randint(low, 40) for low in (0, 1, 1, 0)) for _ in range(200)]
    for start, count, window, sinks in cases:
        expected = brute_force(start, count, window, sinks)
        assert bound.visible_sliding(start, count, window + sinks) == pytest.approx(expected), (start, count)
        assert bound.visible_full(start, count) == brute_force(start, count, 1000, 0)


def test_the_fit_finds_the_line():
    seconds = [0.5 + 0.001 * (512 * i + 256.5) for i in range(5)]
    line = bound.fit_line(seconds, 512)
    assert (line.a, line.b) == (pytest.approx(0.5), pytest.approx(0.001))
    assert bound.attention_seconds(line, 5 * 512, 512) == pytest.approx(sum(seconds) - 2.5)
    assert bound.attention_fraction(line, 5 * 512, 512) == pytest.approx(1 - 2.5 / sum(seconds))
    # A machine twice as slow has twice the line.
    slow = bound.fit_line([2 * second for second in seconds], 512)
    assert (slow.a, slow.b) == (pytest.approx(1.0), pytest.approx(0.002))


def test_the_fit_minimizes_relative_errors():
    # Three points that are on no line: the result of the normal equations with weights 1 / t^2, by hand.
    seconds, keys = [1.0, 3.0, 4.0], [32.5, 96.5, 160.5]
    line = bound.fit_line(seconds, 64)

    def error(a, b):
        return sum(((a + b * key - second) / second) ** 2 for key, second in zip(keys, seconds, strict=True))

    for da, db in ((1e-4, 0), (-1e-4, 0), (0, 1e-6), (0, -1e-6)):
        assert error(line.a, line.b) < error(line.a + da, line.b + db)


def test_noise_at_the_end_of_a_long_prompt_leaves_its_start():
    generator = random.Random(0)
    for _ in range(20):
        # Off by up to 10% each, as on a laptop: absolute errors at the end are larger than the first times.
        noisy = [(0.55 + 0.0004 * bound.visible_full(512 * i, 512)) * generator.uniform(0.9, 1.1) for i in range(64)]
        line = bound.fit_line(noisy, 512)
        assert line.a == pytest.approx(0.55, rel=0.15) and line.b == pytest.approx(0.0004, rel=0.05)


@pytest.mark.parametrize("seconds", [[], [1.0, 2.0], [3.0, 2.0, 1.0], [1.0, 100.0, 200.0, 300.0]])
def test_no_line_without_growing_times(seconds):
    assert bound.fit_line(seconds, 64) is None


@pytest.mark.parametrize("n_ubatch", [8, 5, 16, 1])
@pytest.mark.parametrize("tail_count", [0, 1, 3, 8, 11, 16, 40])
def test_the_tail_sees_everything_in_layers_with_fa_decode(tail_count, n_ubatch):
    # Of four layers one is FA and one slides without FA decode; keys of 16 queries, layer by layer.
    config = SwaaConfig(4, 2, fa_layers=[0], fa_decode=[1, 2], tail_count=tail_count)
    window = [min(q + 1, 6) for q in range(16)]
    tail = [q + 1 if q >= 16 - tail_count else window[q] for q in range(16)]
    expected = (136 + 2 * sum(tail) + sum(window)) / 4 / n_ubatch
    pure = bound.Line(0.0, 1.0)
    assert bound.prefill_seconds(pure, config, 16, n_ubatch, [1] * 4) == pytest.approx(expected)


def test_the_bound_by_hand():
    config = SwaaConfig(4, 2)
    # Only attention, so the bound is visible keys over visible keys: 136 of 16 queries, and
    # 1 + 2 + 3 + 4 + 5 + 6 * 11 = 81.
    pure = bound.Line(0.0, 1.0)
    assert bound.bound(pure, config, 16, 8, [1]) == pytest.approx(136 / 81)
    # Half of the heads slide; layers count by their heads.
    half = dataclasses.replace(config, fa_layers=[0])
    assert bound.bound(pure, half, 16, 8, [1, 1]) == pytest.approx(136 / (136 / 2 + 81 / 2))
    assert bound.bound(pure, half, 16, 8, [3, 1]) == pytest.approx(136 / (136 * 3 / 4 + 81 / 4))
    # Two ubatches of a = 17 / 2 each cost as much as all attention of full attention does.
    assert bound.bound(bound.Line(8.5, 1.0), config, 16, 8, [1]) == pytest.approx((17 + 17) / (17 + 81 / 8))
    # A last ubatch of half the size has half of everything.
    seconds = bound.prefill_seconds(bound.Line(8.0, 1.0), None, 12, 8, [1])
    assert seconds == pytest.approx(8 + 4.5 + (8 + 10.5) / 2)


def test_nothing_is_gained_within_the_window_or_without_sliding_layers():
    line = bound.Line(0.5, 0.001)
    assert bound.bound(line, SwaaConfig(500, 12), 512, 128, [2] * 4) == pytest.approx(1)
    assert bound.bound(line, SwaaConfig(8, 0, "all"), 512, 128, [2] * 4) == 1
    assert bound.bound(line, None, 512, 128, [2] * 4) == 1
    assert bound.bound(line, SwaaConfig(500, 11), 512, 128, [2] * 4) > 1
