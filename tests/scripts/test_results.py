"""docs/results.md: written from its data, and its sentences follow the figures."""

import json
import re

import pytest


@pytest.fixture(scope="module")
def results():
    from demo import results

    return results


@pytest.fixture
def document(results):
    return json.loads(results.DATA.read_text(encoding="utf-8"))


@pytest.fixture
def tail(results):
    return json.loads(results.TAIL.read_text(encoding="utf-8"))


def test_the_page_is_what_its_data_give(results):
    results.check()


def test_a_stale_page_is_noticed(results, document, tmp_path, monkeypatch):
    document["table"][0]["tasks"]["kv"]["accuracy"] = 0.123
    changed = tmp_path / "demo.json"
    changed.write_text(json.dumps(document), encoding="utf-8")
    monkeypatch.setattr(results, "DATA", changed)
    with pytest.raises(SystemExit, match=r"docs/results.md is stale: python scripts/demo/results.py write"):
        results.check()


def test_every_strategy_alone_and_each_pair_is_in_the_table(results, document, tail):
    rows = {row["config"]: row["swaa"] for row in document["table"]}
    found = {
        (bool(swaa["sink_count"]), swaa["fa_layers"] == "1::2", bool(swaa["fa_decode"]))
        for name, swaa in rows.items()
        if swaa and not name.startswith("quarter")
    }
    assert len(found) == 8  # sinks, interleaving and FA decode, each with and without
    page = results.page(document, tail)
    for name in rows:
        assert f"| {name} |" in page


def test_the_verdict_on_calibrate_goes_both_ways(results, document, tail):
    rows = {row["config"]: row for row in document["table"]}
    best = max(rows[f"quarter {offset}::4"]["accuracy"] for offset in range(4))
    for accuracy, verdict in ((best + 0.01, "beats every periodic pattern"), (best - 0.01, "does not beat the best")):
        rows["quarter calibrated"]["accuracy"] = accuracy
        assert re.search(rf"{verdict}[^.]* 1\.0 points", " ".join(results.page(document, tail).split()))


def test_the_tail_keeps_the_answers(tail):
    rows = {row["config"]: row for row in tail["table"]}
    assert all(row["samples"] == 200 for row in rows.values())
    assert rows["naive"]["accuracy"] < 0.15
    for recipe in ("fast", "balanced", "quality"):
        assert rows[f"{recipe}, tail 8"]["accuracy"] >= 0.95 * rows["full"]["accuracy"]
