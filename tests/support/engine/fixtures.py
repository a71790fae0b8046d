"""Fixtures of the tests that run the engine: the patched library in a child process, and the models it runs.

pytest_plugins = ["support.engine.fixtures"]   # in conftest.py
"""

import os
from pathlib import Path

import pytest

from support.engine.process import Engine, library_dir


@pytest.fixture(scope="session")
def engine():
    """An Engine with the patched library; skips where that isn't built (which fails in CI)."""
    from swaa_edge.errors import NativeLibraryError

    try:
        folder = library_dir()
    except NativeLibraryError as error:
        pytest.skip(str(error))
    with Engine(folder) as running:
        running.start()
        assert running.has_swaa, f"the library in {folder} has no llama_swaa functions"
        yield running


@pytest.fixture(scope="session")
def zoo(request, tmp_path_factory):
    """The grid's models; files of all that the selected tests name as a `case` are made in one go.

    SWAA_GRID_MODELS names a folder that keeps them for the next run, which must be of the same sources.
    """
    from support.oracle.grid_models import Zoo

    made = Zoo(Path(os.environ.get("SWAA_GRID_MODELS") or tmp_path_factory.mktemp("zoo")))
    cases = [
        item.callspec.params["case"]
        for item in request.session.items
        if hasattr(item, "callspec") and "zoo" in item.fixturenames and "case" in item.callspec.params
    ]
    made.prepare((case.arch, case.layers) for case in cases)
    return made
