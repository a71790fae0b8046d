"""The memory bandwidth of this machine: a plausible number, quickly, by any number of threads."""

import threading
import time

import pytest

from swaa_edge.bench import bandwidth as module
from swaa_edge.bench.bandwidth import bandwidth


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_it_reads_memory(threads):
    before, started = threading.active_count(), time.perf_counter()
    # No memory of one machine reads 100 TB/s, and none that runs this reads 10 MB/s.
    assert 0.01 < bandwidth(threads, size=8 << 20, seconds=0.005) < 1e5
    assert time.perf_counter() - started < 5 and threading.active_count() == before


def test_it_is_the_median_of_the_sums_over_the_threads(monkeypatch):
    seen = {}

    def rate(pieces, seconds):
        # The warm-up is far off; the windows of all threads are 1, 9, 2, 8 and 3.
        windows = seen.setdefault(threading.get_ident(), [1000.0, 1.0, 9.0, 2.0, 8.0, 3.0])
        assert pieces.nbytes == 4 << 20 and seconds == 0.5
        return windows.pop(0)

    monkeypatch.setattr(module, "_rate", rate)
    assert bandwidth(2, size=8 << 20, seconds=0.5) == 2 * 3.0
    assert list(seen.values()) == [[], []]
