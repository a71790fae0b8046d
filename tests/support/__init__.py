"""What tests share: the engine in a child process, the oracle, fakes. Tests of `swaa_edge/support/` lie here too."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def module_environment(**variables: str) -> dict[str, str]:
    """The environment in which `python -m support.NAME` finds the helpers and the package of this checkout."""
    folders = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **variables}
