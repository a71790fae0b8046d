"""Read GGUF headers, models, adapters and data files. These modules need neither the C library nor torch."""
