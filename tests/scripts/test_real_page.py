"""docs/results-real.md: written from its data, and its sentences follow the figures."""

import json

import pytest
from real import cells, measure, tasks
from real.page import page, quick_table

from support.fakes.real import TEXT, WordPrompts, results

CHOSEN = {"quarter greedy": [0, 1], "quarter nll": [2, 3], "half greedy": [4, 5], "half nll": [6, 7]}


def made(loss=None, length=2048, stages=None):
    documents = {length: tasks.build(length, 3, WordPrompts(), {"python": TEXT}, asked=2)}
    plan = [*cells.first_stages(), cells.Stage(2048, 3, cells.tuned()), *cells.later_stages(CHOSEN)]
    stages = stages or [stage for stage in plan if stage.length == length]
    document = results(stages, documents, loss or usual)
    calibration = {name: {"layers": layers, "loss": 0.5} for name, layers in CHOSEN.items()}
    texts = [{"row": row.key, "kl": 0.25, "kl_error": 0.01} for row in cells.texts_of(length, CHOSEN)]
    training = {"settings": {"lora_rank": 16, "epochs": 2.0}, "data": {"examples": 43}, "steps": 44}
    lora = {row.adapter: training for row in cells.tuned()}
    return document | {"calibration": calibration, "perplexity": {str(length): texts}, "lora": lora, "complete": True}


def usual(row, tail, task, at):
    """Sinks bring little, FA decode half, FA layers more, the tail the rest."""
    if row is cells.FULL:
        return 0.5
    swaa = row.swaa
    rest = 3 - 0.1 * bool(swaa.sink_count) - 1.5 * bool(swaa.fa_decode) - 0.4 * (swaa.fa_layers != "none")
    return 0.5 + rest * (0.2 if tail > 16 and swaa.fa_decode else 1) + 0.05 * at


def test_the_page_is_what_its_data_give():
    measure.check()


def test_a_page_of_the_first_rows_only():
    document = made(stages=cells.first_stages()[:1]) | {"calibration": {}, "perplexity": {}, "complete": False}
    assert "Not measured yet." in page(document) and "sinks + 0:8 + FA decode" in page(document)
    assert "Some rows of the plan are not measured yet." in page(document)


@pytest.mark.parametrize(("threads", "said"), [([1], "(1 thread)"), ([2], "(2 threads)"), ([1, 2], "(1 or 2 threads)")])
def test_the_page_names_the_threads_of_the_measurements(threads, said):
    assert said in page(made() | {"threads": threads})


def test_a_page_is_written_from_any_rows():
    """An interrupted run can end after any row; an adapter's row can come before the same row without the adapter."""
    rows = [*cells.first_stages()[0].rows, *cells.tuned(), *cells.others(2048, CHOSEN)]
    for count in (1, 2, 3, 5, len(cells.first_stages()[0].rows) + 3, len(rows) - 5):
        text = page(made(stages=[cells.Stage(2048, 3, rows[:count])]) | {"complete": False})
        assert ("| full |" in text) is (count > 1), "full attention needs a bare window beside it"


def test_a_stale_page_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "DATA", tmp_path / "real.json")
    monkeypatch.setattr(measure, "PAGE", tmp_path / "real.md")
    document = made()
    measure.DATA.write_text(measure.dumped(document), encoding="utf-8")
    assert measure.main(["--write"]) == 0
    assert measure.main(["--check"]) == 0
    document["cells"][0]["nll"][0][0] += 50
    measure.DATA.write_text(measure.dumped(document), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"docs/results-real.md is stale: scripts/real/measure.py --write"):
        measure.main(["--check"])


def test_every_cell_is_a_line_of_the_page():
    document = made()
    lines = page(document).splitlines()
    for row in document["rows"]:
        mine = [line for line in lines if line.startswith((f"| {row['config']} |", f"| {row['config']} (`"))]
        assert len(mine) >= len(row["pairs"]), row["row"]


def test_full_attention_has_no_excess_and_the_bare_window_all_of_it():
    lines = page(made()).splitlines()
    full = next(line for line in lines if line.startswith("| full |"))
    naive = next(line for line in lines if line.startswith("| naive |"))
    assert "| 0.50 ± 0.00 | 0% |" in full
    assert "| 100.0% [100.0, 100.0] |" in naive
    assert "0.250 ± 0.010" in naive and "0.250" not in full


def test_the_summary_names_the_best_configuration_and_each_strategy_alone():
    text = " ".join(page(made()).split())
    # 3 - 0.1 - 1.5 - 0.4 = 1, a fifth of it with the tail, and 0.05 on average for the document, of 3.05.
    assert "sinks + 1::4 + FA decode with T = 128 leaves the least of this increase, 8% [7, 10]" in text
    assert "sinks leaves 97%" in text and "FA decode leaves 51%" in text
    assert "FA decode with a tail of 128 leaves 11%" in text


@pytest.mark.parametrize(
    ("change", "verdict"), [(-0.2, "better than"), (0.2, "worse than"), (0, "neither better nor worse than")]
)
def test_the_verdict_on_calibrate_follows_the_interval(change, verdict):
    def loss(row, tail, task, at):
        return usual(row, tail, task, at) + (change if row.name == "calibrated quarter greedy" else 0)

    text = " ".join(page(made(loss)).split())
    assert f"the greedy quarter of the layers is {verdict} the periodic quarter" in text


def test_an_adapter_stands_beside_the_same_row_without_it():
    def loss(row, tail, task, at):
        return usual(row, tail, task, at) - 0.25 * (row.adapter == "fast-128")

    text = page(made(loss))
    section = text.partition("## What LoRA adds")[2].partition("## Reproduce it")[0]
    lines = [line for line in section.splitlines() if line.startswith("| sinks")]
    assert [line.split(" | ")[:2] for line in lines] == [
        [f"| sinks{layers} + FA decode{lora}", str(tail)]
        for layers, tail in (("", 128), ("", 0), (" + 1::4", 128))
        for lora in (" + LoRA", "")
    ]
    words = " ".join(section.split())
    assert "sinks + FA decode with T = 128 changes the loss on far passages by -0.250 nats per token [-0.250" in words
    assert "sinks + FA decode with T = 0 changes the loss on far passages by +0.000" in words
    assert "43 conversations about shorter documents in 2 epochs, 44 optimizer steps each" in words
    summary = " ".join(text.partition("## 2,048 tokens")[0].split())
    assert "LoRA with T" not in summary, "the best configuration is one without training"


def test_the_quick_table():
    stage = cells.quick()
    document = made(stages=[stage])
    lines = quick_table(json.loads(json.dumps(document))).splitlines()
    assert lines[0] == "SmolLM2-135M-Instruct, 2,048 tokens, window 256"
    words = [" ".join(line.split()) for line in lines]
    assert words[2] == "configuration T passages excess shuffled excess facts prefill"
    assert words[3] == "full - 0.50 0% 0.50 0% 9/9 1.00x"
    assert words[4] == "naive - 3.55 100% 3.55 100% 0/9 2.00x"
    assert [" ".join(line.split()[:-6]) for line in lines[5:8]] == [
        "sinks + FA decode 0",
        "sinks + FA decode 128",
        "sinks + 1::4 + FA decode 128",
    ]
