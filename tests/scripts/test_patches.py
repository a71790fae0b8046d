"""scripts/patches.py apply and refresh: no edit is lost, nothing is guessed, the output is exact to the byte.

pytest tests/scripts/test_patches.py
"""

import os
import subprocess

import pytest

from support.fakes.upstream import (
    EDITS,
    HEADER,
    N1,
    N2,
    ONE,
    OURS,
    TWO,
    UPSTREAM,
    add_file,
    delete_file,
    edit_ours,
    edit_unpatched,
)

# apply


def test_apply_makes_the_tree(checkout, run):
    assert run("apply") == f"{checkout.tree}: 2 patches, 1 files of ours, 3 files written\n"
    text = UPSTREAM["src/a.cpp"].replace("a 6\n", "a six\n").replace("a 20\n", "a 20\na twenty and a half\n")
    assert (checkout.tree / "src/a.cpp").read_text() == text
    assert (checkout.tree / "src/ours.cpp").read_text() == OURS
    assert (checkout.tree / "CMakeLists.txt").read_text() != UPSTREAM["CMakeLists.txt"]
    assert (checkout.pristine / "src/a.cpp").read_text() == UPSTREAM["src/a.cpp"]
    assert os.access(checkout.tree / "convert.py", os.X_OK)


def test_git_gives_the_same_tree(checkout, run, tmp_path):
    run("apply")
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", checkout.pristine, other], check=True)
    subprocess.run(["git", "init", "-q", other], check=True)
    for name in (N1, N2):
        subprocess.run(["git", "-C", other, "apply", checkout.patches / name], check=True)
    for path in ("src/a.cpp", "CMakeLists.txt"):
        assert (
            (other / path).read_bytes()
            == (checkout.tree / path).read_bytes()
            != (checkout.pristine / path).read_bytes()
        )


def test_apply_again_touches_nothing(checkout, run):
    run("apply")
    before = checkout.state("vendor")
    assert run("apply").endswith(" 0 files written\n")
    assert checkout.state("vendor") == before


def test_apply_writes_only_what_changes(checkout, run):
    run("apply")
    before = checkout.state("vendor/llama.cpp-patched")
    checkout.swap(f"patches/{N2}", "half", "quarter")
    run("apply")
    after = checkout.state("vendor/llama.cpp-patched")
    assert {path for path in after if after[path] != before[path]} == {"src/a.cpp"}


def test_a_patch_or_file_that_leaves_takes_its_changes_along(checkout, run):
    run("apply")
    os.utime(checkout.pristine / "CMakeLists.txt", (1, 1))
    checkout.put("patches/series", "")
    (checkout.patches / "src/src/ours.cpp").unlink()
    run("apply")
    assert {path: data.decode() for path, (data, _) in checkout.state("vendor/llama.cpp-patched").items()} == {
        path: text for path, text in UPSTREAM.items() if path != "models/vocab.gguf"
    }
    # a build compares times: a file that went back must be new to it
    assert (checkout.tree / "CMakeLists.txt").stat().st_mtime > 1e9


def test_no_series_yet_is_fine_for_apply(checkout, run):
    (checkout.patches / "series").unlink()
    assert run("apply") == f"{checkout.tree}: 0 patches, 1 files of ours, 1 files written\n"


@pytest.mark.parametrize("edit", EDITS)
def test_apply_never_loses_an_edit_unasked(checkout, run, fail, edit):
    run("apply")
    clean = checkout.state("vendor/llama.cpp-patched")
    path = edit(checkout)
    mine = checkout.state("vendor/llama.cpp-patched")
    checkout.swap(f"patches/{N1}", "six", "SIX")
    expected = f"{checkout.tree} holds 1 local edit ({path}) missing from patches/; run 'refresh', or 'apply --discard'"
    assert fail("apply") == expected
    assert checkout.state("vendor/llama.cpp-patched") == mine
    assert run("apply", "--keep").endswith(f"; left 1 local edit ({path}) alone\n")
    assert checkout.state("vendor/llama.cpp-patched").get(path) == mine.get(path)
    assert fail("apply") == expected
    checkout.swap(f"patches/{N1}", "SIX", "six")
    run("apply", "--discard")
    content = {name: data for name, (data, _) in checkout.state("vendor/llama.cpp-patched").items()}
    assert content == {name: data for name, (data, _) in clean.items()}


def test_leftovers_of_builds_are_no_edits(checkout, run):
    run("apply")
    for name in ("build/x.cpp", "src/a.o", "__pycache__/x.py", "src/a.cpp.orig"):
        checkout.put(f"vendor/llama.cpp-patched/{name}", "x")
    assert run("apply").endswith(" 0 files written\n")


def test_apply_resumes_after_an_interruption(checkout, run):
    run("apply")
    (checkout.vendor / "llama.cpp-patched.stamp").unlink()
    (checkout.tree / "src/ours.cpp").unlink()
    assert run("apply").endswith(" 1 files written\n")


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("@@ -5,3 +5,3 @@", "@@ -6,3 +6,3 @@", f"{N1}: src/a.cpp: hunk 1 does not fit exactly at line 6"),  # offset
        (" a 5\n", " a 50\n", f"{N1}: src/a.cpp: hunk 1 does not fit exactly at line 5"),  # fuzz
        ("+5,3 @@", "+6,3 @@", f"{N1}: src/a.cpp: hunk 1 does not fit exactly at line 5"),
        ("@@ -5,3", "@@ -5,4", f"{N1}: line 16: the hunk header gives 4,3 lines, but the hunk has 3,3"),
        (
            "+++ b/src/a.cpp",
            "+++ b/src/b.cpp",
            f"{N1}: line 13: expected 'diff --git', '---' and '+++' of the same file",
        ),
        (
            "Why: because",
            "Because",
            f"{N1}: the header needs the fields Subject:, Why:, Goes away when: in this order",
        ),
    ],
)
def test_apply_guesses_nothing(checkout, fail, old, new, error):
    checkout.swap(f"patches/{N1}", old, new)
    assert fail("apply") == error
    assert not checkout.tree.exists()


def test_apply_refuses_to_overwrite_an_upstream_file(checkout, fail):
    checkout.put("patches/src/src/a.cpp", OURS)
    assert fail("apply") == "patches/src/src/a.cpp would overwrite an upstream file; rename it, or make it a patch"


def test_a_patch_of_a_file_that_upstream_has_not(checkout, fail):
    checkout.put(f"patches/{N2}", HEADER + TWO.replace(b"src/a.cpp", b"src/z.cpp"))
    assert fail("apply") == f"{N2}: src/z.cpp is not an upstream file; our own files go to patches/src/"


# refresh


def test_refresh_without_edits_changes_nothing(checkout, run):
    run("apply")
    before = checkout.state()
    assert run("refresh") == "patches: up to date, nothing written\n"
    assert checkout.state() == before


def test_refresh_puts_an_edit_into_the_only_patch_of_its_file(checkout, run):
    run("apply")
    before = checkout.state()
    checkout.edit("CMakeLists.txt", "  src/ours.cpp\n", "  src/ours.cpp\n  src/more.cpp\n")
    assert run("refresh") == f"patches: {N1} written\n"
    after = checkout.state()
    assert {path for path in after if after[path] != before[path]} == {N1}
    expected = ONE.replace(b"-2,2 +2,3 @@", b"-2,2 +2,4 @@").replace(
        b"+  src/ours.cpp\n", b"+  src/ours.cpp\n+  src/more.cpp\n"
    )
    assert (checkout.patches / N1).read_bytes() == HEADER + expected
    assert run("apply").endswith(" 0 files written\n")


@pytest.mark.parametrize(("home", "line"), [(N1, b"@@ -12 +12 @@"), (N2, b"@@ -12 +12 @@")])
def test_refresh_into_one_of_several_patches(checkout, run, fail, home, line):
    run("apply")
    before = checkout.state()
    checkout.edit("src/a.cpp", "a 12\n", "a twelve\na twelve more\n")
    assert fail("refresh") == (f"src/a.cpp is in {N1} and {N2}; use 'refresh --into NAME src/a.cpp', or '--new NAME'")
    assert checkout.state() == before
    run("refresh", "--into", home)
    data = {name: (checkout.patches / name).read_bytes() for name in (N1, N2)}
    assert [name for name in data if b"+a twelve more\n" in data[name]] == [home]
    # the hunk of the second patch sits one line lower, in both files or only in the new one
    assert (b"@@ -21,2 +21,3 @@" if home == N1 else b"@@ -20,2 +21,3 @@") in data[N2]
    assert run("apply").endswith(" 0 files written\n")
    run("apply", root=copy_of(checkout))


def copy_of(checkout):
    """A fresh checkout of the same patches: its tree must come out the same."""
    root = checkout.root / "fresh"
    subprocess.run(["mkdir", "-p", root / "vendor"], check=True)
    subprocess.run(["cp", "-r", checkout.patches, root], check=True)
    subprocess.run(["cp", checkout.sdist, root / "vendor"], check=True)
    return root


def test_refresh_refuses_an_edit_on_lines_of_a_later_patch(checkout, run, fail):
    run("apply")
    before = checkout.state()
    checkout.edit("src/a.cpp", "a twenty and a half\n", "a 20.5\n")
    assert fail("refresh", "--into", N1) == (
        f"src/a.cpp: the edit overlaps changes of a patch after {N1}; name that patch with --into"
    )
    assert checkout.state() == before
    run("refresh", "--into", N2)
    assert (checkout.patches / N2).read_bytes() == HEADER + TWO.replace(b"twenty and a half", b"20.5")


def test_refresh_makes_a_new_patch_of_some_edits(checkout, run, fail):
    run("apply")
    edit_unpatched(checkout)
    checkout.edit("src/a.cpp", "a 12\n", "a twelve\n")
    header = ["--subject", "b", "--why", "since\n" + "b " * 60, "--goes-away-when", "never"]
    assert fail("refresh") == (
        f"src/a.cpp is in {N1} and {N2} (1 more like it); use 'refresh --into NAME src/a.cpp', or '--new NAME'"
    )
    assert "header field 'Why:' is empty" in fail("refresh", "--new", "0003-b.patch", "--subject", "b")
    assert "must be a name not yet in the series" in fail("refresh", "--new", N1, *header)
    assert fail("refresh", "--into", N1, "src/c.cpp") == f"src/c.cpp: no edited upstream file in {checkout.tree}"
    out = run("refresh", "--new", "0003-b.patch", *header, "src/b.cpp")
    assert out == "patches: 0003-b.patch written; left 1 local edit (src/a.cpp) alone\n"
    assert (checkout.patches / "0003-b.patch").read_bytes() == (
        b"Subject: b\nWhy: since" + b" b" * 50 + b"\n " + b" b" * 10 + b"\nGoes away when: never\n\n"
        b"diff --git a/src/b.cpp b/src/b.cpp\n--- a/src/b.cpp\n+++ b/src/b.cpp\n"
        b"@@ -11,3 +11,3 @@ b 10\n b 11\n-b 12\n+b 21\n b 13\n"
    )
    assert (checkout.patches / "series").read_text() == f"# order matters\n{N1}\n{N2}\n0003-b.patch\n"
    assert "1 local edit (src/a.cpp)" in fail("apply")
    assert run("refresh", "--into", N1) == f"patches: {N1} written\n"
    run("apply")


def test_refresh_takes_the_edits_of_some_lines(checkout, run, fail):
    run("apply")
    for line in (2, 12, 28):
        checkout.edit("src/b.cpp", f"b {line}\n", f"B {line}\n")
    header = ["--subject", "b", "--why", "b", "--goes-away-when", "never"]
    assert "edits start at lines [2, 12, 28]" in fail("refresh", "--new", "0003-b.patch", *header, "src/b.cpp:3-11")
    chosen = [f"{checkout.tree}/src/b.cpp:1-2", "src/b.cpp:28-30"]
    assert "left 1 local edit" in run("refresh", "--new", "0003-b.patch", *header, *chosen)
    data = (checkout.patches / "0003-b.patch").read_text()
    assert "+B 2\n" in data and "+B 28\n" in data and "B 12" not in data
    assert "B 12\n" in (checkout.tree / "src/b.cpp").read_text()
    run("refresh", "--into", N2)
    assert "+B 12\n" in (checkout.patches / N2).read_text()
    run("apply")


def test_refresh_brings_files_of_ours_home(checkout, run):
    run("apply")
    edit_ours(checkout)
    add_file(checkout)
    assert run("refresh") == "patches: src/gpu/more.cu, src/src/ours.cpp written\n"
    for path in ("gpu/more.cu", "src/ours.cpp"):
        assert (checkout.patches / "src" / path).read_bytes() == (checkout.tree / path).read_bytes()
    (checkout.tree / "gpu/more.cu").unlink()
    assert run("refresh") == "patches: src/gpu/more.cu written\n"
    assert not (checkout.patches / "src/gpu/more.cu").exists()
    assert run("apply").endswith(" 0 files written\n")


def test_refresh_and_changes_under_patches_meet(checkout, run, fail):
    """Someone edits one file in the tree while another file changes under patches/: both must survive."""
    run("apply")
    checkout.edit("CMakeLists.txt", "src/ours.cpp", "src/our.cpp")
    checkout.swap("patches/src/src/ours.cpp", "int", "short")
    run("refresh")
    assert "short" in (checkout.tree / "src/ours.cpp").read_text()
    assert b"+  src/our.cpp" in (checkout.patches / N1).read_bytes()
    edit_ours_again = (checkout.tree / "src/ours.cpp").read_text().replace("short", "char")
    checkout.put("vendor/llama.cpp-patched/src/ours.cpp", edit_ours_again)
    checkout.swap("patches/src/src/ours.cpp", "short", "long")
    run("apply", "--keep")
    assert fail("refresh") == (
        "src/ours.cpp changed in the tree and in patches/; copy the file, run 'apply --discard', redo the edit"
    )
    assert "char" in (checkout.tree / "src/ours.cpp").read_text()
    assert "long" in (checkout.patches / "src/src/ours.cpp").read_text()


def test_refresh_refuses_to_delete_or_to_empty(checkout, run, fail):
    assert fail("refresh") == f"{checkout.tree} does not exist; run 'apply' first"
    run("apply")
    path = delete_file(checkout)
    assert fail("refresh", "--into", N1) == f"{path} was deleted; a patch can't delete an upstream file, so restore it"
    run("apply", "--discard")
    checkout.edit("src/a.cpp", "a twenty and a half\n", "")
    assert fail("refresh", "--into", N2) == f"{N2} would be empty; remove it with 'refresh --drop {N2}'"
