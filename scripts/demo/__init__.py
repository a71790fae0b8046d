"""The demo model's training data, training, and page of results (docs/results.md)."""
