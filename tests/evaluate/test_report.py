"""Rows, cells, intervals and the front of an evaluation, against what another way of computing gives."""

import itertools
import json
import random
import statistics
from array import array

import pytest

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import GenerationError
from swaa_edge.evaluate.report import Report, counted, pareto, wilson
from swaa_edge.evaluate.samples import Sample

Z2 = 3.841458820694124  # the 95 % quantile of chi squared with one degree of freedom


def root(fraction, total, low, high):
    """Solve (fraction - p)^2 = z^2 p (1 - p) / total between low and high by bisection: the interval's definition."""

    def excess(p):
        return (fraction - p) ** 2 - Z2 * p * (1 - p) / total

    rising = excess(high) > excess(low)
    for _ in range(200):
        middle = (low + high) / 2
        if (excess(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def test_the_interval_is_wilson_s():
    generator = random.Random(0)
    cases = [(1, 2), (5, 10), (1, 1000), (999, 1000)]
    cases += [(generator.randint(1, total - 1), total) for total in generator.choices(range(2, 500), k=100)]
    for correct, total in cases:
        fraction = correct / total
        expected = (root(fraction, total, 0, fraction), root(fraction, total, fraction, 1))
        assert wilson(correct, total) == pytest.approx(expected, abs=1e-6), (correct, total)


def test_intervals_that_are_known():
    # None and all of ten: z^2 / (10 + z^2) from the end.
    assert wilson(0, 10) == (0.0, pytest.approx(Z2 / (10 + Z2), abs=1e-6))
    assert wilson(10, 10) == (pytest.approx(10 / (10 + Z2), abs=1e-6), pytest.approx(1.0))
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 15 of 148.
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson(15, 148) == (pytest.approx(0.0624, abs=5e-5), pytest.approx(0.1605, abs=5e-5))
    assert wilson(0, 0) == (0.0, 1.0)
    assert counted([{"correct": True}, {"correct": False}, {"correct": 1}, {"correct": True}]) == {
        "samples": 4,
        "correct": 3,
        "accuracy": 0.75,
        "interval": list(wilson(3, 4)),
    }


def sample(name, task="needle", length=100, depth=None, style="direct"):
    return Sample(name, task, array("i"), ("47",), length=length, depth=depth, style=style)


def record(config, name, correct, seconds=1.0, *, reused=0, tokens=100, generated=3, decode=0.5):
    return {
        "config": config,
        "sample": name,
        "correct": correct,
        "reply": "x",
        "prompt_tokens": tokens,
        "reused_tokens": reused,
        "prefill_seconds": seconds,
        "generated_tokens": generated,
        "decode_seconds": decode,
    }


A = SwaaConfig(8, 1)


def test_rows():
    samples = [sample("n/0"), sample("n/1"), sample("k/0", "kv", 200), sample("k/1", "kv", 200)]
    records = [
        record("a", "k/0", True, 2.0, generated=9, decode=1.0),
        record("full", "n/0", True, 4.0),
        record("full", "n/1", True, 8.0),
        record("full", "k/0", False, 3.0),
        record("full", "k/1", True, 9.0),
        record("a", "n/0", False, 1.0),
        record("a", "n/1", True, 1.0),
        record("a", "other", True, 99.0),
        record("gone", "n/0", True, 99.0),
    ]
    full, a = Report({"full": False, "never asked": A, "a": A}, samples, records).rows()
    assert (full["config"], full["swaa"], a["config"], a["swaa"]) == ("full", None, "a", A.to_dict())
    assert (full["samples"], full["correct"], full["accuracy"]) == (4, 3, 0.75)
    assert full["interval"] == list(wilson(3, 4)) and full["prefill_ratio"] == 1.0
    assert full["tasks"] == {"needle": counted([{"correct": 1}] * 2), "kv": counted([{"correct": n} for n in (0, 1)])}
    assert (full["prefill_seconds"], full["decode_tok_s"], full["prompt_tokens"]) == (6.0, 12 / 2, 100)
    assert (a["samples"], a["correct"], a["prefill_seconds"]) == (3, 2, 1.0)
    # The middle of 4 / 1, 8 / 1 and 3 / 2: what full attention took for the fourth has no partner.
    assert a["prefill_ratio"] == 4.0 and a["decode_tok_s"] == 15 / 2.0
    assert {task: counts["samples"] for task, counts in a["tasks"].items()} == {"needle": 2, "kv": 1}


def test_times_are_those_of_prompts_evaluated_whole():
    samples = [sample(f"n/{n}") for n in range(4)]
    full = [record("full", "n/0", True, 6.0), record("full", "n/1", True, 0.1, reused=11)]
    full += [record("full", "n/2", True, 8.0, reused=10), record("full", "n/3", True, 9.0)]
    a = [record("a", "n/0", True, 2.0), record("a", "n/1", True, 5.0), record("a", "n/2", True, 4.0)]
    a += [record("a", "n/3", True, 0.5, reused=99)]
    rows = Report({"full": False, "a": A}, samples, full + a).rows()
    assert [row["prefill_seconds"] for row in rows] == [8.0, 4.0]
    # n/1 was read by one side only, n/3 by the other.
    assert rows[1]["prefill_ratio"] == statistics.median([6 / 2, 8 / 4])
    reused = [record("full", "n/0", True, reused=50), record("a", "n/0", True, reused=50, decode=0.0)]
    rows = Report({"full": False, "a": A}, samples, reused).rows()
    assert [(row["prefill_seconds"], row["prefill_ratio"]) for row in rows] == [(None, None)] * 2
    assert rows[1]["decode_tok_s"] is None
    assert Report({"a": A}, samples, a).rows()[0]["prefill_ratio"] is None


def test_cells_and_the_document():
    samples = [
        Sample(f"{task}/{length}/{depth}/{number}", task, array("i"), ("1",), length=length, depth=depth, style=style)
        for task, depths in (("needle", (0.0, 0.5)), ("kv", (None,)))
        for length, depth in itertools.product((100, 200), depths)
        for number, style in enumerate(("direct", "spoken", "direct"))
    ]
    generator = random.Random(1)
    records = [record(name, s.id, generator.random() < 0.5) for s in samples for name in ("full", "a")]
    generator.shuffle(records)
    report = Report({"full": False, "a": A}, samples, records)
    cells = report.cells()
    assert len(cells) == 2 * (2 * 2 * 2 + 2 * 2)
    for cell in cells:
        mine = [
            r["correct"]
            for r, s in itertools.product(records, samples)
            if r["sample"] == s.id
            and r["config"] == cell["config"]
            and (s.task, s.length, s.depth, s.style) == tuple(cell[k] for k in ("task", "length", "depth", "style"))
        ]
        assert (cell["samples"], cell["correct"]) == (len(mine), sum(mine)) and len(mine) in (1, 2)
        assert cell["accuracy"] == sum(mine) / len(mine)
    document = report.to_dict()
    assert json.loads(json.dumps(document)) == document
    assert set(document) == {"table", "cells", "answers", "stopped"} and document["stopped"] is None
    assert [(r["config"], r["sample"]) for r in document["answers"]] == [
        (name, s.id) for name in ("full", "a") for s in samples
    ]
    assert Report({}, [], [], GenerationError("out of memory")).to_dict()["stopped"] == "out of memory"
    assert Report({}, [], []).rows() == []


def swept(points):
    """The front by another way: from the cheapest on, whoever gains more than all before."""
    front, best = set(), -1
    for point in sorted(set(points.values()), key=lambda point: (point[0], -point[1])):
        if point[1] > best:
            front.add(point)
            best = point[1]
    return [name for name, point in points.items() if point in front]


def test_the_front():
    generator = random.Random(0)
    for _ in range(200):
        points = {str(n): (generator.randrange(6), generator.randrange(6)) for n in range(generator.randint(0, 9))}
        assert pareto(points) == swept(points)
    assert pareto({"slow": (3, 1.0), "mid": (2, 0.9), "bad": (2.5, 0.8), "fast": (1, 0.1), "as fast": (1, 0.1)}) == [
        "slow",
        "mid",
        "fast",
        "as fast",
    ]
