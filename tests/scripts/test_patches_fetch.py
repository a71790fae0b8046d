"""scripts/patches.py fetch: only the pinned sdist, from a cache or by pip, unpacked safely.

pytest tests/scripts/test_patches_fetch.py
"""

import os
import tarfile

import pytest
from patches_lib import patchfile, upstream

from support.fakes.upstream import UPSTREAM, fake_pip, make_sdist


def test_fetch_unpacks_what_is_worth_keeping_and_then_does_nothing(checkout, run):
    assert run("fetch") == f"{checkout.pristine}: unpacked 4 files of llama-cpp-python 1.0\n"
    assert (checkout.pristine / "src/a.cpp").read_text() == UPSTREAM["src/a.cpp"]
    assert os.access(checkout.pristine / "convert.py", os.X_OK) and not os.access(
        checkout.pristine / "src/a.cpp", os.X_OK
    )
    assert not (checkout.pristine / "models").exists()
    before = checkout.state("vendor/llama.cpp")
    checkout.sdist.unlink()
    assert run("fetch") == f"{checkout.pristine}: llama-cpp-python 1.0 is unpacked\n"
    assert checkout.state("vendor/llama.cpp") == before


def test_fetch_uses_the_cache_folder_of_the_environment(checkout, run, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    checkout.sdist.rename(tmp_path / "cache" / checkout.sdist.name)
    monkeypatch.setenv("SWAA_EDGE_CACHE", str(tmp_path / "cache"))
    run("fetch")
    assert (checkout.pristine / "src/a.cpp").exists() and not checkout.sdist.exists()


def test_fetch_refuses_another_hash(checkout, fail):
    got = upstream.sha256_of(checkout.sdist)
    checkout.pin("0" * 64)
    error = fail("fetch")
    assert error == f"{checkout.sdist}: sha256 is {got}, expected {'0' * 64}; delete it to download it again"
    assert not checkout.pristine.exists()


def test_fetch_downloads_by_pip_with_the_pinned_hash(checkout, run, tmp_path, monkeypatch):
    elsewhere, name, sha256 = tmp_path / "index", checkout.sdist.name, upstream.sha256_of(checkout.sdist)
    elsewhere.mkdir()
    checkout.sdist.rename(elsewhere / checkout.sdist.name)
    fake_pip(
        monkeypatch,
        "import sys, shutil; a = sys.argv; to = a[a.index('--dest') + 1]; wish = open(a[a.index('-r') + 1]).read();"
        f"assert wish == 'llama-cpp-python==1.0 --hash=sha256:{sha256}\\n', wish;"
        "assert a[a.index('--no-binary') + 1] == 'llama-cpp-python';"
        f"shutil.copy({str(elsewhere / name)!r}, to)",
    )
    run("fetch")
    assert checkout.sdist.exists() and (checkout.pristine / "src/a.cpp").exists()


def test_a_wrong_download_is_refused_and_not_kept(checkout, fail, monkeypatch):
    checkout.sdist.unlink()
    fake_pip(monkeypatch, "import sys; a = sys.argv; open(a[a.index('--dest') + 1] + '/x.tar.gz', 'w').write('evil')")
    assert "expected" in fail("fetch")
    assert [path.name for path in checkout.vendor.iterdir()] == [".lock"]


PINNED = "Could not find a version that satisfies the requirement llama-cpp-python==1.0"


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: x\nERROR: no space\nERROR: more\n", "no space"),
        (f"ERROR: {PINNED} (from versions: none)\n", f"{PINNED} (no network?)"),
        (f"ERROR: {PINNED} (from versions: 0.1, 0.2)\nERROR: No matching distribution\n", PINNED),
        ("Traceback:\n  x\nValueError: why\n\n", "ValueError: why"),
        ("", "no reason given"),
    ],
)
def test_a_failing_pip_is_one_line(checkout, fail, monkeypatch, stderr, reason):
    checkout.sdist.unlink()
    fake_pip(monkeypatch, f"import sys; sys.stderr.write({stderr!r}); sys.exit(1)")
    assert fail("fetch") == f"pip could not download llama-cpp-python 1.0: {reason}"
    assert [path.name for path in checkout.vendor.iterdir()] == [".lock"]


def test_pip_is_kept_from_the_outer_pips_environment(checkout, fail, monkeypatch):
    """Inside build isolation these would hide pip from its own Python, or give it the outer package's backend."""
    checkout.sdist.unlink()
    for key in ("PYTHONPATH", "PIP_BUILD_TRACKER", "_PYPROJECT_HOOKS_BACKEND_PATH", "PIP_CONSTRAINT"):
        monkeypatch.setenv(key, "/outer")
    fake_pip(monkeypatch, "import os, sys; sys.exit(str([k for k, v in os.environ.items() if v == '/outer']))")
    assert fail("fetch").endswith(": []")


def test_pip_is_found_where_the_running_python_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(upstream.sys, "executable", "/bin/false")
    monkeypatch.setattr(upstream.sys, "_base_executable", "/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(patchfile.PatchError, match="no pip found"):
        upstream._find_pip(dict(os.environ))
    (tmp_path / "pip3").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "pip3").chmod(0o755)
    assert upstream._find_pip(dict(os.environ)) == [str(tmp_path / "pip3")]


def member(name, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(f"llama_cpp_python-1.0/vendor/llama.cpp/{name}")
    info.type, info.linkname, info.size = kind, "/etc/passwd", 1 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "bad", [member("../../../../evil"), member("src/link", tarfile.SYMTYPE), member("f", tarfile.LNKTYPE)]
)
def test_a_hostile_archive_unpacks_nothing(checkout, fail, bad):
    checkout.pin(upstream.sha256_of(make_sdist(checkout.vendor, "1.0", UPSTREAM, [bad])))
    assert fail("fetch").endswith(f"member {bad.name} is not a plain file inside the tree")
    assert {path.name for path in checkout.vendor.iterdir()} == {".lock", checkout.sdist.name}


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_file_that_is_no_archive(checkout, fail, content):
    checkout.sdist.write_bytes(content)
    checkout.pin(upstream.sha256_of(checkout.sdist))
    assert "not a readable sdist" in fail("fetch")


def test_unpacking_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        upstream.unpack({"a": (b"", False), "a/b": (b"", False)}, tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []
