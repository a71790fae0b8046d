"""Data files: what a record becomes, and the one line that each mistake gets, with its place."""

import json
import sys
from array import array

import pytest

from swaa_edge.errors import ConfigError, DataFileError
from swaa_edge.evaluate.datafile import SEEN, check_lengths, read_samples


class Words:
    """Stands for `Prompts`: a token per word, and it keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def ask(self, document, question):
        self.asked.append((document, question))
        return array("i", range(len(f"{document} {question}".split())))


@pytest.fixture
def write(tmp_path):
    def make(content, name="talks.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


GOOD = {"prompt": "a b c", "question": "why?", "answer": "x"}


def test_records_become_samples(write):
    path = write(
        '\ufeff{"prompt": "Ann owns a fox.", "question": "Who owns it?", "answer": "Ann", "kind": 3}\r\n'
        "\n"
        '{"prompt": "Ann owns a fox.", "answer": 47, "id": "q-7"}\n'
        '{"prompt": "\u00fc \u20ac", "question": "", "answer": ["x", 2, 2.5, 3.0], "id": 9}'
    )
    words = Words()
    samples = read_samples(path, words)
    assert [(s.id, s.task, s.question, s.answers, s.source) for s in samples] == [
        ("talks/1", "talks", "Who owns it?", ("Ann",), f"{path}:1"),
        ("talks/q-7", "talks", "", ("47",), f"{path}:3"),
        ("talks/9", "talks", "", ("x", "2", "2.5", "3"), f"{path}:4"),
    ]
    assert words.asked == [("Ann owns a fox.", "Who owns it?"), ("Ann owns a fox.", ""), ("\u00fc \u20ac", "")]
    assert [len(s.prompt) for s in samples] == [7, 4, 2]


def test_a_question_that_the_prompt_ends_with_is_not_asked_twice(write):
    question = "Who owns it?"
    near, far = f"{question} " + "a" * (SEEN - 1), f"{question} " + "a" * SEEN
    words = Words()
    samples = read_samples(write(lines(*({**GOOD, "prompt": p, "question": question} for p in (near, far)))), words)
    assert words.asked == [(near, ""), (far, question)]
    assert [s.question for s in samples] == [question] * 2  # a judge hears it either way


def test_the_order_is_that_of_the_file_and_a_limit_stops_before_the_rest(write):
    path = write(lines(*({**GOOD, "prompt": p} for p in "aabba")) + "{broken\n", "talks.json")
    words = Words()
    assert [s.id for s in read_samples(path, words, limit=5)] == [f"talks/{n}" for n in range(1, 6)]
    assert [document for document, _ in words.asked] == list("aabba")
    with pytest.raises(DataFileError, match=r"talks\.json:6: malformed"):
        read_samples(path, words, limit=6)
    with pytest.raises(ConfigError, match=r"^limit = 0 must be at least 1$"):
        read_samples(path, words, limit=0)


@pytest.mark.parametrize(
    "content, message",
    [
        (lines(GOOD) + ' {"prompt": "a", "answer": x}\n', ":2: malformed JSON at column 28: Expecting value"),
        (lines(GOOD) + "{\n", ":2: the object continues on the next line; write it on one line"),
        ("[[1], 2]\n", ":1: [[1], 2] must be an object with the fields prompt and answer"),
        ("\n\n" + lines({"prompt": "a"}), ":3: the field answer is missing; the record has prompt"),
        (lines({"context": "a", "answer": "b"}), ":1: the field prompt is missing; the record has context, answer"),
        (lines({"prompt": "a", "answer": None}), ":1: the field answer is null"),
        (lines({**GOOD, "prompt": ["a"]}), ":1: prompt = ['a'] must be a string"),
        (lines({**GOOD, "question": 3}), ":1: question = 3 must be a string"),
        (lines({**GOOD, "answer": True}), ":1: answer = True must be a string, a number or a list of these"),
        (lines({**GOOD, "answer": [["a"]]}), ":1: answer = ['a'] must be a string, a number or a list of these"),
        (lines({**GOOD, "answer": float("nan")}), ":1: answer = nan must be a string, a number or a list of these"),
        (lines({**GOOD, "answer": []}), ":1: answer is an empty list; give at least one answer"),
        (lines({**GOOD, "answer": ["a", " "]}), ":1: answer is empty; it must be text"),
        (lines({**GOOD, "prompt": " \n"}), ":1: prompt is empty; it must be text"),
        (lines({**GOOD, "prompt": "\ud800"}), ":1: prompt is not valid Unicode (\\ud800)"),
        (lines({**GOOD, "id": 1.5}), ":1: id = 1.5 must be a string or a whole number"),
        (lines({**GOOD, "id": 2}, GOOD), ':2: the id "talks/2" is already used in {path}:1; make it unique'),
        (b'{"prompt": "a\xe9"}\n', ":1: byte 14 is not UTF-8; save the file as UTF-8"),
        (lines(GOOD).encode("utf-16"), ":1: byte 1 is not UTF-8; save the file as UTF-8"),
        ("", " contains no samples; write one object with the fields prompt and answer per line"),
        ("\ufeff\n \n", " contains no samples; write one object with the fields prompt and answer per line"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(write, content, message):
    path = write(content)
    with pytest.raises(DataFileError) as caught:
        read_samples(path, Words())
    assert str(caught.value) == str(path) + message.replace("{path}", str(path))


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000])
def test_json_that_python_refuses_is_one_line(write, text):
    with pytest.raises(DataFileError, match=r"talks\.jsonl:1: ") as caught:
        read_samples(write(text), Words())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_files_of_other_kinds(tmp_path, write):
    for name, message in {"a.csv": "the extension .csv", "notes": "no extension"}.items():
        with pytest.raises(DataFileError) as caught:
            read_samples(write("x", name), Words())
        path = tmp_path / name
        assert (
            str(caught.value) == f"{path} has {message}; it must be .jsonl or .json (one object per line) or .parquet"
        )
    for name in ("none.jsonl", "none.parquet"):
        with pytest.raises(DataFileError) as caught:
            read_samples(tmp_path / name, Words())
        assert str(caught.value) == f"cannot read {tmp_path / name}: No such file or directory"
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataFileError, match=r"cannot read .*folder\.jsonl: Is a directory"):
        read_samples(tmp_path / "folder.jsonl", Words())


# Parquet


@pytest.fixture
def table(tmp_path):
    """table(name=values, ...): a Parquet file of these columns, 70 rows a batch so that reading takes several."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def make(types=None, **columns):
        path = tmp_path / "talks.parquet"
        made = {name: pyarrow.array(values, type=(types or {}).get(name)) for name, values in columns.items()}
        parquet.write_table(pyarrow.table(made), path)
        return path

    return make


def test_rows_become_samples(table):
    path = table(prompt=["a", "a b"], question=["who?", None], answer=[["x", "y"], ["z"]], other=[1, 2])
    words = Words()
    samples = read_samples(path, words)
    assert [(s.id, s.question, s.answers, s.source) for s in samples] == [
        ("talks/1", "who?", ("x", "y"), f"{path}: row 1"),
        ("talks/2", "", ("z",), f"{path}: row 2"),
    ]
    assert words.asked == [("a", "who?"), ("a b", "")]
    assert [s.answers for s in read_samples(table(prompt=["a"] * 2, answer=[7.0, 0.5]), words)] == [("7",), ("0.5",)]


def test_rows_are_counted_over_the_whole_file(table):
    path = table(prompt=["a"] * 150, answer=["x"] * 149 + [None])
    assert len(read_samples(path, Words(), limit=149)) == 149
    with pytest.raises(DataFileError) as caught:
        read_samples(path, Words())
    assert str(caught.value) == f"{path}: row 150: the field answer is null"


def test_mistakes_in_a_table(table, write, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    path = table(context=["a"], answer=["x"])
    with pytest.raises(DataFileError) as caught:
        read_samples(path, Words())
    assert str(caught.value) == f"{path} has no column prompt; its columns: context, answer"
    with pytest.raises(DataFileError) as caught:
        read_samples(table(prompt=[b"a"], answer=["x"]), Words())
    assert str(caught.value) == f"{path}: row 1: prompt = b'a' must be a string"
    bad = pyarrow.array([b"a", b"\xff"]).cast(pyarrow.string(), safe=False)
    with pytest.raises(DataFileError) as caught:
        read_samples(table(prompt=bad, answer=["x", "y"]), Words())
    assert str(caught.value) == f"{path}: row 2: prompt is not UTF-8"
    for content in (b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", path.read_bytes()[:-20]):
        with pytest.raises(DataFileError, match=r"talks\.parquet") as caught:
            read_samples(write(content, "talks.parquet"), Words())
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError) as caught:
        read_samples(path, Words())
    assert str(caught.value) == "a Parquet file needs pyarrow; pip install 'swaa-edge[parquet]'"


# Lengths


def test_a_prompt_that_does_not_fit_is_named(write):
    prompts = [" ".join("a" * count) for count in (5, 7, 6, 9)]
    path = write(lines(*({"prompt": prompt, "answer": "x", "id": f"p{len(prompt)}"} for prompt in prompts)))
    samples = read_samples(path, Words())
    assert check_lengths(samples, 11, 2) == samples
    with pytest.raises(DataFileError) as caught:
        check_lengths(samples, 8, 2)
    assert str(caught.value) == (
        f"{path}:2: a prompt of 7 tokens and 2 for the answer don't fit the context of 8; raise --ctx to 9 if the "
        "model allows it, or shorten the prompt, or skip such samples (2 of 4) with --skip-long"
    )
    assert [s.id for s in check_lengths(samples, 8, 2, skip_long=True)] == ["talks/p9", "talks/p11"]
    with pytest.raises(DataFileError) as caught:
        check_lengths(samples, 6, 2, skip_long=True)
    assert str(caught.value) == (
        f"no sample fits the context of 6 tokens; {path}:1 needs 7; raise --ctx to 7 if the model allows it, or "
        "shorten the prompt"
    )


@pytest.mark.native
def test_with_a_real_vocabulary_and_chat_template(gguf_model, write):
    from swaa_edge.generate.prompts import Prompts

    with Prompts(gguf_model("qwen3", layers=4)) as prompts:
        path = write(lines({"prompt": "Ann owns a fox.", "question": "Who?", "answer": "Ann"}))
        (sample,) = read_samples(path, prompts)
        assert sample.prompt == prompts.ask("Ann owns a fox.", "Who?") and len(sample.prompt) > 4
