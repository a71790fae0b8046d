"""Measure the current memory bandwidth of this machine, which limits the speed of decoding.

    bandwidth(threads=8)   # 1e9 bytes per second

Decoding reads all weights and all of K and V for each token, so memory limits it. A machine's bandwidth changes within
seconds (clocks, heat, other programs), so `bench_attention` measures it at the end of each turn. Memory is read by
computing NumPy's maximum of floats, which does little besides reading and releases Python's lock. On the machines
tried, a C++ loop was not faster.
"""

from __future__ import annotations

import statistics
import threading
import time

# Memory of all threads together, far more than caches hold; piece: what one call reads.
_BYTES, _PIECE = 256 << 20, 1 << 20
_WINDOWS = 5


def bandwidth(threads: int, *, size: int = _BYTES, seconds: float = 0.04) -> float:
    """Return the memory bandwidth in 1e9 bytes per second, measured while `threads` threads repeatedly read `size`
    bytes. The result is the median of five time windows of `seconds` seconds each. One more window before them, which
    doesn't count, lets the processor's clocks settle.
    """
    import numpy as np

    together = threading.Barrier(threads)
    rates: list[list[float]] = []

    def read() -> None:
        # Written by the thread that reads it, so that it lies in the memory near that thread's core.
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
