"""Makes the demo model: its training data, its training, and the page of its results (docs/results.md)."""
