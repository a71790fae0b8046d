"""What lies between `SwaaLlama` and the C library: checks before a load, error translation, the KV cache, states."""
