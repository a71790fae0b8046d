"""The parent process of a measurement. Starts one child process per llama.cpp library to time prompts.

Two builds of llama.cpp can't share a process, and a crash in C must not lose the results. A child stays alive between
its turns, so that a turn needs no start-up.

    with Runner(native.library_dir()) as runner:
        timing = runner.measure(Job("model.gguf", [1] * 4096, EngineSettings()))
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swaa_edge import native
from swaa_edge.engine.settings import EngineSettings, round_up
from swaa_edge.errors import GenerationError, NativeLibraryError

#: Names of the libraries.
PATCHED, UNPATCHED, UPSTREAM_KERNELS = "patched", "unpatched", "upstream kernels"
# Leaves attention to upstream's kernels. The library reads the variable when attention is first computed.
_KERNELS_OFF = {"GGML_CPU_FATTN": "0"}

# The child imports the parent's own package, and nothing from the user's current folder.
_PROGRAM = """
import sys
sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]
from swaa_edge.bench.worker import main
main(sys.argv[1])
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement: prefill `tokens`, then decode `decode` more tokens, one at a time.

    engine: settings. n_ubatch must not exceed n_batch.
    overrides: llama.cpp's kv_overrides.
    flash_attn: whether to use flash attention. False is allowed only under full attention with an f16 cache.
    """

    model: str
    tokens: Sequence[int]
    engine: EngineSettings
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decode: int = 0
    flash_attn: bool = True

    @property
    def n_ctx(self) -> int:
        """The context size: room for the job, but at least `engine.n_ctx`, rounded up to whole blocks of cells."""
        # The warm-up takes a ubatch and one token.
        warm_up = min(len(self.tokens), self.engine.n_ubatch) + 1
        return round_up(max(len(self.tokens) + self.decode, warm_up, self.engine.n_ctx or 0))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Job:
        fields = json.loads(line)
        return cls(**fields | {"engine": EngineSettings(**fields["engine"])})


@dataclasses.dataclass(frozen=True)
class Timing:
    """The result of a job: seconds per ubatch and per decoded token, and bytes of the context's buffers.

    cpu_seconds: processor time of the prefill, summed over all threads. Without a GPU, the expected value is the number
        of threads times the prefill's seconds. If the value is lower, other programs used the processor.
    """

    ubatch_seconds: list[float]
    cpu_seconds: float
    decode_seconds: list[float]
    compute_bytes: int
    kv_bytes: int


class Runner(contextlib.AbstractContextManager):
    """A child process that runs the libllama in the folder `library`.

    environment: variables to add to the child's environment.

    The attribute `facts` is a dict. "swaa" tells whether the library is patched, and "gpus" names the GPUs that the
    library found. "version" and "commit" describe ggml.

    Raises `NativeLibraryError` if the library does not load.
    """

    def __init__(self, library: str | os.PathLike[str], environment: Mapping[str, str] | None = None) -> None:
        self.library = Path(library)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        package = str(Path(__file__).resolve().parents[2])
        self._child = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, package, os.fspath(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.facts = self._response(NativeLibraryError)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(self, job: Job, on_progress: Callable[[int], object] | None = None) -> Timing:
        """Run `job`. After each ubatch, on_progress receives the number of prefilled tokens.

        Raises `GenerationError` if the engine refuses the job, or if the child process dies or is dead.
        """
        try:
            print(job.to_json(), file=self._child.stdin, flush=True)
        except BrokenPipeError:
            raise GenerationError(self._death()) from None
        return Timing(**self._response(GenerationError, on_progress))

    def close(self) -> None:
        """Kill the child."""
        self._child.kill()
        self._child.wait()
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.stdout.close()
        self._log.close()

    def _response(self, kind: type[Exception], on_progress: Callable[[int], object] | None = None) -> dict[str, Any]:
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


@contextlib.contextmanager
def libraries(
    baseline: str | os.PathLike[str] | None = None, *, upstream_kernels: bool = False
) -> Iterator[dict[str, Runner]]:
    """Yield one child process per library, by name. `PATCHED` is always included.

    baseline: folder of an unpatched build, added as `UNPATCHED`.
    upstream_kernels: whether to add `UPSTREAM_KERNELS`: the patched library with llama.cpp's own attention kernels on
        the CPU.

    Raises `NativeLibraryError` if a library does not load, or if the baseline is patched or from another llama.cpp
    release.
    """
    if baseline is not None and not any(Path(baseline).glob("*llama.*")):
        raise NativeLibraryError(
            f"{baseline} holds no llama.cpp library; `make baseline` builds one in build/baseline/lib"
        )
    with contextlib.ExitStack() as stack:
        runners = {PATCHED: stack.enter_context(Runner(native.library_dir()))}
        if upstream_kernels:
            runners[UPSTREAM_KERNELS] = stack.enter_context(Runner(native.library_dir(), _KERNELS_OFF))
        if baseline is not None:
            runners[UNPATCHED] = stack.enter_context(Runner(Path(baseline).resolve()))
            _check_baseline(runners[PATCHED], runners[UNPATCHED])
        yield runners


def _check_baseline(ours: Runner, baseline: Runner) -> None:
    if baseline.facts["swaa"]:
        raise NativeLibraryError(f"{baseline.library} holds a patched library; `make baseline` builds an unpatched one")
    if ours.facts["version"] != baseline.facts["version"]:
        raise NativeLibraryError(
            f"{baseline.library} is from another llama.cpp release (its ggml is {baseline.facts['version']}, "
            f"the patched library's is {ours.facts['version']}); `make baseline` builds the right one"
        )


def described(runner: Runner) -> dict[str, Any]:
    """Return a library's facts as plain JSON values. A path inside the working directory becomes relative."""
    path, facts = runner.library, runner.facts
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return {
        "path": path.as_posix(),
        "patched": facts["swaa"],
        "ggml": facts["version"],
        "commit": facts["commit"],
        "gpus": facts["gpus"],
    }
