"""scripts/real/corpus.py and tasks.py: texts, and documents whose questions have one right answer far from the end."""

import gzip
import itertools

import pytest
from real import corpus, tasks

from support.fakes.real import TEXT, WordPrompts
from swaa_edge.errors import ConfigError

LENGTH = 1024


@pytest.fixture(scope="module")
def documents():
    return tasks.build(LENGTH, 4, WordPrompts(), {"one": TEXT[:90_000], "two": TEXT[90_000:]}, asked=3)


def places(tokens, wanted):
    return [at for at in range(len(tokens)) if tokens[at : at + len(wanted)] == wanted]


def test_what_is_asked_for_stands_once_and_beyond_every_window(documents):
    counted = dict.fromkeys(tasks.TASKS, 0)
    for document in documents:
        for question in document.questions:
            counted[question.task] += 1
            wanted = (*question.tail, *question.answer) if question.task != "facts" else question.answer[:-1]
            (at,) = places(document.tokens, wanted)
            prompt = document.case(question).prompt
            assert len(prompt) - (at + len(wanted)) >= LENGTH // 8
            assert len(document.case(question)) <= LENGTH
    assert counted == {"passages": 12, "shuffled": 12, "facts": 16}


def test_documents_fill_the_context_and_have_no_text_in_common(documents):
    assert {len(document.tokens) for document in documents} == {LENGTH - tasks.RESERVED}
    prose = [set(document.tokens[2:]) for document in documents]
    common = prose[0] & prose[2]
    assert len(common) < 40  # the words of the facts


def test_passages_of_a_document_do_not_overlap(documents):
    for document in documents:
        starts = [
            at
            for question in document.questions
            if question.task != "facts"
            for at in places(document.tokens, (*question.tail, *question.answer))
        ]
        starts.sort()
        assert all(b - a >= tasks.CUE + tasks.SCORED for a, b in itertools.pairwise(starts))


def test_only_the_value_of_a_fact_is_scored(documents):
    facts = [question for document in documents for question in document.questions if question.task == "facts"]
    assert {question.scored for question in facts} == {1}
    assert all(len(question.answer) > 3 for question in facts)


def test_the_same_texts_give_the_same_documents(documents):
    again = tasks.build(LENGTH, 4, WordPrompts(), {"one": TEXT[:90_000], "two": TEXT[90_000:]}, asked=3)
    assert tasks.digest(again) == tasks.digest(documents)
    other = tasks.build(LENGTH, 4, WordPrompts(), {"one": TEXT[9:90_000], "two": TEXT[90_000:]}, asked=3)
    assert tasks.digest(other) != tasks.digest(documents)


def test_a_text_without_seams_is_refused():
    with pytest.raises(ConfigError, match="has no room for 3 passages"):
        tasks.build(LENGTH, 1, WordPrompts(), {"one": TEXT.replace(".", "")}, asked=3)


def test_manuals_are_prose_and_each_text_counts_once(tmp_path):
    prose = "the manual says how this works " * 400
    for name, data in {
        "a/README": prose.encode(),
        "b/README.md": prose.encode(),
        "c/manual.txt.gz": gzip.compress(bytes(prose, "ascii") + bytes(range(32, 127)) * 40, 0),
        "d/table.txt": b"0x12 | 0x34 |\n" * 1000,
        "e/README": b"too short",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(data)
    first, second = corpus.manuals(tmp_path)
    assert first == prose
    assert second.startswith(prose)


def test_docstrings_come_in_the_order_of_files(tmp_path):
    text = "This function explains itself at length. " * 10
    (tmp_path / "b.py").write_text(f'"""{text}second"""')
    (tmp_path / "a.py").write_text(f'def f():\n    """{text}first"""\n\ndef g():\n    """Short."""\n')
    assert [each.split()[-1] for each in corpus.docstrings(tmp_path)] == ["first", "second"]


def test_a_fingerprint_is_of_the_text():
    assert corpus.fingerprints({"a": "x"})["a"].startswith("2d711642b726")  # sha256 of x
