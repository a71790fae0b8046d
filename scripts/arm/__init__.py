"""The check of the CPU kernels for Arm: `check.py`, with the tools it needs and the program it builds and runs."""
