"""Checks of the CUDA kernels: `check.py` runs on a GPU, `compile_check.py` needs only a compiler.

check.py: what travels (packing, trimming), how it is built (building, objects), what is checked (cases, oracle,
operators, measuring) in which order (stages, runner), and what is reported (report). Only `oracle.prepare` needs more
than Python and numpy: it runs where torch is.

    python3 scripts/gpu/check.py pack
"""
