"""Helpers without models: atomic writes, journals, progress, tables, figures, Ctrl-C, the machine, sample text."""
