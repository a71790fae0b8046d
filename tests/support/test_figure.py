"""Pictures: the type follows the name, and a failure writes nothing."""

import importlib.util

import pytest

from swaa_edge.errors import ConfigError
from swaa_edge.support.figure import check_plot, figure, picture_type


@pytest.mark.parametrize(("name", "kind"), [("a.png", "png"), ("a.b.SVG", "svg"), ("a.pdf", "pdf"), ("a", "png")])
def test_the_suffix_names_the_type(name, kind):
    assert picture_type(name) == kind


def test_other_suffixes_are_refused():
    with pytest.raises(ConfigError, match=r"^a\.json must end in one of \.png, \.svg, \.pdf$"):
        picture_type("a.json")


@pytest.mark.parametrize(("name", "kind", "start"), [("a.svg", None, b"<?xml"), ("a.part", "png", b"\x89PNG")])
def test_a_figure_is_written_in_its_type(tmp_path, name, kind, start):
    pytest.importorskip("matplotlib")
    with figure(tmp_path / name, size=(2, 1), kind=kind) as canvas:
        canvas.subplots().plot([1, 2])
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_failed_figure_writes_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ZeroDivisionError), figure(tmp_path / "a.png", size=(2, 1)):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_plot_without_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^a plot needs matplotlib; pip install 'swaa-edge\[plot\]'$"):
        check_plot()
