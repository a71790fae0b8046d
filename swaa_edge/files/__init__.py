"""A model on disk: GGUF headers, model and adapter files, and data files. Needs neither the C library nor torch."""
