"""Fixtures for tests that run the engine: the patched library in a child process, the unpatched one, the models.

pytest_plugins = ["support.engine.fixtures"]   # in conftest.py
"""

import os
from pathlib import Path

import pytest

from support import ROOT
from support.engine.process import Engine, library_dir


@pytest.fixture(scope="session")
def engine():
    """An Engine with the patched library; its tests are marked native."""
    with Engine(library_dir()) as running:
        running.start()
        assert running.has_swaa, f"the library in {running.library} has no llama_swaa functions"
        yield running


@pytest.fixture(scope="session")
def baseline_dir():
    """Folder of the unpatched library: SWAA_EDGE_BASELINE, or that of `make baseline`; skips without one."""
    folder = Path(os.environ.get("SWAA_EDGE_BASELINE") or ROOT / "build" / "baseline" / "lib")
    if not folder.is_dir():
        pytest.skip(f"no unpatched library in {folder}; `make baseline` builds it")
    return folder


@pytest.fixture(scope="session")
def zoo(request, tmp_path_factory):
    """The grid's models; the files for every `case` of the selected tests are made in one go.

    SWAA_GRID_MODELS names a folder that keeps them for the next run of the same sources.
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
