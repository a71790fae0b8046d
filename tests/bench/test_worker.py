"""The child program: sizes from llama.cpp's log, and the settings of a job that must reach the engine."""

import dataclasses

import pytest

from swaa_edge import native
from swaa_edge.bench import worker
from swaa_edge.bench.client import Job, Runner
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.shapes import write_shape


def test_buffer_sizes_come_from_the_log():
    log = ["llama_kv_cache:        CPU KV buffer size =  ", "128.50 MiB\n", "x:  CPU  output buffer size = 9.00 MiB\n"]
    log += ["sched_reserve:      CUDA0 compute buffer size =   300.75 MiB\n"]
    log += ["sched_reserve:        CPU compute buffer size =     1.25 MiB\n"]
    assert worker._buffer_bytes(log, "KV") == int(128.5 * 2**20)
    assert worker._buffer_bytes(log, "compute") == 302 << 20
    assert worker._buffer_bytes([], "KV") == 0


@pytest.mark.native
def test_settings_of_a_job_reach_the_engine(tmp_path):
    path = write_shape(tmp_path / "shape.gguf", "qwen3-0.6b", layers=1, vocab=300)
    job = Job(str(path), [1] * 1024, EngineSettings(n_ctx=2048, n_threads=1), decode=1)
    with Runner(native.library_dir()) as runner:
        flash = runner.measure(job)
        plain = runner.measure(dataclasses.replace(job, flash_attn=False))
        q8_0 = runner.measure(dataclasses.replace(job, engine=dataclasses.replace(job.engine, cache_type="q8_0")))
    # Without flash attention the scores of all heads are a tensor: 16 heads, 512 rows, 2048 columns of 4 bytes.
    assert plain.compute_bytes - flash.compute_bytes > 16 * 512 * 2048 * 4 / 2
    # K and V of 8 heads of 128 numbers: 2 bytes each, or 34 bytes for 32 of them.
    assert flash.kv_bytes == 2048 * 2 * 8 * 128 * 2 and q8_0.kv_bytes == flash.kv_bytes * 34 // 64
