"""Compares full attention with SWAA configurations in one run: measuring processes, the report, the bound."""
