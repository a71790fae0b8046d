"""distill: which replies are kept, and that a run goes on as if it had not stopped."""

from array import array

import pytest

from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.evaluate.datafile import FileSample
from swaa_edge.evaluate.scoring import SCORERS, contains
from swaa_edge.finetune.answerers import Answer, reusable
from swaa_edge.finetune.distill import distill, seed_of
from swaa_edge.support.journal import Journal

SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 40}


def record(name, answer="47", question="Which?"):
    prompt = array("i", list(name.encode()))
    return FileSample(f"own/{name}", "own", prompt, (answer,), question, document=f"The text of {name}.", name=name)


class Script:
    """An `Answerer` that says what is written for a record, one reply after the other; None is one that is cut off.

    stop: (number of the answer, exception) to raise instead of it.
    """

    def __init__(self, said, stop=None):
        self._said, self._stop = said, stop
        self.asked, self.open = [], 0

    def load(self, n_ctx):
        self.n_ctx = n_ctx
        self.open += 1
        return self

    def answer(self, prompt, seed):
        if self._stop and self._stop[0] == len(self.asked):
            raise self._stop[1]
        name = bytes(list(prompt)).decode()
        # Which reply this is must be known by the seed, as a model knows nothing else.
        number = next(number for number in range(99) if seed == seed_of(0, name, number))
        self.asked.append((name, number))
        text = self._said[name][number]
        return Answer("It is 47 but" if text is None else text, text is not None, 3)

    def close(self):
        self.open -= 1


SAID = {"a": ["no", " It is 47. ", "47"], "b": ["47", "x", "y"], "c": ["46", None, "no"]}
RECORDS = [record("a"), record("b", question=""), record("c")]


def ask(script, records=RECORDS, scorer=contains, **more):
    result = distill(script.load, records, scorer, n_ctx=100, **{"samples": 3} | more)
    assert script.open == 0
    return result


def test_the_first_right_reply_of_a_record_is_kept():
    script = Script(SAID)
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
        "without": 1,
        "replies": 6,
        "wrong": 3,
        "cut_off": 1,
        "duplicates": 0,
        "stopped": None,
    }
    assert script.asked == [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1), ("c", 2)] and script.n_ctx == 100


def test_more_replies_than_one_and_no_reply_twice():
    said = {"a": ["47", " 47\n", "It is 47.", "So 47."], "b": ["47", "46", "46", "46"]}
    script = Script(said)
    # The second of these asks the same as the first, and gets the same reply.
    result = ask(script, [record("a"), record("a"), record("b")], samples=4, keep=2)
    assert [(line["id"], line["sample"], line["answer"]) for line in result.lines] == [
        ("a", 0, "47"),
        ("a", 2, "It is 47."),
        ("a", 3, "So 47."),
        ("b", 0, "47"),
    ]
    assert (result.duplicates, result.without, result.asked, result.wrong) == (4, 0, 11, 3)
    # All of a record's replies are another's already: it is not one without a right reply.
    assert ask(Script(said), [record("a"), record("a")], samples=1).to_dict()["without"] == 0


def test_a_reply_without_an_end_or_without_an_answer_is_never_kept():
    said = {"a": [None, "", " \n", "<think>47, surely.</think>\n", "<think>No?</think> Yes."]}
    result = ask(Script(said), [record("a", ".*")], SCORERS["regex"], samples=5)
    assert [line["answer"] for line in result.lines] == ["<think>No?</think> Yes."], "the thinking stays"
    assert (result.cut_off, result.wrong) == (1, 3)


def test_each_reply_has_a_seed_of_its_own():
    seeds = [seed_of(seed, name, number) for seed in (0, 1) for name in ("a", "b", "1") for number in range(50)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 - 1 for seed in seeds)
    # What was written once must come out again.
    assert [seed_of(0, "a", 0), seed_of(7, "q-1", 3)] == [2560330932, 3638274624]


@pytest.mark.parametrize("at", range(6))
def test_a_run_that_was_interrupted_goes_on(tmp_path, at):
    whole = ask(Script(SAID))
    first = Script(SAID, (at, KeyboardInterrupt()))
    with Journal(tmp_path / "journal", {}) as journal:
        result = ask(first, journal=journal)
    assert result.stopped == "interrupted" and result.asked == at
    second = Script(SAID)
    with Journal(tmp_path / "journal", {}) as journal:
        again = ask(second, journal=journal)
    assert again == whole and len(first.asked) == at and len(second.asked) == 6 - at
    third = Script(SAID)
    with Journal(tmp_path / "journal", {}) as journal:
        assert ask(third, journal=journal) == whole
    assert third.asked == [] and not hasattr(third, "n_ctx"), "nothing is left, so nothing is loaded"


def test_a_run_goes_on_with_other_numbers_and_another_scorer():
    journal = Journal(None, {})
    ask(Script(SAID), RECORDS[:1], journal=journal, scored_by="contains")
    script, calls = Script(SAID), []

    def judge(sample, reply):
        calls.append((sample.name, reply))
        return "47" in reply

    result = ask(script, scorer=judge, journal=journal, scored_by="judge", keep=2)
    assert script.asked == [("a", 2), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("c", 2)]
    assert [line["sample"] for line in result.lines] == [1, 2, 0]
    # The new judge says what it thinks of the old replies, once.
    assert len(calls) == len(set(calls)) == 8
    again = Script(SAID)
    assert ask(again, scorer=judge, journal=journal, scored_by="judge", keep=2) == result
    assert again.asked == [] and len(calls) == 8


def test_a_record_that_was_changed_is_asked_again():
    journal = Journal(None, {})
    ask(Script(SAID), journal=journal)
    script = Script(SAID)
    ask(script, [record("a"), record("b", "46", question="")], journal=journal)
    assert script.asked == [("b", 0), ("b", 1), ("b", 2)]


def test_an_error_keeps_what_is_in():
    result = ask(Script(SAID, (3, GenerationError("no memory"))))
    assert str(result.stopped) == "no memory" and len(result.lines) == 2
    assert result.to_dict()["stopped"] == "no memory"
    with pytest.raises(GenerationError, match="no memory"):
        ask(Script(SAID, (0, GenerationError("no memory"))))


def test_progress():
    told = []
    ask(Script(SAID), on_progress=told.append)
    assert [(at.done, at.kept, at.sample) for at in told] == [
        (0, 0, 0),
        (0, 0, 1),
        (1, 1, 0),
        (2, 2, 0),
        (2, 2, 1),
        (2, 2, 2),
    ]
    assert {at.total for at in told} == {3}
    assert [at.seconds_left is None for at in told] == [True, True, False, False, False, False]


def test_numbers_that_make_no_sense():
    for more in ({"keep": 0}, {"keep": 4}, {"samples": 0}):
        with pytest.raises(ConfigError, match="keep = "):
            ask(Script(SAID), **more)
    with pytest.raises(ConfigError, match="nothing to ask"):
        ask(Script(SAID), [])


def test_what_of_a_prompt_is_not_read_again():
    before = list(range(100))
    assert reusable(None, before, 8) == 0
    assert reusable(before, before, 8) == 96
    assert reusable(before, before[:97], 8) == 96
    assert reusable(before, before[:96], 8) == 88, "its last token is computed by itself"
    assert reusable(before[:96], before, 8) == 88, "so was the last of those before"
    assert reusable(before, [*before[:41], -1, *before[42:]], 8) == 40
    assert reusable(before, [-1, *before[1:]], 8) == 0
