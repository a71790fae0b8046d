"""Between `SwaaLlama` and the C library: checks before a load, phases, evaluation, KV cache, states."""
