"""scripts/real/measure.py: the plan, resuming, the arithmetic of its figures, and one short run of the real model."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
from real import cells, measure, reading, run, tasks
from real.figures import FULL, Figures

from support.fakes.real import TEXT, WordPrompts, results
from swaa_edge.config import TAIL
from swaa_edge.support.journal import Journal

CHOSEN = {"quarter greedy": [0, 1], "quarter nll": [2, 3], "half greedy": [4, 5], "half nll": [6, 7]}
STAGE = cells.Stage(
    1024, 3, [cells.FULL, cells.row(64, False, "none", False), cells.row(64, True, "none", True, (0, 8))]
)


def plan():
    return [*cells.first_stages(), *cells.later_stages(CHOSEN)]


@pytest.fixture
def documents():
    return tasks.build(1024, 3, WordPrompts(), {"python": TEXT}, asked=2)


# The plan


def test_every_strategy_alone_and_in_pairs_is_measured_at_2k():
    rows = [row for stage in plan() if stage.length == 2048 for row in stage.rows if row.window == 128]
    found = {(row.swaa.sink_count, row.swaa.fa_layers, row.swaa.fa_decode) for row in rows}
    assert set(itertools.product((0, 16), ("none", "1::2", "1::4"), (False, True))) <= found
    for row in rows:
        assert set(row.tails) >= ({0, TAIL} if row.swaa.fa_decode else {0})
    assert any(list(row.tails) == [0, 1, 16, 64, 128, 256] for row in rows)


def test_every_length_has_enough_samples_the_recipes_and_both_windows():
    for stage in plan():
        asked = 4 if stage.length == 8192 else 5
        assert stage.documents * asked >= {2048: 100, 4096: 40, 8192: 16}[stage.length]
    for length in cells.DOCUMENTS:
        keys = {row.key for stage in plan() if stage.length == length for row in stage.rows}
        for name in ("naive", *cells.RECIPES.values(), "sinks + 0:8 + FA decode"):
            assert f"{name} @ {length // 16}" in keys
        for name in ("naive", "sinks + FA decode") if length == 8192 else ("naive", *cells.RECIPES.values()):
            assert f"{name} @ {length // 8}" in keys
        assert f"calibrated quarter greedy @ {length // 16}" in keys


def test_the_plan_starts_with_the_headline_and_takes_under_four_hours_on_two_threads(capsys):
    first = cells.first_stages()[0]
    assert [row.name for row in first.rows[:3]] == ["full", "naive", "sinks + FA decode"]
    assert measure.main(["--plan", "--threads", "2"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("About ") and float(last.split()[1]) <= 4


# Resuming


class FakeModel:
    def reset(self):
        pass

    def eval(self, tokens, decode_from):
        pass

    def cancel(self):
        pass

    def close(self):
        pass


@pytest.fixture
def engine(monkeypatch):
    """What was loaded and asked; `stop_at` interrupts before the questions about a document under one tail."""
    state = {"loaded": [], "asked": [], "stop_at": None}

    def load(row, n_ctx):
        state["loaded"].append(row.swaa)
        return FakeModel()

    def ask(llm, document, tail):
        if len(state["asked"]) == state["stop_at"]:
            raise KeyboardInterrupt
        state["asked"].append((document.name, tail))
        return [(1.0, 1)] * len(document.questions)

    monkeypatch.setattr(reading, "ask", ask)
    return {"load": load, "state": state}


def test_a_run_that_was_interrupted_loses_one_document_and_asks_nothing_twice(engine, documents, tmp_path):
    path, state = tmp_path / "journal.jsonl", engine["state"]
    state["stop_at"] = 5
    with pytest.raises(KeyboardInterrupt), Journal(path, {}) as journal:
        reading.measure_stage(STAGE, documents, engine["load"], journal)
    kept = len(Journal(path, {}).records)
    state["asked"].clear()
    state["stop_at"] = None
    with Journal(path, {}) as journal:
        reading.measure_stage(STAGE, documents, engine["load"], journal)
        assert all(reading.answers_of(journal.records, 1024, row, each) for row in STAGE.rows for each in documents)
    assert len(state["asked"]) == 3 * 4 - sum(len(record["answers"]) for record in journal.records[:kept]) == 7
    state["loaded"].clear()
    with Journal(path, {}) as journal:
        reading.measure_stage(STAGE, documents, engine["load"], journal)
    assert state["loaded"] == []


def test_full_attention_is_read_again_beside_later_rows_but_not_asked_again(engine, documents):
    later = cells.Stage(1024, 3, [cells.row(64, True, "none", False)])
    journal = Journal(None, {})
    reading.measure_stage(STAGE, documents, engine["load"], journal)
    before = len(engine["state"]["asked"])
    reading.measure_stage(later, documents, engine["load"], journal)
    assert len(engine["state"]["asked"]) - before == len(documents)
    names = [record["row"] for record in journal.records[-6:]]
    assert names == [FULL, "sinks @ 64"] * 3


@pytest.mark.parametrize(
    "change",
    [{"swaa": dataclasses.replace(STAGE.rows[2].swaa, sink_count=5)}, {"trained_as": "new"}, {"tails": (0, 8, 16)}],
    ids=lambda change: next(iter(change)),
)
def test_a_record_of_other_settings_under_the_same_name_is_not_used(change, engine, documents):
    journal = Journal(None, {})
    reading.measure_stage(STAGE, documents, engine["load"], journal)
    changed = dataclasses.replace(STAGE.rows[2], **change)
    assert changed.key == STAGE.rows[2].key
    assert reading.answers_of(journal.records, 1024, STAGE.rows[2], documents[0])
    assert reading.answers_of(journal.records, 1024, changed, documents[0]) is None


def test_a_ratio_is_of_the_full_attention_read_last():
    def record(row, seconds, document="a"):
        return {"length": 1, "row": row, "document": document, "seconds": seconds, "identity": "i"}

    records = [record(FULL, 4.0), record("x", 2.0), record(FULL, 6.0, "b"), record("x", 2.0, "b"), record(FULL, 8.0)]
    found = run.ratios([*records, record("y", 2.0)])
    assert found[1, "x", "i"] == [2.0, 3.0]
    assert found[1, "y", "i"] == [4.0]


def test_ctrl_c_ends_a_short_run_without_a_file(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_quick", interrupt)
    assert measure.main(["--quick"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("rows", "complete", "written"), [(3, True, True), (1, True, True), (2, False, True), (1, False, False)]
)
def test_an_interrupted_run_never_replaces_more_rows(rows, complete, written, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "DATA", tmp_path / "real.json")
    measure.DATA.write_text(json.dumps({"rows": [{}, {}]}))
    monkeypatch.setattr(run, "measure_all", lambda *_: {"rows": [{"row": "new"}] * rows, "complete": complete})
    assert measure.main([]) == (0 if complete else 130)
    assert ("new" in measure.DATA.read_text()) is written
    error = capsys.readouterr().err
    assert ("continues" in error) is not complete and ("unchanged" in error) is not written


def test_other_texts_than_those_of_the_committed_results_are_named(monkeypatch, capsys):
    class Stop(Exception):
        pass

    def stop(path):
        raise Stop

    fake = SimpleNamespace(texts={"python": "other"}, path="")
    monkeypatch.setattr(run, "Real", lambda threads: fake)
    monkeypatch.setattr(run, "Prompts", stop)
    for corpus, said in (({"python": "x"}, True), (run.fingerprints(fake.texts), False)):
        with pytest.raises(Stop):
            run.measure_all(1, {"corpus": corpus})
        assert ("texts differ" in capsys.readouterr().err) is said


# Figures


@pytest.fixture
def found(documents):
    losses = {FULL: 0.5, "naive @ 64": 3.5, "sinks + FA decode @ 64": 2.0}

    def loss(row, tail, task, at):
        if task == "facts" and row is cells.FULL and at == 0:
            return 2.0  # full attention gets those of the first document wrong
        return losses[row.key] - (1.2 if tail else 0) + (0.3 * at if row is not cells.FULL else 0)

    return Figures(results([STAGE], {1024: documents}, loss))


def test_the_excess_is_a_fraction_of_what_a_bare_window_adds(found):
    row = "sinks + FA decode @ 64"
    assert found.loss(1024, row, 0, "passages").value == pytest.approx(2.3)
    without, tail = (found.excess(1024, row, at, "passages") for at in (0, 8))
    assert without.value == pytest.approx((1.5 + 0.3) / (3 + 0.3))
    assert tail.value == pytest.approx((0.3 + 0.3) / (3 + 0.3))
    assert tail.low < tail.value < tail.high < without.low
    assert found.excess(1024, "naive @ 64", 0, "passages")[:] == pytest.approx((1, 1, 1))
    apart = found.apart(1024, (row, 8), (row, 0), "shuffled")
    assert apart[:] == pytest.approx((-1.2, -1.2, -1.2))


def test_facts_that_full_attention_gets_wrong_do_not_count(found):
    right, count, interval = found.facts(1024, "sinks + FA decode @ 64", 8)
    assert count == 2 * 3  # of two documents
    assert right == 0 and interval.low == 0 and interval.high > 0.3
    assert found.facts(1024, FULL, 0)[:2] == (6, 6)
    assert found.asked(1024, "facts") == 9


def test_pairs_count_the_window_the_sinks_and_the_tail(found):
    n, reach, tail = 1024, 80, 8
    full = n * (n + 1) / 2
    sliding = sum(min(at + 1, reach) for at in range(n))
    extra = sum(n - reach - at for at in range(tail))
    row = "sinks + FA decode @ 64"
    assert found.pairs(1024, row, 0) == pytest.approx(sliding / full, abs=1e-4)
    assert found.pairs(1024, row, tail) == pytest.approx((sliding + extra) / full, abs=1e-4)
    assert found.pairs(1024, FULL, 0) == 1
    assert found.prefill(1024, row) == 2.0


def test_the_file_has_a_line_per_cell(found):
    text = measure.dumped(found.document)
    assert json.loads(text) == json.loads(json.dumps(found.document))
    assert len(text.splitlines()) > len(found.document["cells"])


# The real model


@pytest.mark.real
@pytest.mark.native
def test_the_tail_brings_back_what_a_bare_window_loses_on_the_real_model(monkeypatch, capsys):
    short = cells.quick()
    rows = [
        dataclasses.replace(row, swaa=row.swaa and dataclasses.replace(row.swaa, window_size=128)) for row in short.rows
    ]
    monkeypatch.setattr(run, "quick", lambda: cells.Stage(1024, 1, rows[:3]))
    document = run.measure_quick(threads=1, asked=1)
    found = Figures(document)
    fast = "sinks + FA decode @ 128"
    full, naive = (found.loss(1024, row, 0, "shuffled").value for row in (FULL, "naive @ 128"))
    assert naive > full + 2
    assert found.excess(1024, fast, TAIL, "shuffled").value < 0.2
    assert found.loss(1024, fast, TAIL, "passages").value < found.loss(1024, fast, 0, "passages").value
