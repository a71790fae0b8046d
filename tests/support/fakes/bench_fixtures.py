"""Fixtures for benchmarks without the native library: a model file, and child processes with made-up times.

A made-up ubatch takes 1 + keys / 100 seconds under full attention and half of that with a window; a decoded token
takes 0.25 and 0.125 seconds. The unpatched library is half as fast.
"""

import pytest

from support.fakes.gguf_bytes import kv, model
from swaa_edge.bench import bound, client
from swaa_edge.bench.client import Timing


@pytest.fixture
def bench_model(tmp_path):
    """A model file of four layers with eight heads each, trained for 4096 tokens; no engine could run it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(model(extra=[kv("tokenizer.ggml.model", "str", "none")]))
    return path


class FakeRunner:
    """Measures no job, but returns the made-up times."""

    jobs = ()  # (folder name, job) of all instances
    all_patched = False
    gpus = ()
    fail_at = None  # (number of the job, exception)

    def __init__(self, library, environment=None):
        self.library, self.environment = library, environment
        patched = self.all_patched or library.name == "ours"
        self.facts = {"swaa": patched, "version": "1.0", "commit": "abc", "gpus": list(self.gpus)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, job, on_progress=None):
        if self.fail_at and len(self.jobs) == self.fail_at[0]:
            raise self.fail_at[1]
        self.jobs.append((self.library.name, job))
        if on_progress:
            on_progress(len(job.tokens))
        ubatches, decoded = self.times(job, len(self.jobs))
        return Timing(ubatches, sum(ubatches), decoded, 4 << 20, 2 << 20)

    def times(self, job, number):
        """Seconds of each ubatch and of each decoded token; the job is the number-th, from 1."""
        pace = (0.5 if "swaa.window_size" in job.overrides else 1.0) * (1 if self.facts["swaa"] else 2)
        # The first two jobs are ten times as slow as the others: a median must not change.
        pace *= 10 if number <= 2 else 1
        parts = bound.ubatches(len(job.tokens), job.engine.n_ubatch)
        return [(1 + bound.visible_full(*part) / 100) * pace for part in parts], [0.25 * pace] * job.decode


@pytest.fixture
def fake_runner(monkeypatch, tmp_path):
    """The class FakeRunner in place of `client.Runner`; the patched library is in the folder `ours`."""
    monkeypatch.setattr(client, "Runner", FakeRunner)
    monkeypatch.setattr(client.native, "library_dir", lambda: tmp_path / "ours")
    monkeypatch.setattr(FakeRunner, "jobs", [])
    return FakeRunner


@pytest.fixture
def baseline(tmp_path):
    """A folder that looks like that of an unpatched library."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "libllama.so").touch()
    return folder
