"""A command parses the header of a model file once, however many of its steps need it."""

import pytest
from click.testing import CliRunner

from support.fakes import gguf_bytes
from swaa_edge.cli import cli
from swaa_edge.files import header


@pytest.fixture
def reads(monkeypatch):
    """The paths of all headers that are parsed, in order."""
    seen, parse = [], header._Parser.parse

    def counted(self):
        seen.append(str(self.path))
        return parse(self)

    monkeypatch.setattr(header._Parser, "parse", counted)
    return seen


def run(*arguments, **options):
    result = CliRunner().invoke(cli, list(map(str, arguments)), **options)
    assert result.exit_code == 0, result.output
    return result


def test_the_count_sees_a_second_read(reads, tmp_path):
    from swaa_edge.files.model import read_model

    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes.model())
    model = read_model(path)
    assert read_model(model) is model
    assert reads == [str(path)]
    read_model(path)
    assert reads == [str(path)] * 2


def test_inspect(reads, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes.model(extra=gguf_bytes.swaa_keys()))
    run("inspect", path)
    assert reads == [str(path)]


@pytest.mark.native
def test_run(reads, path):
    run("run", path, "-p", "some text", "-n", 1, "--window", 24)
    assert reads == [path]


@pytest.mark.native
def test_chat(reads, path):
    run("chat", path, "--ctx", 512, input="hello\n")
    assert reads == [path]


@pytest.mark.native
def test_eval(reads, path):
    asked = ["--task", "kv", "--pairs", 2, "--samples", 1, "--prompt-tokens", 600, "--max-tokens", 2, "--no-chat"]
    run("eval", path, *asked, "--configs", "full,naive", "--window", 24)
    assert reads == [path]


@pytest.mark.native
def test_bench(reads, path):
    run("bench", path, "--prompt-tokens", 64, "--decode", 1, "--repeat", 1, "--configs", "full,naive", "--ubatch", 32)
    assert reads == [path]
