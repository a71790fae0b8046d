"""Text files, and stdin under the name "-"."""

import io
import types

import pytest

from swaa_edge.errors import ConfigError
from swaa_edge.files import records
from swaa_edge.files.records import read_text


def test_a_file_and_stdin_give_their_text(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("Größe\n", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "Größe\n"
    monkeypatch.setattr(records, "sys", types.SimpleNamespace(stdin=types.SimpleNamespace(buffer=io.BytesIO(b"in"))))
    assert read_text("-") == "in"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "cannot read FILE: No such file or directory; give a text file"),
        (b"ok \xff", "FILE is not UTF-8 text (byte 3); save it as UTF-8"),
        (b"", "FILE is empty; give a file with text"),
        (b" \n", "FILE is empty; give a file with text"),
    ],
)
def test_errors_are_one_line(tmp_path, content, error):
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_text(file)
    assert str(caught.value) == error.replace("FILE", str(file))
