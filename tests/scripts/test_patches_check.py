"""scripts/patches.py check, and moving the series: every flaw is found, and a series that is sound stays so.

The last tests look at the repository's own series.

    pytest tests/scripts/test_patches_check.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patches_lib import upstream, workspace

import patches
from support import ROOT
from support.fakes.upstream import (
    HEADER,
    N1,
    N2,
    ONE,
    OURS,
    TWO,
    UPSTREAM,
    edit_ours,
    edit_unpatched,
    fake_pip,
    make_sdist,
    release,
)


def test_check_proves_a_sound_series(checkout, run):
    before = checkout.state()
    assert run("check") == (
        "llama-cpp-python 1.0: 2 patches (3 hunks in 2 upstream files) fit exactly and re-export identically; "
        "1 files of ours\n"
    )
    assert checkout.state() == before


WIDE = ONE.replace(b"@@ -5,3 +5,3 @@ a 4\n", b"@@ -4,4 +4,4 @@ a 3\n a 4\n")
BROKEN = {
    "no series": (
        lambda c: c.put("patches/series", "# nothing\n"),
        "patches/series is empty or missing: nothing was checked",
    ),
    "nothing of ours": (
        lambda c: (c.patches / "src/src/ours.cpp").unlink(),
        "patches/src/ holds no file: none of our files was checked",
    ),
    "series names too much": (
        lambda c: (c.patches / N2).unlink(),
        f"patches/series names {N2}, which is not in patches/",
    ),
    "folder holds too much": (
        lambda c: c.put("patches/series", N1 + "\n"),
        f"patches/{N2} is not in patches/series",
    ),
    "a stranger": (lambda c: c.put("patches/notes.txt", ""), "patches/notes.txt is not in patches/series"),
    "named twice": (
        lambda c: c.put("patches/series", f"{N1}\n{N1}\n{N2}\n"),
        f"patches/series: '{N1}' must occur once and look like 0001-what-it-is.patch",
    ),
    "no header": (
        lambda c: c.put(f"patches/{N1}", ONE),
        f"{N1}: the header needs the fields Subject:, Why:, Goes away when: in this order",
    ),
    "an empty reason": (
        lambda c: c.swap(f"patches/{N1}", "Why: because of this\n  and of that\n", "Why:\n"),
        f"{N1}: header field 'Why:' is empty; write a sentence",
    ),
    "text between": (
        lambda c: c.swap(f"patches/{N1}", "Why:", "note to self\nWhy:"),
        f"{N1}: header lines are 'Key: text' or indented, and one blank line ends the header",
    ),
    "no diff": (lambda c: c.put(f"patches/{N2}", HEADER), f"{N2}: has no 'diff --git' line"),
    "offset": (
        lambda c: c.swap(f"patches/{N2}", "-20,2 +20,3", "-19,2 +19,3"),
        f"{N2}: src/a.cpp: hunk 1 does not fit exactly at line 19",
    ),
    "fuzz": (
        lambda c: c.swap(f"patches/{N2}", " a 21\n", " a 22\n"),
        f"{N2}: src/a.cpp: hunk 1 does not fit exactly at line 20",
    ),
    "wrong order": (
        lambda c: c.put(f"patches/{N2}", HEADER + TWO.replace(b" a 20\n", b" a 6\n")),
        f"{N2}: src/a.cpp: hunk 1 does not fit exactly at line 20",
    ),
    "other context": (
        lambda c: c.put(f"patches/{N1}", HEADER + WIDE),
        f"{N1} re-exports differently; run 'refresh' and commit what it writes",
    ),
    "an index line": (
        lambda c: c.swap(f"patches/{N2}", "--- a/", "index 123..456 100644\n--- a/"),
        f"{N2}: line 6: expected 'diff --git', '---' and '+++' of the same file",
    ),
    "a tail": (
        lambda c: c.put(f"patches/{N2}", HEADER + TWO + b"-- \n2.39\n"),
        f"{N2}: line 13: expected 'diff --git', '---' and '+++' of the same file",
    ),
    "overwrites upstream": (
        lambda c: c.put("patches/src/src/b.cpp", OURS),
        "patches/src/src/b.cpp would overwrite an upstream file",
    ),
    "no opening comment": (
        lambda c: c.put("patches/src/src/ours.cpp", "#pragma once\n" + OURS),
        "patches/src/src/ours.cpp must open with a comment that says what it is",
    ),
    "an empty comment": (
        lambda c: c.put("patches/src/src/ours.h", "//\nint x;\n"),
        "patches/src/src/ours.h must open with a comment that says what it is",
    ),
    "not compiled": (
        lambda c: c.put("patches/src/src/more.cpp", OURS),
        "patches/src/src/more.cpp is not compiled: no CMakeLists.txt above it names it",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_finds(checkout, fail, name):
    breaking, error = BROKEN[name]
    breaking(checkout)
    assert fail("check") == error


def test_check_finds_everything_at_once(checkout, fail):
    checkout.put("patches/notes.txt", "")
    checkout.put("patches/src/src/more.cpp", "int x;")
    assert len(fail("check").splitlines()) == 3


@pytest.mark.parametrize("change", [lambda path: path.write_text("b\n"), lambda path: path.unlink()])
def test_check_is_not_fooled_by_an_edited_pristine_tree(checkout, run, fail, change):
    run("apply")
    change(checkout.pristine / "src/b.cpp")
    path = checkout.pristine
    assert fail("check") == f"{path}/src/b.cpp differs from the sdist; delete {path} and run 'fetch'"


def test_a_file_that_a_glob_takes_counts_as_compiled(checkout, run):
    checkout.put("patches/src/gpu/more.cu", "// Another file of ours, for the GPU.\n")
    run("check")


# other releases


def capture(checkout, capsys, *args):
    status = patches.main(["--root", str(checkout.root), *args])
    return status, *capsys.readouterr()


def test_against_the_same_code(checkout, run):
    release(checkout, "1.1", a=lambda text: text + "tail\n")
    total = "llama-cpp-python 1.1: 2 patches, 0 with offset, 0 failing"
    assert run("check", "--against", "1.1") == f"{N1}: applies\n{N2}: applies\n{total}\n"


def test_against_moved_and_changed_code(checkout, capsys):
    release(checkout, "1.1", a=lambda text: "new\n" + text.replace("a 20\n", "a TWENTY\n"))
    status, out, err = capture(checkout, capsys, "check", "--against", "1.1")
    assert (status, err) == (1, "Error: 1 patches do not apply to 1.1\n")
    assert out == (
        f"{N1}: applies with offset\n{N2}: FAILS: src/a.cpp hunk 1\n"
        "llama-cpp-python 1.1: 2 patches, 1 with offset, 1 failing\n"
    )


def test_against_a_release_that_is_not_there(checkout, fail, monkeypatch):
    fake_pip(monkeypatch, "import sys; sys.exit('ERROR: No matching distribution found for llama-cpp-python==9.9')")
    assert fail("check", "--against", "9.9") == (
        "pip could not download llama-cpp-python 9.9: No matching distribution found for llama-cpp-python==9.9"
    )
    assert "is not a version" in fail("check", "--against", "../9")


def test_against_a_release_that_lacks_the_file_or_has_ours(checkout, capsys):
    make_sdist(checkout.vendor, "1.1", {"CMakeLists.txt": UPSTREAM["CMakeLists.txt"]})
    status, out, _ = capture(checkout, capsys, "check", "--against", "1.1")
    assert status == 1
    assert out.startswith(f"{N1}: FAILS: src/a.cpp is gone\n{N2}: FAILS: src/a.cpp is gone\n")
    make_sdist(checkout.vendor, "1.2", UPSTREAM | {"src/ours.cpp": "theirs"})
    status, _, err = capture(checkout, capsys, "check", "--against", "1.2")
    assert status == 1
    assert err == "Error: llama-cpp-python 1.2 already has a file src/ours.cpp; rename patches/src/src/ours.cpp\n"


def test_onto_another_release(checkout, run, fail):
    run("apply")
    sdist = release(checkout, "1.1", a=lambda text: "new\n" + text.replace("a 20\n", "a TWENTY\n"))
    edit_unpatched(checkout)
    assert "holds 1 local edit (src/b.cpp)" in fail("refresh", "--onto", "1.1")
    run("apply", "--discard")
    out = run("refresh", "--onto", "1.1")
    assert f"{N2}: FAILS: src/a.cpp hunk 1\n" in out and "vendor/rejected/" in out
    pin = (checkout.patches / "UPSTREAM").read_text()
    assert "version = 1.1\n" in pin and f"sha256 = {upstream.sha256_of(sdist)}\n" in pin
    assert (checkout.patches / "series").read_text() == f"# order matters\n{N1}\n"
    assert (checkout.vendor / "rejected" / N2).read_bytes() == HEADER + TWO
    assert b"@@ -6,3 +6,3 @@" in (checkout.patches / N1).read_bytes()
    assert run("apply").endswith(": 1 patches, 1 files of ours, 3 files written\n")
    assert (checkout.tree / "src/a.cpp").read_text().startswith("new\na 1\n")
    run("check")


def test_drop_one_patch(checkout, run, fail):
    run("apply")
    checkout.edit("src/a.cpp", "a six\n", "a six\na six more\n")
    run("refresh", "--into", N1)
    assert b"@@ -21,2 +21,3 @@" in (checkout.patches / N2).read_bytes()
    run("refresh", "--drop", N1)
    assert {path.name for path in checkout.patches.iterdir()} == {"UPSTREAM", "series", "src", N2}
    assert (checkout.patches / N2).read_bytes() == HEADER + TWO
    assert run("apply").endswith(" 1 patches, 1 files of ours, 2 files written\n")
    assert "is not compiled" in fail("check")


def test_drop_refuses_a_patch_that_others_build_on(checkout, run, fail):
    run("apply")
    checkout.edit("src/a.cpp", "a six\n", "a six!\n")
    run("refresh", "--into", N2)
    before = checkout.state()
    assert fail("refresh", "--drop", N1) == f"{N1} is needed by a later patch: {N2}: FAILS: src/a.cpp hunk 1"
    assert checkout.state() == before


def test_a_tree_of_another_release_is_replaced_only_if_unedited(checkout, run, fail):
    run("apply")
    edit_ours(checkout)
    sdist = release(checkout, "1.1", a=lambda text: text + "tail\n")
    checkout.swap("patches/UPSTREAM", "version = 1.0", "version = 1.1")
    checkout.swap("patches/UPSTREAM", upstream.sha256_of(checkout.sdist), upstream.sha256_of(sdist))
    assert "is from another upstream and holds 1 local edit (src/ours.cpp)" in fail("apply")
    assert "long" in (checkout.tree / "src/ours.cpp").read_text()
    checkout.edit("src/ours.cpp", "long", "int")
    run("apply")
    assert (checkout.tree / "src/a.cpp").read_text().endswith("tail\n")


def test_a_tree_that_is_not_of_the_pin_is_left_alone(checkout, run, fail):
    run("apply")
    checkout.swap("vendor/llama.cpp-patched.stamp", upstream.sha256_of(checkout.sdist), "0" * 64)
    assert fail("apply") == f"{checkout.tree} was made from another upstream release; save your edits, then delete it"
    checkout.put("vendor/llama.cpp-patched.stamp", "{")
    assert fail("apply") == f"{checkout.tree}.stamp is not JSON; delete it"


def test_help_of_each_command():
    for command in ([], ["fetch"], ["apply"], ["refresh"], ["check"]):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts/patches.py", *command, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout.startswith("usage: patches.py")


# the repository's own series


@pytest.fixture
def own():
    cache = os.environ.get("SWAA_EDGE_CACHE")
    ws = workspace.Workspace(ROOT, Path(cache) if cache else None)
    if not (ws.cache / ws.pin.sdist).exists() or not ws.names():
        pytest.skip("no sdist here yet, or no series")
    return ws


def test_our_series_is_sound(own, capsys):
    status = patches.main(["check"])
    assert (status, capsys.readouterr().err) == (0, "")


def test_git_applies_our_series_to_the_same_result(own, tmp_path):
    workspace.fetch(own)
    expected = {path: states[-1] for path, states in workspace.stack(own.series(), own.upstream).items()}
    for path in expected:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(own.upstream(path))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name in own.names():
        subprocess.run(["git", "-C", tmp_path, "apply", own.patches / name], check=True)
    assert {path: (tmp_path / path).read_bytes() for path in expected} == expected
    assert all(data != own.upstream(path) for path, data in expected.items())
