"""One side of a comparison: a child process that holds one llama.cpp library and times prompts on request.

Two builds of llama.cpp can't live in one process, and a crash in C must not take the results along. A child
stays alive between its turns, so sides really alternate and neither start-up nor model loading is timed.

    with Runner(native.library_dir()) as runner: timing = runner.measure(Job(model="m.gguf", tokens=[1] * 4096))
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swaa_edge.errors import GenerationError, NativeLibraryError

# Without the user's current folder on sys.path, and with the very package that starts it.
_PROGRAM = """
import sys
sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]
from swaa_edge.benchrun import main
main(sys.argv[1])
"""
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement: prefill `tokens`, then feed `decode` more, one at a time. Sizes in tokens.

    threads, prefill_threads: None for what SwaaLlama takes by itself. cache_type: number of the ggml type.
    """

    model: str
    tokens: Sequence[int]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decode: int = 0
    n_ctx: int = 0
    n_batch: int = 512
    n_ubatch: int = 512
    threads: int | None = None
    prefill_threads: int | None = None
    cache_type: int = 1
    gpu_layers: int = -1


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a job took: seconds of each ubatch and of each decoded token, and bytes of the context's buffers.

    cpu_seconds: processor time of the whole prefill, all threads. Where a CPU alone computes, less than
    threads times seconds means that other programs took the rest.
    """

    ubatch_seconds: list[float]
    cpu_seconds: float
    decode_seconds: list[float]
    compute_bytes: int
    kv_bytes: int


class Runner:
    """A child process with the libllama of the folder `library`.

    facts: "swaa" (whether it is a patched one), "version" and "commit" of its ggml. Raises
    `NativeLibraryError` if the library doesn't load.
    """

    def __init__(self, library: str | os.PathLike[str]) -> None:
        self.library = Path(library)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        package = str(Path(__file__).resolve().parent.parent)
        self._child = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, package, os.fspath(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.facts = self._answer(NativeLibraryError)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(self, job: Job, on_progress: Callable[[int], object] | None = None) -> Timing:
        """Run `job`; on_progress is called with the prompt tokens done, after each ubatch.

        Raises `GenerationError` if the engine refuses or dies; then no more jobs can run here.
        """
        try:
            print(json.dumps(dataclasses.asdict(job)), file=self._child.stdin, flush=True)
        except BrokenPipeError:
            raise GenerationError(self._death()) from None
        return Timing(**self._answer(GenerationError, on_progress))

    def close(self) -> None:
        """End the child, whatever it does."""
        self._child.kill()
        self._child.wait()
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.stdout.close()
        self._log.close()

    def _answer(self, kind: type[Exception], on_progress: Callable[[int], object] | None = None) -> dict[str, Any]:
        for line in self._child.stdout:
            message = json.loads(line)
            if "progress" in message:
                if on_progress:
                    on_progress(message["progress"])
            elif "error" in message:
                raise kind(message["error"])
            else:
                return message
        raise kind(self._death())

    def _death(self) -> str:
        code = self._child.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        last = f": {lines[-1][:300]}" if lines else ""
        if code == -signal.SIGKILL:
            return "the measuring process was killed, most likely because memory ran out; take shorter prompts"
        ended = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"the process that measures with {self.library} {ended}{last}"


# The child


def main(library: str) -> None:
    """Answer jobs from stdin on stdout, one JSON document a line, until stdin ends."""
    # Ctrl-C reaches the whole group of processes; the parent decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    # Whatever C prints must not get between the answers.
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        engine = _Engine(Path(library))
    except Exception as error:
        send(error=f"the library in {library} does not load: {' '.join(str(error).split())}")
        return
    send(**engine.facts())
    for line in sys.stdin:
        try:
            timing = engine.measure(Job(**json.loads(line)), lambda done: send(progress=done))
        except _Refused as error:
            send(error=str(error))
        else:
            send(**dataclasses.asdict(timing))


class _Refused(Exception):
    pass


class _Engine:
    """llama.cpp by its C interface alone, which the patched and the unpatched library have in common."""

    def __init__(self, library: Path) -> None:
        from swaa_edge.backends import load_backends

        os.environ["LLAMA_CPP_LIB_PATH"] = os.fspath(library)
        import llama_cpp.llama_cpp as api

        self.api = api
        self.swaa = hasattr(api._lib, "llama_swaa_set_phase")
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
        return {"swaa": self.swaa, "version": lib.ggml_version().decode(), "commit": lib.ggml_commit().decode()}

    def _listen(self, level: int, text: bytes, _data: Any) -> None:
        line = text.decode("utf-8", "replace")
        self._lines.append(line)
        sys.stderr.write(line)

    def measure(self, job: Job, on_progress: Callable[[int], object]) -> Timing:
        self._load(job)
        self._lines.clear()
        context = self._context(job)
        try:
            compute, kv = (_buffer_bytes(self._lines, kind) for kind in ("compute", "KV"))
            batch = self.api.llama_batch_init(job.n_ubatch, 0, 1)
            try:
                # The first pages, graphs and caches of a fresh context cost time that is none of the prompt's.
                self._decode(context, batch, job.tokens[: job.n_ubatch], 0, prefill=True)
                self._decode(context, batch, job.tokens[:1], min(len(job.tokens), job.n_ubatch), prefill=False)
                self.api.llama_memory_clear(self.api.llama_get_memory(context), False)
                ubatches, n, cpu = [], len(job.tokens), time.process_time()
                for start in range(0, n, job.n_ubatch):
                    part = job.tokens[start : start + job.n_ubatch]
                    end = start + len(part)
                    ubatches.append(self._decode(context, batch, part, start, prefill=True, logits=end == n))
                    on_progress(end)
                cpu = time.process_time() - cpu
                decoded = [
                    self._decode(context, batch, [job.tokens[i % n]], n + i, prefill=False) for i in range(job.decode)
                ]
            finally:
                self.api.llama_batch_free(batch)
        finally:
            self.api.llama_free(context)
        return Timing(ubatches, cpu, decoded, compute, kv)

    def _load(self, job: Job) -> None:
        """Have the job's model under its overrides; one at a time, so that memory holds one model per side."""
        wanted = (job.model, dict(job.overrides), job.gpu_layers)
        if wanted == self._loaded:
            return
        if self._model:
            self.api.llama_model_free(self._model)
        self._model, self._loaded = None, None
        self._lines.clear()
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = job.gpu_layers if job.gpu_layers >= 0 else 0x7FFFFFFF
        overrides = self._overrides(job.overrides)
        params.kv_overrides = overrides
        self._model = self.api.llama_model_load_from_file(os.fsencode(job.model), params)
        if not self._model:
            raise _Refused(self._reason(f"llama.cpp can't load {job.model}"))
        self._loaded = wanted

    def _overrides(self, given: Mapping[str, Any]) -> Any:
        array = (self.api.llama_model_kv_override * (len(given) + 1))()  # the last, empty one ends the list
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
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = job.n_ctx, job.n_batch, job.n_ubatch
        params.n_threads = job.threads or max((os.cpu_count() or 1) // 2, 1)
        params.n_threads_batch = job.prefill_threads or os.cpu_count() or 1
        params.type_k = params.type_v = job.cache_type
        params.flash_attn_type = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = self.api.llama_init_from_model(self._model, params)
        if not context:
            raise _Refused(self._reason(f"llama.cpp can't make a context of {job.n_ctx} tokens; too little memory?"))
        return context

    def _decode(
        self, context: Any, batch: Any, tokens: Sequence[int], at: int, *, prefill: bool, logits: bool = True
    ) -> float:
        """Seconds of one llama_decode of `tokens` from position `at`; logits: of the last one."""
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = logits and i == len(tokens) - 1
        if self.swaa:
            self.api._lib.llama_swaa_set_phase(context, 1 if prefill else 2)
        started = time.perf_counter()
        code = self.api.llama_decode(context, batch)
        self.api.llama_synchronize(context)
        seconds = time.perf_counter() - started
        if code != 0:
            raise _Refused(self._reason(f"the engine failed at token {at} (llama_decode returned {code})"))
        return seconds

    def _reason(self, text: str) -> str:
        swaa = self.api._lib.llama_swaa_last_error().decode("utf-8", "replace") if self.swaa else ""
        logged = [line.strip() for line in self._lines if "rror" in line or "ailed" in line]
        return text + (f": {swaa or logged[-1][:300]}" if swaa or logged else "")


def _buffer_bytes(log: Sequence[str], kind: str) -> int:
    """The sum over devices of what llama.cpp logs as `kind` buffer size, in bytes; it logs MiB of two decimals."""
    # llama.cpp writes a line in one piece, but a log callback may get it in several.
    found = re.findall(rf"{kind} buffer size = *([0-9.]+) MiB", "".join(log))
    return round(sum(map(float, found)) * _MIB)
