"""Helpers that need no model: atomic writes, journals, progress, tables, figures, Ctrl-C, machine, sample text."""
