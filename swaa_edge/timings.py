"""What a generation did and how long it took, for `run --json` and anyone who wonders where the time went.

    llm.create_completion(prompt); print(llm.last_timings.prefill_speed)

llama.cpp's own counters see neither a reused prefix nor the sampler, so these are kept apart.
"""

from dataclasses import dataclass


@dataclass
class Timings:
    """Counts of tokens, and seconds of wall time in the engine and the sampler; one for each generation."""

    prompt_tokens: int = 0  # evaluated
    reused_tokens: int = 0  # of the prompt, found in the cache
    prefill_seconds: float = 0.0
    generated_tokens: int = 0  # sampled, an end token included
    decode_tokens: int = 0  # of those, fed back; drafted tokens count too
    decode_seconds: float = 0.0

    @property
    def prefill_speed(self) -> float | None:
        """Prompt tokens evaluated per second; None if none were."""
        return self.prompt_tokens / self.prefill_seconds if self.prompt_tokens and self.prefill_seconds else None

    @property
    def decode_speed(self) -> float | None:
        """Generated tokens fed back per second; None if none were."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens and self.decode_seconds else None
