"""The parts of scripts/gpu/check.py: what travels (packing, trimming, prepared), how it is built (building, objects),
what is checked (oracle, checks, sanitizer, measuring) in what order (stages), and what is written about it (report).

Nothing here needs more than Python and numpy, but for `prepared`, which runs where the oracle's torch is.

    from gpu.packing import pack
"""
