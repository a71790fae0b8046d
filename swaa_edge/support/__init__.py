"""Helpers that know nothing of models: atomic writes, journals, progress, tables, figures, the machine, sample text."""
