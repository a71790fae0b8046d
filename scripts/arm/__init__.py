"""Checks the CPU kernels for Arm. `check.py` is the command."""
