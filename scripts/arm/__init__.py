"""The parts of scripts/arm/check.py: the compiler and qemu, the tree, the program, what ran of it.

from arm import tools; found = tools.find()
"""
