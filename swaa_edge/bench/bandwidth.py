"""Measure this machine's memory bandwidth.

    bandwidth(threads=8)   # 1e9 bytes per second

Each decoded token reads all weights and the KV cache, so memory bandwidth limits the speed of decode. The bandwidth
changes within seconds (clocks, heat, other programs), so `bench_attention` measures after each turn.

Memory is read by NumPy's max(), because max() does little besides reading and releases Python's lock. On the machines
tried, a C++ loop was not faster.
"""

from __future__ import annotations

import statistics
import threading
import time

# Bytes of all threads together, far more than the caches hold, and bytes per call of max().
_BYTES, _PIECE = 256 << 20, 1 << 20
_WINDOWS = 5


def bandwidth(threads: int, *, size: int = _BYTES, seconds: float = 0.04) -> float:
    """Return the memory bandwidth in 1e9 bytes per second: the median of five time windows.

    An extra window runs first and is discarded, so that the processor's clocks settle.

    threads: number of threads that read at the same time.
    size: bytes that the threads together read again and again.
    seconds: length of a window.
    """
    import numpy as np

    together = threading.Barrier(threads)
    rates: list[list[float]] = []

    def read() -> None:
        # Each thread writes its own data, so that the data lies in memory near that thread's core.
        data = np.ones(max(1, size // threads // _PIECE) * _PIECE // 4, np.float32)
        pieces = data.reshape(-1, _PIECE // 4)
        together.wait()
        rates.append([_rate(pieces, seconds) for _ in range(_WINDOWS + 1)][1:])

    workers = [threading.Thread(target=read) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return statistics.median(map(sum, zip(*rates, strict=True)))


def _rate(pieces, seconds: float) -> float:  # pieces: numpy array [pieces, floats]
    done, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds or not done:
        pieces[done % len(pieces)].max()
        done += 1
    return done * pieces[0].nbytes / passed / 1e9
