"""Large CPU buffers ask Linux for huge pages (patches/0012): the kernel's list of mappings shows the advice.

pytest tests/patches/test_huge_pages.py
"""

import ctypes
import re
import sys
from pathlib import Path

import pytest

from support.engine.process import library_dir

MIB = 1 << 20
ADVISED = "hg"  # of VmFlags in /proc/PID/smaps, proc(5)


def flags_at(address: int) -> list[str]:
    """VmFlags of this process's mapping that contains the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.native
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason=f"{sys.platform} or its kernel has no such pages"
)
def test_large_buffers_are_advised():
    size = 32 * MIB
    base = ctypes.CDLL(str(library_dir() / "libggml-base.so"))
    base.ggml_aligned_malloc.restype = ctypes.c_void_p
    base.ggml_aligned_malloc.argtypes = [ctypes.c_size_t]
    base.ggml_aligned_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    buffer = base.ggml_aligned_malloc(size)
    assert buffer
    try:
        ctypes.memset(buffer, 0, size)
        assert ADVISED in flags_at(buffer + size // 2)
    finally:
        base.ggml_aligned_free(buffer, size)
