"""The check of the CPU kernels for Arm: `check.py`, with the tools, the tree, the program and its run under qemu.

python3 scripts/arm/check.py
"""
