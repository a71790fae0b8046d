"""The SWAA settings of a model, as tests write them. Apart from the oracle, which needs torch.

Use: `Rule(window=31, sinks=4, sliding=(True, False), fa_decode=(True, False))`
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """W, S and the two flags per layer."""

    window: int
    sinks: int
    sliding: tuple[bool, ...]
    fa_decode: tuple[bool, ...]

    @staticmethod
    def of(window: int, sinks: int, sliding: str, fa_decode: str) -> Rule:
        """From flags written as 0 and 1, a character per layer."""
        return Rule(window, sinks, *(tuple(c == "1" for c in text) for text in (sliding, fa_decode)))

    @staticmethod
    def full(n_layers: int) -> Rule:
        """Every layer full attention."""
        return Rule(1, 0, (False,) * n_layers, (False,) * n_layers)

    @property
    def overrides(self) -> dict:
        """The keys that give an unannotated file these settings."""
        sliding, fa_decode = ("".join("01"[flag] for flag in flags) for flags in (self.sliding, self.fa_decode))
        return {
            "swaa.version": 1,
            "swaa.window_size": self.window,
            "swaa.sink_count": self.sinks,
            "swaa.sliding_layers": sliding,
            "swaa.fa_decode_layers": fa_decode,
        }
