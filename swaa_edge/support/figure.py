"""Pictures drawn by matplotlib, without a display and without pyplot's global state.

with figure("loss.png", size=(7, 4)) as canvas:
    canvas.subplots().plot(steps, losses)
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from swaa_edge.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_TYPES = ("png", "svg", "pdf")


def check_plot() -> None:
    """Raise `ConfigError` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib; pip install 'swaa-edge[plot]'")


def picture_type(path: str | os.PathLike[str]) -> str:
    """Return the picture type that the suffix of `path` names. Without a suffix, the type is "png".

    Raises `ConfigError` for an unknown suffix, and for "-" (stdout).
    """
    if os.fspath(path) == "-":
        raise ConfigError("a picture can't be written to stdout; give the name of a file")
    kind = Path(path).suffix.lstrip(".").lower() or PICTURE_TYPES[0]
    if kind not in PICTURE_TYPES:
        raise ConfigError(f"{path} must end in one of {', '.join('.' + kind for kind in PICTURE_TYPES)}")
    return kind


def check_pictures(*files: str | os.PathLike[str] | None) -> None:
    """Raise the errors of `figure` early. None is skipped."""
    for file in files:
        if file is not None:
            check_plot()
            picture_type(file)


@contextlib.contextmanager
def figure(path: str | os.PathLike[str], *, size: tuple[float, float], kind: str | None = None) -> Iterator[Figure]:
    """Yield an empty figure of `size` inches. If the block ends without an error, write the figure to `path`.

    kind: one of `PICTURE_TYPES`, or None for the type that the suffix of `path` names.

    Raises `ConfigError` if matplotlib is missing or the suffix is unknown.
    """
    check_plot()
    kind = kind or picture_type(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(canvas)
    yield canvas
    canvas.savefig(path, format=kind, dpi=150)
