"""Loading backends that are files of their own, without AMX where the processor only claims to have it."""

import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from swaa_edge.errors import NativeLibraryError
from swaa_edge.native import backends

x86_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="AMX is found on Linux on x86 only"
)


class Ggml:
    """A library whose CPU backend appears once the backends of a folder are loaded."""

    def __init__(self, cpu_after=1):
        self.loaded = []
        self.ggml_backend_dev_by_type = self._function(lambda kind: len(self.loaded) >= cpu_after)
        self.ggml_backend_load_all_from_path = self._function(self._load)

    def _load(self, folder):
        self.loaded.append((folder.decode(), sorted(os.listdir(folder.decode()))))

    @staticmethod
    def _function(call):
        class Function(SimpleNamespace):
            def __call__(self, *arguments):
                return call(*arguments)

        return Function()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of three CPU backends, of which sapphirerapids uses AMX, and one for CUDA."""
    for name in ("libggml.so", "libggml-base.so", "libggml-cuda.so"):
        (tmp_path / name).write_bytes(b"")
    for name in ("haswell", "icelake", "sapphirerapids"):
        (tmp_path / f"libggml-cpu-{name}.so").write_bytes(b"")
    monkeypatch.setattr(backends, "amx_backends", lambda folder: [tmp_path / "libggml-cpu-sapphirerapids.so"])
    return tmp_path


def die():
    os.kill(os.getpid(), signal.SIGILL)


def test_a_library_with_its_backends_built_in_loads_none(folder):
    ggml = Ggml(cpu_after=0)
    backends.load_backends(ggml, folder, amx_works=pytest.fail)
    assert ggml.loaded == []


def test_where_amx_works_all_backends_are_offered(folder):
    ggml = Ggml()
    backends.load_backends(ggml, folder, amx_works=lambda: True)
    assert ggml.loaded == [(str(folder), sorted(os.listdir(folder)))]


def test_where_amx_kills_its_backend_is_left_out_and_the_others_are_not(folder):
    ggml = Ggml()
    backends.load_backends(ggml, folder, amx_works=lambda: backends.survives(die))
    [(offered, names)] = ggml.loaded
    assert offered != str(folder)
    assert names == [
        "libggml-base.so",
        "libggml-cpu-haswell.so",
        "libggml-cpu-icelake.so",
        "libggml-cuda.so",
        "libggml.so",
    ]


def test_no_backend_for_this_processor(folder):
    with pytest.raises(NativeLibraryError) as caught:
        backends.load_backends(Ggml(cpu_after=2), folder, amx_works=lambda: True)
    assert str(caught.value) == (
        f"no CPU backend in {folder} runs on this processor ({platform.machine()}); "
        "build swaa-edge from source on this machine"
    )


def test_the_processor_is_not_tried_where_no_backend_uses_amx(folder, monkeypatch):
    monkeypatch.setattr(backends, "amx_backends", lambda folder: [])
    backends.load_backends(Ggml(), folder, amx_works=pytest.fail)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_returns_dies_or_raises(capfd):
    assert backends.survives(lambda: None)
    assert not backends.survives(die)
    assert not backends.survives(lambda: 1 / 0)
    assert capfd.readouterr() == ("", "")


@x86_linux
def test_the_instructions_are_really_run(monkeypatch):
    # A system call that always succeeds stands in for the one by which the kernel hands out tile registers.
    monkeypatch.setattr(backends, "_SYS_ARCH_PRCTL", 24)  # sched_yield
    monkeypatch.setattr(backends, "_TILE_CODE", b"\xc3")  # ret
    assert backends.tile_instructions_work()
    monkeypatch.setattr(backends, "_TILE_CODE", b"\x0f\x0b")  # ud2, the illegal instruction
    assert not backends.tile_instructions_work()


@x86_linux
def test_the_tile_code_is_illegal_without_amx(monkeypatch):
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor claims to have AMX")
    monkeypatch.setattr(backends, "_SYS_ARCH_PRCTL", 24)
    assert not backends.tile_instructions_work()


@x86_linux
def test_where_the_kernel_hands_out_no_tile_registers_ggml_leaves_amx_alone(monkeypatch):
    monkeypatch.setattr(backends, "_SYS_ARCH_PRCTL", 9999)  # no such system call
    monkeypatch.setattr(backends, "_TILE_CODE", b"\x0f\x0b")
    assert backends.tile_instructions_work()


@x86_linux
def test_amx_is_read_off_the_score(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler")
    # Scores of upstream's variants on a processor with everything: one bit per feature, AMX is the twelfth.
    scores = {"haswell": 0x40, "sapphirerapids": 0xFC0, "icelake": 0x5C0, "alderlake": 0x80, "other": 0}
    for name, score in scores.items():
        source = tmp_path / f"{name}.c"
        source.write_text(f"int ggml_backend_score(void) {{ return {score}; }}")
        library = tmp_path / f"libggml-cpu-{name}.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    (tmp_path / "libggml-cpu-broken.so").write_bytes(b"no library")
    assert backends.amx_backends(tmp_path) == [tmp_path / "libggml-cpu-sapphirerapids.so"]
    assert ctypes.CDLL(str(tmp_path / "libggml-cpu-icelake.so")).ggml_backend_score() == 0x5C0
