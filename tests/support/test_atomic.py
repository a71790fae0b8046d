"""Several atomic outputs: claimed together, before the work, and written together."""

import os

import pytest

from swaa_edge.errors import OutputError
from swaa_edge.support.atomic import atomic_output, atomic_outputs, check_outputs


def test_several_files_are_written_together(tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    with atomic_outputs([one, None, "-", two]) as files:
        assert list(files) == [one, two]
        for name, file in files.items():
            file.write_text(name)
            assert not (tmp_path / name).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_failure_leaves_none_of_them(tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    (tmp_path / "two").write_text("before")
    with pytest.raises(OutputError, match="two exists already"), atomic_outputs([one, two]):
        pass
    with pytest.raises(KeyboardInterrupt), atomic_outputs([one, two], force=True) as files:
        files[one].write_text("half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("two", "before")]


@pytest.mark.parametrize("outputs, others", [(["a", "a"], []), (["b", "./a"], ["a"]), (["link"], ["a"])])
def test_an_output_is_not_another_file_of_the_command(tmp_path, monkeypatch, outputs, others):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(OutputError, match="is used for an output and for another file of this command"):
        check_outputs(outputs, force=True, others=[*others, None])


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    with atomic_output(tmp_path / "link", force=True) as temporary:
        temporary.write_text("after")
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_text() == "after"
    assert (tmp_path / "file").read_text() == "before"


def test_only_a_regular_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(OutputError, match="pipe is not a regular file; give the name of a file"),
        atomic_output(tmp_path / "pipe", force=True),
    ):
        pass
