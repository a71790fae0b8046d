"""Progress on stderr: a bar with the time left on a terminal, plain lines in a log.

with progress_bar(None) as on_progress: bench(..., on_progress=on_progress)
with byte_bar("Writing") as on_progress: annotate(..., on_progress=on_progress)
llm.on_prefill = PrefillProgress(sys.stderr)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

_BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining} left"


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run, in units of work. All units take about the same time.

    total: expected units of work. The number may change when an estimate improves.
    text: description of the current work, such as "quality, 4,096 tokens".
    """

    done: float
    total: float
    text: str


OnProgress = Callable[[Progress], None]


@contextlib.contextmanager
def progress_bar(wanted: bool | None) -> Iterator[OnProgress | None]:
    """Yield an `on_progress` callback that shows progress on stderr. Yield None if progress is off.

    wanted: as for `progress_stream`.

    On a terminal, the callback shows a bar that disappears at the end. Otherwise the callback writes a line whenever
    the text changes. The time left is estimated from the work of the current run alone.
    """
    stream = progress_stream(wanted)
    if stream is None:
        yield None
        return
    bar: tqdm | None = None
    last = None

    def show(at: Progress) -> None:
        nonlocal bar, last
        if not stream.isatty():
            if at.text != last:
                stream.write(at.text + "\n")
                stream.flush()
        elif bar is None:
            bar = _bar(stream, desc=at.text, total=at.total, initial=at.done, leave=False, bar_format=_BAR)
        else:
            bar.total = at.total
            bar.set_description_str(at.text, refresh=False)
            bar.update(at.done - bar.n)
            if at.text != last:
                bar.refresh()
        last = at.text

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


@contextlib.contextmanager
def byte_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield `on_progress(done, total)` for a bar of bytes on stderr. Yield None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with _bar(sys.stderr, desc=label, total=0, unit="B", unit_scale=True) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


class PrefillProgress:
    """An `on_prefill` callback: shows a bar if `stream` is a terminal, and otherwise writes a line per ubatch.

    transient: whether to leave no line at the end on a terminal. By default, a line with token count and speed remains.
    """

    def __init__(self, stream: TextIO, *, transient: bool = False) -> None:
        self._stream = stream
        self._transient = transient and stream.isatty()
        self._bar: tqdm | None = None
        self._started = 0.0

    def __call__(self, done: int, total: int) -> None:
        if done == 0:
            self.close()
            self._started = time.perf_counter()
            if self._stream.isatty():
                self._bar = _bar(self._stream, desc="prefill", total=total, unit=" tokens", leave=False)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif done < total:
            self._write(f"prefill {done:,}/{total:,} tokens")
        if done == total:
            self.close()
            if not self._transient:
                seconds = time.perf_counter() - self._started
                speed = f" ({total / seconds:,.0f} tok/s)" if seconds > 0 else ""
                self._write(f"prefill {total:,} tokens in {seconds:.1f} s{speed}")

    def close(self) -> None:
        """Remove the bar, for example after an interrupted prefill."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def progress_stream(wanted: bool | None) -> TextIO | None:
    """Return stderr if progress is wanted, else None. If `wanted` is None, progress is wanted on a terminal."""
    return sys.stderr if (sys.stderr.isatty() if wanted is None else wanted) else None


def duration(seconds: float) -> str:
    """Return seconds in readable units: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bar(stream: TextIO, **options: object) -> tqdm:
    from tqdm import tqdm

    columns = 0
    with contextlib.suppress(OSError, ValueError):
        columns = os.get_terminal_size(stream.fileno()).columns
    # miniters: steps take seconds, so each step may redraw the bar. ncols, nrows: tqdm hides the bar if a terminal
    # reports no size. A bar as wide as the terminal would wrap.
    return tqdm(file=stream, miniters=1, ncols=(columns or 80) - 1, nrows=24, **options)
