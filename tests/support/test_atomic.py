"""Several atomic outputs: claimed together, before the work, and written together."""

import pytest

from swaa_edge.errors import OutputError
from swaa_edge.support.atomic import atomic_outputs


def test_several_files_are_written_together(tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    with atomic_outputs([one, None, "-", two, one]) as files:
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
