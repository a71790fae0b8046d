"""Collecting responses: which ones are kept, and that an interrupted run gives the same as an undisturbed one."""

from array import array

import pytest

from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.evaluate.samples import Sample
from swaa_edge.evaluate.scoring import SCORERS, contains
from swaa_edge.finetune.answerers import Response
from swaa_edge.finetune.responses import collect, seed_of
from swaa_edge.finetune.settings import DistillSettings
from swaa_edge.support.journal import Journal


def record(name, answer="47", question="Which?"):
    prompt = array("i", list(name.encode()))
    return Sample(f"own/{name}", "own", prompt, (answer,), question, document=f"The text of {name}.", name=name)


class Script:
    """An `Answerer` with scripted responses for each record, in order; None is a truncated one.

    stop: (number of the response, exception to raise instead of it).
    """

    def __init__(self, texts, stop=None):
        self._texts, self._stop = texts, stop
        self.asked, self.open = [], 0

    def load(self, n_ctx):
        self.n_ctx = n_ctx
        self.open += 1
        return self

    def answer(self, prompt, seed):
        if self._stop and self._stop[0] == len(self.asked):
            raise self._stop[1]
        name = bytes(list(prompt)).decode()
        # The seed must tell which response this is: a model gets nothing else.
        number = next(number for number in range(99) if seed == seed_of(0, name, number))
        self.asked.append((name, number))
        text = self._texts[name][number]
        return Response("It is 47 but" if text is None else text, text is not None, 3)

    def close(self):
        self.open -= 1


TEXTS = {"a": ["no", " It is 47. ", "47"], "b": ["47", "x", "y"], "c": ["46", None, "no"]}
RECORDS = [record("a"), record("b", question=""), record("c")]


#: The settings of a judge.
NAMED = {"judge": "http://localhost/v1", "judge_model": "judge"}


def ask(script, records=RECORDS, is_correct=contains, journal=None, on_progress=None, **settings):
    chosen = DistillSettings(**{"samples": 3, "max_tokens": 99} | settings)
    result = collect(script.load, records, is_correct, chosen, journal=journal, on_progress=on_progress)
    assert script.open == 0
    return result


def test_the_first_correct_response_to_a_record_is_kept():
    script = Script(TEXTS)
    result = ask(script)
    assert result.lines == [
        {
            "id": "a",
            "sample": 1,
            "prompt": "The text of a.",
            "question": "Which?",
            "answer": " It is 47. ",
            "reference": ["47"],
        },
        {"id": "b", "sample": 0, "prompt": "The text of b.", "answer": "47", "reference": ["47"]},
    ]
    assert result.to_dict() == {
        "records": 3,
        "kept": 2,
        "without_correct": 1,
        "responses": 6,
        "incorrect": 3,
        "truncated": 1,
        "duplicates": 0,
        "stopped": None,
    }
    assert script.asked == [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1), ("c", 2)] and script.n_ctx == 1 + 99


def test_several_responses_per_record_without_duplicates():
    texts = {"a": ["47", " 47\n", "It is 47.", "So 47."], "b": ["47", "46", "46", "46"]}
    script = Script(texts)
    # The second record asks the same as the first, and gets the same responses.
    result = ask(script, [record("a"), record("a"), record("b")], samples=4, keep=2)
    assert [(line["id"], line["sample"], line["answer"]) for line in result.lines] == [
        ("a", 0, "47"),
        ("a", 2, "It is 47."),
        ("a", 3, "So 47."),
        ("b", 0, "47"),
    ]
    assert (result.duplicates, result.without_correct, result.responses, result.incorrect) == (4, 0, 11, 3)
    # A record whose correct responses all are duplicates is not one without a correct response.
    assert ask(Script(texts), [record("a"), record("a")], samples=1).to_dict()["without_correct"] == 0


def test_truncated_and_empty_responses_are_never_kept():
    texts = {"a": [None, "", " \n", "<think>47, surely.</think>\n", "<think>No?</think> Yes."]}
    result = ask(Script(texts), [record("a", ".*")], SCORERS["regex"], samples=5)
    assert [line["answer"] for line in result.lines] == ["<think>No?</think> Yes."], "the reasoning stays"
    assert (result.truncated, result.incorrect) == (1, 3)


def test_each_response_has_its_own_seed():
    seeds = [seed_of(seed, name, number) for seed in (0, 1) for name in ("a", "b", "1") for number in range(50)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 - 1 for seed in seeds)
    # Fixed: data that was written once must be reproducible.
    assert [seed_of(0, "a", 0), seed_of(7, "q-1", 3)] == [2560330932, 3638274624]


@pytest.mark.parametrize("at", range(6))
def test_an_interrupted_run_resumes(tmp_path, at):
    whole = ask(Script(TEXTS))
    first = Script(TEXTS, (at, KeyboardInterrupt()))
    with Journal(tmp_path / "journal", {}) as journal:
        result = ask(first, journal=journal)
    assert result.stopped == "interrupted" and result.responses == at
    second = Script(TEXTS)
    with Journal(tmp_path / "journal", {}) as journal:
        again = ask(second, journal=journal)
    assert again == whole and len(first.asked) == at and len(second.asked) == 6 - at
    third = Script(TEXTS)
    with Journal(tmp_path / "journal", {}) as journal:
        assert ask(third, journal=journal) == whole
    assert third.asked == [] and not hasattr(third, "n_ctx"), "nothing is missing, so nothing is loaded"


def test_a_run_resumes_with_other_numbers_and_another_scorer():
    journal = Journal(None, {})
    ask(Script(TEXTS), RECORDS[:1], journal=journal, scorer="contains")
    script, calls = Script(TEXTS), []

    def judge(sample, response):
        calls.append((sample.name, response))
        return "47" in response

    result = ask(script, RECORDS, judge, journal=journal, keep=2, **NAMED)
    assert script.asked == [("a", 2), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("c", 2)]
    assert [line["sample"] for line in result.lines] == [1, 2, 0]
    # The new judge scores the old responses, once.
    assert len(calls) == len(set(calls)) == 8
    again = Script(TEXTS)
    assert ask(again, RECORDS, judge, journal=journal, keep=2, **NAMED) == result
    assert again.asked == [] and len(calls) == 8


def test_a_changed_record_is_asked_again():
    journal = Journal(None, {})
    ask(Script(TEXTS), journal=journal)
    script = Script(TEXTS)
    ask(script, [record("a"), record("b", "46", question="")], journal=journal)
    assert script.asked == [("b", 0), ("b", 1), ("b", 2)]


def test_an_error_keeps_the_responses_so_far():
    result = ask(Script(TEXTS, (3, GenerationError("no memory"))))
    assert str(result.stopped) == "no memory" and len(result.lines) == 2
    assert result.to_dict()["stopped"] == "no memory"
    with pytest.raises(GenerationError, match="no memory"):
        ask(Script(TEXTS, (0, GenerationError("no memory"))))


def test_progress():
    seen = []
    ask(Script(TEXTS), on_progress=seen.append)
    assert [at.done for at in seen] == pytest.approx([0, 1 / 3, 1, 2, 2 + 1 / 3, 2 + 2 / 3])
    assert [at.text for at in seen] == [
        "0/3 records, 0 kept",
        "0/3 records, 0 kept",
        "1/3 records, 1 kept",
        "2/3 records, 2 kept",
        "2/3 records, 2 kept",
        "2/3 records, 2 kept",
    ]
    assert {at.total for at in seen} == {3}


def test_numbers_out_of_range():
    for more in ({"keep": 0}, {"keep": 4}, {"samples": 0}):
        with pytest.raises(ConfigError, match="keep = "):
            ask(Script(TEXTS), **more)
    with pytest.raises(ConfigError, match="nothing to ask"):
        ask(Script(TEXTS), [])
