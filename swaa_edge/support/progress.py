"""The line on stderr that shows how far the prefill is: tokens done, tokens per second, time left.

Long prompts take minutes on a laptop, and a silent minute looks like a hang.

    llm.on_prefill = PrefillProgress(sys.stderr)
"""

import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

# The speed that "time left" is based on is that of the last few reports: under full attention it falls all the time.
_RECENT = 8


class PrefillProgress:
    """An `on_prefill` callback that writes to `stream`: one line rewritten on a terminal, else a line per report.

    transient: on a terminal, take the line away at the end instead of leaving the total behind.
    clock: seconds, as time.perf_counter.
    """

    def __init__(self, stream: TextIO, *, transient: bool = False, clock: Callable[[], float] = time.perf_counter):
        self._stream, self._clock = stream, clock
        self._rewrites = stream.isatty()
        self._transient = transient and self._rewrites
        self._reports: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._started = 0.0
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if done == 0:
            self._reports.clear()
            self._started = now
        self._reports.append((now, done))
        if done < total:
            self._show(f"prefill {done:,}/{total:,} tokens{self._pace(now, total - done)}")
            return
        seconds = now - self._started
        speed = f" ({total / seconds:,.0f} tok/s)" if seconds > 0 else ""
        self._show("" if self._transient else f"prefill {total:,} tokens in {seconds:.1f} s{speed}")
        self.close()

    def close(self) -> None:
        """End the line, if one is open: for a prefill that was interrupted, too."""
        if self._rewrites and self._shown:
            self._stream.write("\r" if self._transient else "\n")
            self._stream.flush()
        self._shown = 0

    def _pace(self, now: float, left: int) -> str:
        start, before = self._reports[0]
        tokens = self._reports[-1][1] - before
        if not tokens or now <= start:
            return ""
        speed = tokens / (now - start)
        return f", {speed:,.0f} tok/s, {duration(left / speed)} left"

    def _show(self, text: str) -> None:
        if self._rewrites:
            # Spaces cover what a longer line before left behind.
            self._stream.write("\r" + text.ljust(self._shown))
            self._shown = len(text) or self._shown
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds as a person reads them: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
