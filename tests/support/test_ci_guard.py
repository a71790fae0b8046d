"""The guard itself, on small test files in a child pytest: what it fails, and what it leaves alone."""

import os
import subprocess
import sys

import pytest

from support import ROOT

CASES = {
    "skip": "@pytest.mark.native\ndef test_it():\n    pytest.skip('no library')\n",
    "skipif": "@pytest.mark.native\n@pytest.mark.skipif(True, reason='no library')\ndef test_it():\n    pass\n",
    "real": "@pytest.mark.real\ndef test_it():\n    pytest.skip('no model')\n",
    "module": "pytest.skip('no library', allow_module_level=True)\n",
    "xfail": "@pytest.mark.native\n@pytest.mark.xfail\ndef test_it():\n    assert False\n",
    "not native": "def test_it():\n    pytest.skip('no display')\n",
}
FAIL_IN_CI = {"skip", "skipif", "real", "module"}


@pytest.mark.parametrize("ci", [False, True], ids=["desk", "ci"])
@pytest.mark.parametrize("case", CASES)
def test_guard(tmp_path, case, ci):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  native\n  real\n")
    (tmp_path / "test_case.py").write_text("import pytest\n" + CASES[case])
    env = {key: value for key, value in os.environ.items() if key not in ("CI", "PYTEST_ADDOPTS")}
    env |= {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if ci:
        env["CI"] = "true"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.ci_guard", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    if ci and case in FAIL_IN_CI:
        assert done.returncode in (1, 2), done.stdout  # 2: pytest stops at a collection error
        assert "must not be skipped in CI" in done.stdout
    else:
        # A module skipped as a whole leaves no test: pytest says 5.
        assert done.returncode == (5 if case == "module" else 0), done.stdout
