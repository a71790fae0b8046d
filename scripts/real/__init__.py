"""A real model, SmolLM2-135M-Instruct: fetched from the package index, never committed."""
