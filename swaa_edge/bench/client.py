"""One side of a comparison: a child process that holds one llama.cpp library and times prompts on request.

Two builds of llama.cpp can't live in one process, and a crash in C must not take the results along. A child
stays alive between its turns, so sides really alternate and neither start-up nor model loading is timed.

    with Runner(native.library_dir()) as runner: timing = runner.measure(Job(model="m.gguf", tokens=[1] * 4096))
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swaa_edge.errors import GenerationError, NativeLibraryError

# Without the user's current folder on sys.path, and with the very package that starts it.
_PROGRAM = """
import sys
sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]
from swaa_edge.bench.worker import main
main(sys.argv[1])
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement: prefill `tokens`, then feed `decode` more, one at a time. Sizes in tokens.

    threads, prefill_threads: None for what SwaaLlama takes by itself. cache_type: number of the ggml type.
    swa_full: keep K and V of the whole context where a ring would do. flash_attn: False only for full attention, and
    not with a quantized cache.
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
    swa_full: bool = False
    flash_attn: bool = True


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

    facts: "swaa" (whether it is a patched one), "version" and "commit" of its ggml, "gpus" (their names). Raises
    `NativeLibraryError` if the library doesn't load.
    """

    def __init__(self, library: str | os.PathLike[str]) -> None:
        self.library = Path(library)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        package = str(Path(__file__).resolve().parents[2])
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
