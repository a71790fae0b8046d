"""Asking and keeping: equal questions for all configurations, resumed journals, interrupts, errors; a fake engine."""

import contextlib
import json

import pytest

from support.fakes.evaluate import WORDS, Reader, fake_prompts, forget_runs
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.evaluate.run import evaluate
from swaa_edge.evaluate.tasks import TaskSettings, build
from swaa_edge.support.journal import Journal

PROSE = " ".join(f"Line {n} says {'nothing ' * (n % 7)}here." for n in range(200))
CONFIGS = {"full": False, "naive": SwaaConfig(60), "decode": SwaaConfig(60, 4, fa_decode=True)}
LENGTH, ANSWER = 200, 8


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    forget_runs(monkeypatch)


@pytest.fixture(scope="module")
def prompts():
    return fake_prompts(WORDS, "chat")


@pytest.fixture(scope="module")
def samples(prompts):
    settings = TaskSettings(("needle", "chain"), (LENGTH,), samples=4, beyond=80, haystack=PROSE)
    return build(settings, prompts)


@pytest.fixture
def run(prompts, samples):
    def go(**changed):
        arguments = {"max_tokens": ANSWER} | changed
        configs = arguments.pop("configs", CONFIGS)
        return evaluate(lambda config, n_ctx: Reader(prompts, config, n_ctx), configs, samples, **arguments)

    return go


def answered(report):
    """The answers without times, which depend on the cache."""
    return {(r["config"], r["sample"]): (r["reply"], r["correct"], r["prompt_tokens"]) for r in report.records}


def test_all_are_asked_the_same_and_what_a_window_hides_is_not_found(run, samples):
    report = run()
    assert report.stopped is None and Reader.open == 0
    questions = [s.question for s in samples]
    for config in CONFIGS.values():
        assert [q.split("<")[0] for c, q in Reader.asked if c == config] == questions
    assert Reader.loaded == tuple((config, LENGTH + ANSWER) for config in CONFIGS.values())
    assert {row["config"]: row["accuracy"] for row in report.rows()} == {"full": 1.0, "naive": 0.0, "decode": 0.5}
    correct = {r["sample"].rpartition("/")[2] for r in report.of("decode") if r["correct"]}
    assert correct == {"spoken"}
    first = report.of("naive")[0]
    assert first == {
        "config": "naive",
        "sample": samples[0].id,
        "reply": " I don't know.",
        "correct": False,
        "prompt_tokens": LENGTH,
        "reused_tokens": 0,
        "prefill_seconds": LENGTH / 2000,
        "generated_tokens": 5,
        "decode_seconds": 0.5,
    }
    # The second question about a document finds most of it in the cache; the ratio is made of the first ones.
    assert [r["reused_tokens"] > 100 for r in report.of("full")] == [False, True] * 4
    assert [row["prefill_ratio"] for row in report.rows()] == [1.0, 2.0, 2.0]


def test_no_prompt_reuses_the_tail_of_another(run):
    # The second question about a document shares more than the prompt without its tail.
    shared = [r["reused_tokens"] for r in run(configs={"full": False}).of("full")][1::2]
    tail = LENGTH - min(shared) // 2
    config = SwaaConfig(60, 4, fa_decode=True, tail_count=tail)
    assert [r["reused_tokens"] for r in run(configs={"tail": config}).of("tail")][1::2] == [LENGTH - tail] * 4


def test_together_and_apart_give_the_same_answers(run, samples):
    apart, order = run(), [c for c, _ in Reader.asked]
    assert order == [config for config in CONFIGS.values() for _ in samples]
    Reader.asked, Reader.loaded = (), ()
    together = run(together=True)
    assert [c for c, _ in Reader.asked] == list(CONFIGS.values()) * len(samples)
    assert len(Reader.loaded) == 3 and Reader.open == 0
    assert answered(together) == answered(apart) and together.rows() == apart.rows()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), GenerationError("out of memory")])
def test_an_interrupted_run_resumes(run, samples, tmp_path, together, stop):
    whole = answered(run())
    forget = len(Reader.asked)
    file = tmp_path / "journal"
    Reader.fail_at = (forget + 10, stop)
    with Journal(file, {"a": 1}) as journal:
        report = run(journal=journal, together=together)
        assert report.stopped == ("interrupted" if isinstance(stop, KeyboardInterrupt) else stop)
        assert len(report.records) == 10 and Reader.open == 0
        assert report.to_dict()["stopped"] == ("interrupted" if report.stopped == "interrupted" else "out of memory")
        # Every answer is in the file before that is closed.
        assert len(file.read_text().splitlines()) == 11
    Reader.fail_at = None
    before = len(Reader.asked)
    with Journal(file, {"a": 1}) as journal:
        report = run(journal=journal, together=together)
    assert len(Reader.asked) - before == 24 - 10 and report.stopped is None
    assert answered(report) == whole and len(report.records) == 24
    # A complete run loads no model.
    loaded = len(Reader.loaded)
    with Journal(file, {"a": 1}) as journal:
        assert answered(run(journal=journal)) == whole and len(Reader.loaded) == loaded


def test_an_interrupt_while_a_sample_is_scored_or_kept_loses_that_one_at_most(run, tmp_path):
    def scorer(sample, response):
        if len(Reader.asked) == 3:
            raise KeyboardInterrupt
        return True

    with Journal(tmp_path / "j", {}) as journal:
        assert len(run(journal=journal, scorer=scorer).records) == 2
    with Journal(tmp_path / "j", {}) as journal:
        assert len(journal.records) == 2


def test_an_error_before_the_first_answer_is_raised(run, samples):
    Reader.fail_at = (0, GenerationError("out of memory"))
    with pytest.raises(GenerationError, match="out of memory"):
        run()
    assert Reader.open == 0
    for configs, asked in (({}, samples), (CONFIGS, [])):
        with pytest.raises(ConfigError, match="nothing to evaluate"):
            evaluate(None, configs, asked)


def test_the_engine_is_held_and_progress_reported(run, monkeypatch):
    held, seen = [], []

    @contextlib.contextmanager
    def using(llm):
        held.append(llm._config)
        yield

    monkeypatch.setattr("swaa_edge.evaluate.run.interruptible", using)
    run(on_progress=seen.append, configs={"full": False, "a": CONFIGS["naive"]})
    # Once to warm up, and once per question.
    assert held == [False] * 9 + [CONFIGS["naive"]] * 9
    assert [(at.done, at.total, at.text) for at in seen] == [
        ((n + first + more) * LENGTH, 16 * LENGTH, f"{n + first + more}/16 {name}")
        for name, first in (("full", 0), ("a", 8))
        for n in range(8)
        for more in (0, 1)
    ]
    # A resumed run starts from the work that is done.
    journal, seen[:] = Journal(None, {}), []
    Reader.fail_at = (len(Reader.asked) + 3, KeyboardInterrupt())
    run(journal=journal)
    Reader.fail_at = None
    run(journal=journal, on_progress=seen.append)
    assert (seen[0].done, seen[0].text) == (3 * LENGTH, "3/24 full") and seen[-1].done == seen[-1].total


def test_records_are_plain_json(run, tmp_path):
    with Journal(tmp_path / "j", {}) as journal:
        report = run(journal=journal)
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()[1:]]
    assert lines == report.records
