"""The parent side: jobs as lines, libraries by folder, and children that die, refuse or outlive nobody."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import pytest

from swaa_edge import native
from swaa_edge.bench import client
from swaa_edge.bench.client import Job, Runner, libraries
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import GenerationError, NativeLibraryError
from swaa_edge.shapes import write_shape


def test_a_job_survives_its_line():
    job = Job("m.gguf", [1, 2], EngineSettings(n_ubatch=7), {"swaa.enabled": False}, 3, flash_attn=False)
    assert Job.from_json(job.to_json()) == job and "\n" not in job.to_json()


def test_a_library_below_the_working_directory_is_named_from_there(tmp_path, monkeypatch):
    class Known:
        library, facts = tmp_path / "build" / "lib", {"swaa": True, "version": "1", "commit": "c", "gpus": []}

    assert client.described(Known)["path"] == (tmp_path / "build" / "lib").as_posix()
    monkeypatch.chdir(tmp_path)
    assert client.described(Known)["path"] == "build/lib"


def test_only_one_library_is_without_our_kernels(fake_runner, baseline):
    with libraries(baseline, upstream_kernels=True) as runners:
        found = {name: (runner.library.name, runner.environment) for name, runner in runners.items()}
    assert found == {
        "patched": ("ours", None),
        "upstream kernels": ("ours", {"GGML_CPU_FATTN": "0"}),
        "unpatched": ("base", None),
    }
    with libraries() as runners:
        assert list(runners) == ["patched"]


def test_libraries_of_two_releases_are_not_compared(fake_runner, baseline, monkeypatch):
    made = fake_runner.__init__

    def older(self, library, environment=None):
        made(self, library, environment)
        if library.name == "base":
            self.facts["version"] = "0.9"

    monkeypatch.setattr(fake_runner, "__init__", older)
    message = r"is from another llama.cpp release \(its ggml is 0\.9, the patched library's is 1\.0\)"
    with pytest.raises(NativeLibraryError, match=message), libraries(baseline):
        pass


# With the engine


@pytest.mark.native
def test_a_child_that_dies_is_one_line(tmp_path):
    shape = write_shape(tmp_path / "shape.gguf", "qwen3-0.6b", layers=1, vocab=300)
    with Runner(native.library_dir()) as runner:
        job = Job(str(shape), [1, 2, 3], EngineSettings())
        assert len(runner.measure(job).ubatch_seconds) == 1
        # A refusal leaves the child alive.
        with pytest.raises(GenerationError, match="the engine failed at token 0"):
            runner.measure(dataclasses.replace(job, tokens=[1 << 20]))
        with pytest.raises(GenerationError, match=r"llama\.cpp can't load none\.gguf"):
            runner.measure(dataclasses.replace(job, model="none.gguf"))
        assert len(runner.measure(job).ubatch_seconds) == 1
        os.kill(runner._child.pid, signal.SIGABRT)
        with pytest.raises(GenerationError, match="died of SIGABRT"):
            runner.measure(job)


@pytest.mark.native
def test_a_folder_without_a_library_is_refused(tmp_path):
    (tmp_path / "libllama.so").write_text("no library")
    with pytest.raises(NativeLibraryError, match=f"the library in {tmp_path} does not load: ") as error:
        Runner(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads another process's environment")
def test_a_childs_variables_are_its_own():
    before = dict(os.environ)
    with Runner(native.library_dir(), {"GGML_CPU_FATTN": "0"}) as runner:
        variables = Path(f"/proc/{runner._child.pid}/environ").read_bytes().split(b"\0")
    assert b"GGML_CPU_FATTN=0" in variables and dict(os.environ) == before
