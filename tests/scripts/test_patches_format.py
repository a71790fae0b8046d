"""The patch format of scripts/patches.py: any change survives export and apply, whatever the user's git configuration.

pytest tests/scripts/test_patches_format.py
"""

import subprocess
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patches_lib import patchfile

from support.fakes.upstream import HEADER

TEXT = st.lists(st.sampled_from([b"x", b"y", b"{", b"", b"\r", b"- z", b"\xff"]), max_size=12).map(b"\n".join)


@settings(max_examples=60, deadline=None)
@given(old=TEXT, new=TEXT)
def test_any_change_survives_export_and_apply(old, new):
    if old == new:
        assert patchfile.export(HEADER, {"f": (old, new)}) == HEADER
        return
    patch = patchfile.parse("x", patchfile.export(HEADER, {"f": (old, new)}))
    assert patch.header == HEADER
    assert patchfile.apply_hunks(old, patch.files["f"], "f") == new


OLD, NEW = b"class A:\nlabel\n\nold\n", b"class A:\nlabel\n\nnew\n"
SURROUNDINGS = ["GIT_CONFIG_COUNT", "GIT_CONFIG_GLOBAL", "HOME", "XDG_CONFIG_HOME", "a repository", "attributes"]


@pytest.mark.parametrize("where", SURROUNDINGS)
def test_export_is_deaf_to_the_users_git(tmp_path, monkeypatch, where):
    """Each of these settings would change the patch: a blank context line, its prefix, its colour, its heading."""
    plain = patchfile.export(HEADER, {"f": (OLD, NEW)})
    assert b"@@ -3,2 +3,2 @@ label\n \n-old\n" in plain
    config = tmp_path / {"HOME": ".gitconfig", "a repository": ".git/config"}.get(where, "git/config")
    config.parent.mkdir(exist_ok=True)
    if where == "a repository":
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open(config, "a") as file:
        file.write("[diff]\nsuppressBlankEmpty = true\nnoprefix = true\nexternal = /bin/false\n[color]\nui = always\n")
    if where == "GIT_CONFIG_COUNT":
        for key, value in (("COUNT", "1"), ("KEY_0", "diff.suppressBlankEmpty"), ("VALUE_0", "true")):
            monkeypatch.setenv(f"GIT_CONFIG_{key}", value)
    elif where == "attributes":
        (tmp_path / "git/attributes").write_text("* diff=python\n")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    elif where != "a repository":
        monkeypatch.setenv(where, str(config if where == "GIT_CONFIG_GLOBAL" else tmp_path))
    assert patchfile.export(HEADER, {"f": (OLD, NEW)}) == plain
