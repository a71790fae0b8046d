"""Checks the CPU kernels for Arm. `check.py` is the command; its parts are `tools.py` and `program.py`."""
