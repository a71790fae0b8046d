"""The program of client.py's child processes. Times jobs with one llama.cpp library.

Only llama.cpp's C interface is used, so that unpatched libraries work too.

    main("build/baseline/lib")   # reads jobs from stdin and writes results to stdout, one JSON document per line
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swaa_edge.bench.client import Job, Timing
from swaa_edge.engine.settings import CACHE_TYPES

_MIB = 1 << 20
# enum ggml_backend_dev_type: GPU, IGPU
_DEVICE_GPU = (1, 2)


def main(library: str) -> None:
    """Run the jobs from stdin and write the results to stdout, until stdin ends."""
    # Ctrl-C reaches the whole process group, but the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    results = os.fdopen(os.dup(1), "w")
    # Send C's output to stderr, away from the results.
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        print(json.dumps(message), file=results, flush=True)

    try:
        engine = _Engine(Path(library))
    except Exception as error:
        send(error=f"the library in {library} does not load: {' '.join(str(error).split())}")
        return
    send(**engine.facts())
    for line in _lines_of_stdin():
        try:
            timing = engine.measure(Job.from_json(line), lambda done: send(progress=done))
        except _Refused as error:
            send(error=str(error))
        else:
            send(**dataclasses.asdict(timing))


def _lines_of_stdin() -> Iterator[str]:
    """Yield the lines of stdin. At the end of stdin, exit even in the middle of a job: the parent process has ended."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


class _Refused(Exception):
    pass


class _Engine:
    """A llama.cpp library with at most one model in memory."""

    def __init__(self, library: Path) -> None:
        from swaa_edge.native.backends import load_backends

        os.environ["LLAMA_CPP_LIB_PATH"] = os.fspath(library)
        import llama_cpp.llama_cpp as api

        self.api = api
        self.swaa = hasattr(api._lib, "llama_swaa_set_decode_from")
        if self.swaa:
            from swaa_edge import native

            native.load()
        else:
            load_backends(api._lib, library)
        self._lines: list[str] = []
        self._listener = api.llama_log_callback(self._listen)
        api.llama_log_set(self._listener, None)
        api.llama_backend_init()
        self._model, self._loaded = None, None

    def facts(self) -> dict[str, Any]:
        lib = self.api._lib
        lib.ggml_version.restype = lib.ggml_commit.restype = ctypes.c_char_p
        lib.ggml_backend_dev_count.restype, lib.ggml_backend_dev_get.restype = ctypes.c_size_t, ctypes.c_void_p
        lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
        lib.ggml_backend_dev_type.argtypes = lib.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
        lib.ggml_backend_dev_description.restype = ctypes.c_char_p
        # In llama.cpp's order.
        devices = map(lib.ggml_backend_dev_get, range(lib.ggml_backend_dev_count()))
        gpus = [device for device in devices if lib.ggml_backend_dev_type(device) in _DEVICE_GPU]
        return {
            "swaa": self.swaa,
            "version": lib.ggml_version().decode(),
            "commit": lib.ggml_commit().decode(),
            "gpus": [lib.ggml_backend_dev_description(device).decode("utf-8", "replace") for device in gpus],
        }

    def _listen(self, level: int, text: bytes, _data: Any) -> None:
        line = text.decode("utf-8", "replace")
        self._lines.append(line)
        sys.stderr.write(line)

    def measure(self, job: Job, on_progress: Callable[[int], object]) -> Timing:
        self._load(job)
        self._lines.clear()
        n_ubatch = job.engine.n_ubatch
        context = self._context(job)
        try:
            compute, kv = (_buffer_bytes(self._lines, kind) for kind in ("compute", "KV"))
            batch = self.api.llama_batch_init(n_ubatch, 0, 1)
            try:
                # Warm-up, not timed: a fresh context still has to set up pages, graphs and caches.
                ubatches, n = [], len(job.tokens)
                self._decode(context, batch, job.tokens[:n_ubatch], 0, decode_from=n)
                self._decode(context, batch, job.tokens[:1], min(n, n_ubatch), decode_from=0)
                self.api.llama_memory_clear(self.api.llama_get_memory(context), False)
                boundary, cpu = max(n - self._tail_count(), 0), time.process_time()
                for start in range(0, n, n_ubatch):
                    part = job.tokens[start : start + n_ubatch]
                    end = start + len(part)
                    ubatches.append(self._decode(context, batch, part, start, decode_from=boundary, logits=end == n))
                    on_progress(end)
                cpu = time.process_time() - cpu
                decoded = [
                    self._decode(context, batch, [job.tokens[i % n]], n + i, decode_from=boundary)
                    for i in range(job.decode)
                ]
            finally:
                self.api.llama_batch_free(batch)
        finally:
            self.api.llama_free(context)
        return Timing(ubatches, cpu, decoded, compute, kv)

    def _load(self, job: Job) -> None:
        """Load the job's model with its overrides, unless already loaded. The previous model is freed first."""
        requested = (job.model, dict(job.overrides), job.engine.n_gpu_layers)
        if requested == self._loaded:
            return
        if self._model:
            self.api.llama_model_free(self._model)
        self._model, self._loaded = None, None
        self._lines.clear()
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = job.engine.n_gpu_layers if job.engine.n_gpu_layers >= 0 else 0x7FFFFFFF
        params.kv_overrides = self._overrides(job.overrides)
        self._model = self.api.llama_model_load_from_file(os.fsencode(job.model), params)
        if not self._model:
            raise _Refused(self._reason(f"llama.cpp can't load {job.model}"))
        self._loaded = requested

    def _overrides(self, given: Mapping[str, Any]) -> Any:
        array = (self.api.llama_model_kv_override * (len(given) + 1))()  # an empty entry ends the list
        for entry, (key, value) in zip(array, given.items(), strict=False):
            entry.key = key.encode()
            if isinstance(value, bool):
                entry.tag, entry.value.val_bool = self.api.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
            elif isinstance(value, int):
                entry.tag, entry.value.val_i64 = self.api.LLAMA_KV_OVERRIDE_TYPE_INT, value
            else:
                entry.tag, entry.value.val_str = self.api.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        return array

    def _context(self, job: Job) -> Any:
        params, settings = self.api.llama_context_default_params(), job.engine
        params.n_ctx, params.n_batch, params.n_ubatch = job.n_ctx, settings.n_batch, settings.n_ubatch
        # The same defaults as in llama_cpp.Llama.
        params.n_threads = settings.n_threads or max((os.cpu_count() or 1) // 2, 1)
        params.n_threads_batch = settings.n_threads or os.cpu_count() or 1
        params.type_k = params.type_v = CACHE_TYPES[settings.cache_type]
        params.swa_full = settings.swa_full
        params.flash_attn_type = int(job.flash_attn)  # LLAMA_FLASH_ATTN_TYPE_ENABLED or _DISABLED
        context = self.api.llama_init_from_model(self._model, params)
        if not context:
            raise _Refused(self._reason(f"llama.cpp can't make a context of {job.n_ctx} tokens; too little memory?"))
        return context

    def _decode(
        self, context: Any, batch: Any, tokens: Sequence[int], at: int, *, decode_from: int, logits: bool = True
    ) -> float:
        """Run llama_decode on `tokens` from position `at`, and return the seconds.

        decode_from: the decode boundary.
        logits: whether to compute the logits of the last token.
        """
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = logits and i == len(tokens) - 1
        if self.swaa:
            self.api._lib.llama_swaa_set_decode_from(context, 0, decode_from)
        started = time.perf_counter()
        code = self.api.llama_decode(context, batch)
        self.api.llama_synchronize(context)
        seconds = time.perf_counter() - started
        if code != 0:
            raise _Refused(self._reason(f"the engine failed at token {at} (llama_decode returned {code})"))
        return seconds

    def _tail_count(self) -> int:
        from swaa_edge import native

        config = native.model_config(self._model) if self.swaa else None
        return config.tail_count if config else 0

    def _reason(self, text: str) -> str:
        swaa = self.api._lib.llama_swaa_last_error().decode("utf-8", "replace") if self.swaa else ""
        logged = [line.strip() for line in self._lines if "rror" in line or "ailed" in line]
        return text + (f": {swaa or logged[-1][:300]}" if swaa or logged else "")


def _buffer_bytes(log: Sequence[str], kind: str) -> int:
    """Return the total bytes of all `kind` buffers. llama.cpp's log gives the sizes in MiB with two decimals."""
    # A log callback may receive one line in several pieces.
    found = re.findall(rf"{kind} buffer size = *([0-9.]+) MiB", "".join(log))
    return round(sum(map(float, found)) * _MIB)
