"""Measures the plan of the CPU benchmark: a process per library, which stay alive and take turns.

    with Libraries.started(ours, unpatched, stock=False) as libraries:
        run = Run(settings, libraries, folder); run.all(); run.samples

Every turn is two jobs in one process: a prefill of the depth and decoding there, then decoding at nearly no depth. What
the first takes more per token is attention's. Models have random weights and are written where they are first needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from swaa_edge.bench import bench
from swaa_edge.bench.client import Job, Runner, Timing
from swaa_edge.bench.random_model import write_shape
from swaa_edge.config import SwaaConfig
from swaa_edge.engine.preflight import resolve_swaa
from swaa_edge.errors import NativeLibraryError
from swaa_edge.files.model import read_model
from swaa_edge.support.progress import duration

from .fit import prefill_seconds, robust_line
from .plan import FULL, OURS, STOCK, UNPATCHED, Block, Settings, Side, Turn, blocks, left_out
from .roofline import NoRoofline, Roofline

#: Tokens before the decoding that counts as at no depth.
SHALLOW = 16
# Leaves the op to upstream's kernels; read when a library first computes attention.
_KERNELS_OFF = ("GGML_CPU_FATTN", "0")
# A sample of the roofline lasts so long.
_FRESH_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One turn: `shallow` after `SHALLOW` tokens, `deep` after the depth's; round: in which of all, from 0.

    read_gb_s: reading the memory right after, None without a roofline. A machine's bandwidth may change from one
    second to the next, so what decoding reads is held against this and not against another minute's.
    """

    shallow: Timing
    deep: Timing
    round: int
    read_gb_s: float | None = None


class Libraries:
    """The measuring processes by the name of their library."""

    def __init__(self, runners: dict[str, Runner]) -> None:
        self.runners = runners

    @classmethod
    @contextlib.contextmanager
    def started(cls, ours: Path, unpatched: Path, *, stock: bool) -> Iterator[Libraries]:
        """Start them, and end them; stock: ours without its kernels, too.

        Raises `NativeLibraryError` if these are not the two libraries of one release.
        """
        with contextlib.ExitStack() as stack:
            runners = {UNPATCHED: stack.enter_context(Runner(unpatched)), OURS: stack.enter_context(Runner(ours))}
            bench.check_baseline(runners[OURS], runners[UNPATCHED])
            if not runners[OURS].facts["swaa"]:
                raise NativeLibraryError(f"{ours} holds an unpatched library; give the patched one as --library")
            if stock:
                with _environment(*_KERNELS_OFF):
                    runners[STOCK] = stack.enter_context(Runner(ours))
            yield cls(runners)

    def facts(self) -> dict[str, Any]:
        """What each is: path (from here, if it is below), release, whether it is patched."""
        told = {name: bench.described(runner) for name, runner in self.runners.items()}
        return {name: facts | {"path": from_here(facts["path"])} for name, facts in told.items()}


def from_here(path: str) -> str:
    """`path` as seen from the working directory, where it is below that."""
    below = Path(path).is_relative_to(Path.cwd())
    return Path(path).relative_to(Path.cwd()).as_posix() if below else path


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


class Run:
    """One run of the plan. samples: by turn, in the order of the rounds. skipped: what was left out, a line each."""

    def __init__(
        self,
        settings: Settings,
        libraries: Libraries,
        folder: Path,
        roofline: Roofline | None = None,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.settings, self.libraries, self.folder = settings, libraries, folder
        self.roofline, self._say = roofline, say
        self.samples: dict[Turn, list[Sample]] = {}
        self.skipped = left_out(settings)
        self._started, self._looked = time.monotonic(), float("-inf")

    def all(self) -> None:
        """Measure every turn for which there is time. Raises `SwaaError`; `samples` keeps what there is."""
        for index, block in enumerate(blocks(self.settings)):
            for turn in self._affordable(block, first=index == 0):
                self._measure(turn, block.number, index)
        self._look_at_roof()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def _affordable(self, block: Block, *, first: bool) -> Iterator[Turn]:
        """The turns of a block that fit into the time left; all or none of a repeated round, all of the very first."""
        if block.number > 1:
            needed = sum(self.estimate(turn) or 0.0 for turn in block.turns)
            if self._is_late(needed):
                self.skipped.append(f"round {block.number} at {block.turns[0].depth:,}: out of time")
            else:
                yield from block.turns
            return
        for turn in block.turns:
            needed = self.estimate(turn)
            if first or not self._is_late(needed or 0.0):
                yield turn
            else:
                about = "" if needed is None else f"it would take about {duration(needed)}, "
                self.skipped.append(f"{turn.side.label}, {turn.depth:,}: {about}out of time")

    def _is_late(self, needed: float) -> bool:
        return self.elapsed + needed > self.settings.seconds

    def estimate(self, turn: Turn) -> float | None:
        """Seconds of a turn by the line of the same side at the nearest depth; None while nothing is known."""
        known = [other for other in self.samples if other.side == turn.side]
        if not known:
            return None
        near = min(known, key=lambda other: abs(other.depth - turn.depth))
        sample, scale = self.samples[near][-1], turn.layers / near.layers
        line = robust_line(sample.deep.ubatch_seconds, near.depth, self.settings.ubatch)
        decode = sum(sample.deep.decode_seconds) * max(1.0, turn.depth / near.depth)
        if line is None:
            prefill = sum(sample.deep.ubatch_seconds) * turn.depth / near.depth
        else:
            prefill = prefill_seconds(line, turn.depth, self.settings.ubatch)
        # A warm-up and the making of two contexts come with it.
        return 1.1 * scale * (prefill + decode + sum(sample.shallow.decode_seconds))

    def _measure(self, turn: Turn, number: int, index: int) -> None:
        self._look_at_roof()
        runner = self.libraries.runners[turn.side.library]
        # In this order, so that both times of decoding and the memory's are of the same seconds.
        deep = runner.measure(self._job(turn.side, turn.depth, turn.layers))
        shallow = runner.measure(self._job(turn.side, SHALLOW, turn.layers))
        self.samples.setdefault(turn, []).append(Sample(shallow, deep, index, self._ask_roof(Roofline.read)))
        speed = 1 / statistics.median(deep.decode_seconds)
        self._say(
            f"{self.elapsed:5.0f} s  round {number}, {turn.side.label}, {turn.depth:,}: "
            f"prefill {sum(deep.ubatch_seconds):.2f} s, decode {speed:.1f} tok/s"
        )

    def _look_at_roof(self) -> None:
        """Another sample of the roofline, unless there is a fresh one."""
        if time.monotonic() - self._looked >= _FRESH_SECONDS:
            self._ask_roof(Roofline.measure)
            self._looked = time.monotonic()

    def _ask_roof(self, ask: Callable[[Roofline, int, float], Any]) -> Any:
        """What `ask` says of the roofline; None without one, and of one that died there is none from then on."""
        if self.roofline is None:
            return None
        try:
            return ask(self.roofline, self.settings.threads, self.settings.read_mib)
        except NoRoofline as error:
            self.skipped.append(f"roofline: {error}")
            self.roofline = None
            return None

    def model(self, layers: int) -> Path:
        """The model with so many layers, written if it is not there."""
        settings = self.settings
        path = self.folder / f"cpu-bench-{settings.shape}-{layers}-{settings.vocab or 'all'}.gguf"
        if not path.exists():
            write_shape(path, settings.shape, layers=layers, vocab=settings.vocab, ftype="Q8_0")
        return path

    def _job(self, side: Side, depth: int, layers: int) -> Job:
        settings, path = self.settings, self.model(layers)
        overrides = (
            {}
            if side.config == FULL
            else resolve_swaa(str(path), SwaaConfig.from_recipe(side.config), None).kv_overrides
        )
        tokens, _ = bench.prompt_ids(read_model(path), depth)
        # The warm-up takes a ubatch and one token; llama.cpp rounds a context up to 256.
        needed = max(depth + settings.decode, min(depth, settings.ubatch) + 1)
        return Job(
            model=str(path),
            tokens=tokens,
            overrides=overrides or {},
            decode=settings.decode,
            n_ctx=-(-needed // 256) * 256,
            n_batch=settings.ubatch,
            n_ubatch=settings.ubatch,
            threads=settings.threads,
            prefill_threads=settings.threads,
            cache_type=bench.CACHE_TYPES[side.kv],
            gpu_layers=0,
            flash_attn=side.flash_attn,
        )
