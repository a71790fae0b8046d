"""Implements scripts/patches.py: patch files, the upstream release, the patched tree, refresh, move and check."""
