"""Helpers that need no model: atomic writes, journals, progress, tables, figures, Ctrl-C, the machine, sample text."""
