"""Makes a skipped test fail in CI if it needs the library (`native`) or the real model (`real`).

Such a test skips itself where these are missing, which is right on a desk and would hide a broken build in CI. A module
that skips itself as a whole counts too, since what it holds is then unknown. pyproject.toml loads this plugin.

    CI=true pytest tests/native/test_library.py
"""

import os

import pytest

_in_ci = bool(os.environ.get("CI"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    expected = hasattr(report, "wasxfail")  # pytest reports an expected failure as skipped
    for marker in ("native", "real"):
        if _in_ci and report.skipped and not expected and item.get_closest_marker(marker):
            _fail(report, f"a {marker} test")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if _in_ci and report.skipped:
        _fail(report, "a test module")
    return report


def _fail(report, what):
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: {what} must not be skipped in CI ({reason})"
