"""Fixtures on the fake upstream, a pytest plugin. A module of its own: tests import upstream.py before plugins load.

pytest_plugins = ["support.fakes.upstream_fixtures"]
"""

import pytest

import patches
from support.fakes.upstream import Checkout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("SWAA_EDGE_CACHE", raising=False)
    return Checkout(tmp_path)


@pytest.fixture
def run(checkout, capsys):
    """run(*args): a command that must succeed; returns its output."""

    def call(*args, root=checkout.root):
        status = patches.main(["--root", str(root), *args])
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return out

    return call


@pytest.fixture
def fail(checkout, capsys):
    """fail(*args): a command that must fail; returns its error lines without `Error: `."""

    def call(*args):
        status = patches.main(["--root", str(checkout.root), *args])
        lines = capsys.readouterr().err.splitlines()
        assert status == 1 and lines and all(line.startswith("Error: ") for line in lines)
        return "\n".join(line.removeprefix("Error: ") for line in lines)

    return call
