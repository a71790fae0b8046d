"""Journals: the file's bytes, what is resumed, what is refused, and where the file lies."""

import os

import pytest

from swaa_edge.errors import OutputError
from swaa_edge.support.journal import Journal, digest, open_journal

RUN = digest({"seed": 1})
HEAD = f'{{"swaa_edge_journal": "eval", "run": "{RUN}"}}\n'


def test_the_file_is_a_head_and_a_line_per_record(tmp_path):
    file = tmp_path / "j"
    strange = {"config": "a", "sample": "x", "reply": "fünf\u2028\x85\x0b\x1c \U0001f98a\n"}
    with Journal(file, {"seed": 1}) as journal:
        assert journal.records == []
        journal.add(strange)
        assert file.read_text(encoding="utf-8").count("\n") == 2 and file.read_text().startswith(HEAD)
        journal.add({"config": "b"})
    with Journal(file, {"seed": 1}) as journal:
        assert journal.records == [strange, {"config": "b"}]
    assert len(digest({})) == 16 and digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_an_unfinished_last_line_is_dropped_and_overwritten(tmp_path):
    file = tmp_path / "j"
    one, two = '{"config": "a", "n": 1}\n', '{"config": "ü", "n": 2}\n'
    for cut in range(1, len(two.encode())):
        file.write_bytes((HEAD + one).encode() + two.encode()[:cut])
        with Journal(file, {"seed": 1}) as journal:
            assert journal.records == [{"config": "a", "n": 1}]
            journal.add({"config": "c"})
        assert file.read_text(encoding="utf-8") == HEAD + one + '{"config": "c"}\n'
    for cut in range(len(HEAD)):
        file.write_text(HEAD[:cut])
        with Journal(file, {"seed": 1}) as journal:
            assert journal.records == []
        assert file.read_text() == HEAD


@pytest.mark.parametrize(
    "content, error",
    [
        (HEAD.replace(RUN, digest({"seed": 2})), "is the journal of another run (the model, samples or settings"),
        (HEAD + '{"config": "a"\n{"config": "b"}\n', "is not a journal of swaa-edge eval (Expecting ',' delimiter"),
        (HEAD + "\n" + '{"config": "b"}\n', "is not a journal of swaa-edge eval (Expecting value"),
        (HEAD + "7\n", ":2 is not a journal entry"),
        ('{"config": "a"}\n', "is not a journal of swaa-edge eval; choose another file"),
        ("7\n", "is not a journal of swaa-edge eval; choose another file"),
        ("my notes, on one line without an end", "is not a journal of swaa-edge eval; choose another file"),
        ("{}", "is not a journal of swaa-edge eval; choose another file"),
        (b"\xff\xfe\n", "is not a journal of swaa-edge eval ('utf-8' codec can't decode"),
    ],
)
def test_other_files_are_refused_and_kept(tmp_path, content, error):
    file = tmp_path / "j"
    content = content if isinstance(content, bytes) else content.encode()
    file.write_bytes(content)
    with pytest.raises(OutputError) as caught:
        Journal(file, {"seed": 1})
    error = str(file) + ("" if error[0] == ":" else " ") + error
    assert str(caught.value).startswith(error) and str(caught.value).endswith("; choose another file")
    assert file.read_bytes() == content


def test_a_folder_that_is_missing_and_a_journal_in_memory(tmp_path):
    with pytest.raises(OutputError, match=r"^cannot keep the results in .*/none/j: No such file or directory$"):
        Journal(tmp_path / "none" / "j", {})
    journal = Journal(None, {"a": 1})
    journal.add({"config": "a"})
    assert journal.records == [{"config": "a"}] and list(tmp_path.iterdir()) == []
    journal.close()


def test_a_disk_that_fills_up_is_one_line(tmp_path):
    with Journal(tmp_path / "j", {}) as journal:
        inner = journal._file

        class Full:
            def write(self, text):
                raise OSError(28, "No space left on device")

            close = inner.close

        journal._file = Full()
        with pytest.raises(OutputError, match=r"^cannot keep the results in .*/j: No space left on device$"):
            journal.add({"config": "a"})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "swaa-edge"


@pytest.mark.skipif(os.name != "posix" or os.uname().sysname == "Darwin", reason="the cache folder of Linux")
def test_a_journal_lies_in_the_cache_until_the_run_is_complete(cache):
    for expected in ([], [{"a": 1}]):
        with open_journal("calibrate", {"seed": 1}, None, fresh=False) as journal:
            assert journal.path == cache / f"calibrate-{digest({'seed': 1})}.jsonl"
            assert journal.records == expected
            journal.add({"a": 1})
    with open_journal("calibrate", {"seed": 1}, None, fresh=True) as journal:
        assert journal.records == []
        journal.discard()
    assert list(cache.iterdir()) == []


def test_a_file_that_the_user_names_stays(cache, tmp_path):
    file = tmp_path / "mine"
    with open_journal("eval", {}, str(file), fresh=False) as journal:
        journal.add({"a": 1})
        journal.discard()
    assert file.read_text().count("\n") == 2 and not cache.exists()
    assert open_journal("eval", {}, str(file), fresh=False).records == [{"a": 1}]
    assert open_journal("eval", {}, str(file), fresh=True).records == []


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("content", ["mine", "mine\n", HEAD])
def test_what_is_not_a_journal_of_the_command_is_refused_even_by_fresh(tmp_path, fresh, content):
    notes = tmp_path / "notes.txt"
    notes.write_text(content)
    with pytest.raises(OutputError) as caught:
        open_journal("calibrate", {"seed": 1}, str(notes), fresh)
    error = str(caught.value)
    assert error.startswith(f"{notes} is not a journal of swaa-edge calibrate") and error.endswith(
        "; choose another file"
    )
    assert (", so --fresh keeps it" in error) == fresh
    assert notes.read_text() == content


def test_without_a_cache_folder_the_journal_is_in_memory(cache):
    cache.parent.write_text("a file")
    journal = open_journal("eval", {}, None, fresh=True)
    journal.add({"a": 1})
    assert journal.path is None and journal.records == [{"a": 1}]
    journal.discard()
