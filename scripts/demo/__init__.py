"""The demo model: its training data, its training, and the page of its figures (docs/results.md)."""
