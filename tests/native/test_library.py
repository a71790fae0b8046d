"""Finding, loading and checking the patched library: every wrong one must end in one clear error."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import ROOT
from swaa_edge import native
from swaa_edge.errors import NativeLibraryError
from swaa_edge.native import abi, library

LIBRARY = library._FILE_NAMES[0]
REBUILD = "run `make setup` in the source tree, or reinstall swaa-edge"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """folders(name): a new folder that looks as if it held the library. Nothing else is found by the search."""
    monkeypatch.delenv("SWAA_EDGE_LIB_PATH", raising=False)
    monkeypatch.setattr(library, "_PACKAGE", tmp_path / "package")
    monkeypatch.setattr(sys, "path", [])

    def make(name):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / LIBRARY).write_bytes(b"")
        return folder

    return make


@pytest.fixture
def fresh(monkeypatch):
    """As if nothing had been loaded in this process."""
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.delitem(sys.modules, "llama_cpp.llama_cpp", raising=False)


def run_python(code, **environment):
    """Run code in a new interpreter that finds this tree; its exit code, stdout and last line of stderr."""
    env = {key: value for key, value in os.environ.items() if key != "LLAMA_CPP_LIB_PATH"} | environment
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.strip(), done.stderr.strip().split("\n")[-1]


def test_the_packages_own_folder_comes_before_the_path(folders, monkeypatch, tmp_path):
    installed = folders("site-packages/swaa_edge/lib")
    monkeypatch.setattr(sys, "path", ["/nowhere", str(tmp_path / "site-packages")])
    assert native.library_dir() == installed
    own = folders("package/lib")
    assert native.library_dir() == own


def test_the_variable_comes_first(folders, monkeypatch):
    folders("package/lib")
    chosen = folders("chosen")
    monkeypatch.setenv("SWAA_EDGE_LIB_PATH", str(chosen))
    assert native.library_dir() == chosen


def test_a_variable_that_points_to_nothing_is_an_error_though_another_folder_would_do(folders, monkeypatch, tmp_path):
    folders("package/lib")
    monkeypatch.setenv("SWAA_EDGE_LIB_PATH", str(tmp_path))
    with pytest.raises(NativeLibraryError) as caught:
        native.library_dir()
    assert str(caught.value) == (
        f"SWAA_EDGE_LIB_PATH = {tmp_path} does not contain {LIBRARY}; "
        "set it to the folder of the patched library, or unset it"
    )


def test_no_library_anywhere(folders):
    with pytest.raises(NativeLibraryError) as caught:
        native.library_dir()
    assert str(caught.value) == f"the patched llama.cpp library ({LIBRARY}) is not installed; {REBUILD}"


def test_llama_cpp_imported_first_with_another_library(fresh, monkeypatch):
    other = SimpleNamespace(_lib=SimpleNamespace(_name="/elsewhere/libllama.so"))
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", other)
    with pytest.raises(NativeLibraryError) as caught:
        native.load()
    assert str(caught.value) == (
        "llama_cpp was imported first, with another library (/elsewhere/libllama.so); "
        "put `from swaa_edge import SwaaLlama` before every import of llama_cpp"
    )


def test_llama_cpp_is_missing(fresh, folders, monkeypatch):
    folders("package/lib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NativeLibraryError) as caught:
        native.load()
    assert str(caught.value) == "llama-cpp-python is not installed; pip install llama-cpp-python==0.3.36"


def test_another_release_of_llama_cpp(fresh, folders, monkeypatch):
    folders("package/lib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.37")
    with pytest.raises(NativeLibraryError) as caught:
        native.load()
    assert str(caught.value) == (
        "llama-cpp-python 0.3.37 does not fit the patched library, which needs 0.3.36; "
        "pip install llama-cpp-python==0.3.36"
    )
    assert "llama_cpp.llama_cpp" not in sys.modules


def test_a_library_without_swaa_or_with_another_version_of_it():
    plain = SimpleNamespace(_name="/lib/libllama.so")
    with pytest.raises(NativeLibraryError) as caught:
        abi.check(plain)
    assert str(caught.value) == f"/lib/libllama.so is a llama.cpp without SWAA; {REBUILD}"
    newer = SimpleNamespace(_name="/lib/libllama.so", llama_swaa_abi_version=lambda: 7)
    with pytest.raises(NativeLibraryError) as caught:
        abi.check(newer)
    assert str(caught.value) == (
        f"/lib/libllama.so has version 7 of the SWAA functions, but this swaa-edge needs {abi.ABI_VERSION}; {REBUILD}"
    )


def test_a_damaged_library_leaves_the_environment_as_it_was(tmp_path):
    (tmp_path / LIBRARY).write_text("not a library")
    code = """
import os
from swaa_edge import SwaaError, native
try:
    native.load()
except SwaaError as error:
    print(error)
print(os.environ["LLAMA_CPP_LIB_PATH"])
"""
    status, out, _ = run_python(code, SWAA_EDGE_LIB_PATH=str(tmp_path), LLAMA_CPP_LIB_PATH="/mine")
    message, variable = out.split("\n")
    assert message.startswith(f"the library in {tmp_path} can't be loaded: ") and message.endswith(REBUILD)
    assert (status, variable) == (0, "/mine")


def test_reading_a_config_needs_neither_library_nor_torch():
    code = (
        "import sys, swaa_edge; swaa_edge.SwaaConfig(8); print([m for m in ('torch', 'llama_cpp') if m in sys.modules])"
    )
    assert run_python(code, SWAA_EDGE_LIB_PATH="/nowhere") == (0, "[]", "")


@pytest.fixture
def built():
    """The folder of the built library."""
    return native.library_dir()


@pytest.mark.native
@pytest.mark.parametrize("folder", [ROOT, Path("/")])
def test_the_library_is_found_from_anywhere_and_torch_stays_out(built, folder):
    code = (
        "import sys; from swaa_edge import SwaaLlama, native; "
        "print(native.load().llama_cpp._lib._name, 'torch' in sys.modules)"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("LLAMA_CPP_LIB_PATH", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True)
    assert done.stdout.strip() == f"{built / LIBRARY} False", done.stderr


@pytest.mark.native
def test_a_variable_meant_for_other_programs_is_set_aside_and_put_back(built):
    code = """
import os
from swaa_edge import native
print(native.load().llama_cpp._lib._name, os.environ["LLAMA_CPP_LIB_PATH"])
"""
    status, out, error = run_python(code, LLAMA_CPP_LIB_PATH="/elsewhere")
    assert (status, out) == (0, f"{built / LIBRARY} /elsewhere"), error


@pytest.mark.native
def test_llama_cpp_may_come_first_if_it_runs_on_the_patched_library(built):
    code = "import llama_cpp; from swaa_edge import SwaaLlama; print(issubclass(SwaaLlama, llama_cpp.Llama))"
    status, out, error = run_python(code, LLAMA_CPP_LIB_PATH=str(built))
    assert (status, out) == (0, "True"), error


@pytest.mark.native
def test_llama_cpp_on_the_unpatched_library_is_refused(built):
    baseline = ROOT / "build" / "baseline" / "lib"
    if not (baseline / LIBRARY).exists():
        pytest.skip("no unpatched library; make baseline builds it")
    code = "import llama_cpp; from swaa_edge import SwaaLlama"
    status, _, error = run_python(code, LLAMA_CPP_LIB_PATH=str(baseline))
    assert status == 1
    assert error.startswith("swaa_edge.errors.NativeLibraryError: llama_cpp was imported first, with another library")


@pytest.mark.native
def test_an_old_build_is_refused(built):
    code = """
from swaa_edge.native import abi, load
abi.ABI_VERSION = 99
load()
"""
    status, _, error = run_python(code)
    assert status == 1
    assert error == (
        f"swaa_edge.errors.NativeLibraryError: {built / LIBRARY} has version {abi.ABI_VERSION} "
        f"of the SWAA functions, but this swaa-edge needs 99; {REBUILD}"
    )
