"""The settings of a SWAA model as tests write them down. Apart from the oracle, since cases name them without torch.

Use: `Rule(window=31, sinks=4, sliding=(True, False), fa_decode=(True, False))`
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """W, S and the two per-layer flags, as the engine gets them, without a word of how it uses them."""

    window: int
    sinks: int
    sliding: tuple[bool, ...]
    fa_decode: tuple[bool, ...]

    @staticmethod
    def full(n_layers: int) -> Rule:
        """Every layer full attention."""
        return Rule(1, 0, (False,) * n_layers, (False,) * n_layers)
