"""What the CPU benchmark measures, in which order: the sides, their turns, and what is left out from the start.

    for block in blocks(Settings(quick=True, threads=2)): print(block.number, [turn.side.label for turn in block.turns])

A round gives every side of one depth a turn, every second round backwards: what drifts steadily then favours nobody.
What takes longest comes last, since time may end before the list does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from swaa_edge import config as presets

#: Libraries: the unpatched one, ours, and ours with its attention kernels turned off, which leaves upstream's.
UNPATCHED, OURS, STOCK = "unpatched", "ours", "ours-stock"
#: The configuration that isn't a preset of SWAA.
FULL = "full"
#: Presets, best accuracy first; the last two slide in decode, too.
RECIPES = tuple(presets.RECIPES)

#: The depth of the ratios that are wanted. Upstream's prefill with a q8_0 cache and flash attention takes minutes here
#: already, so it is measured at no longer one.
DEPTH = 8192
# Without --quick: beyond this depth a prefill takes minutes, so once has to do, with few layers.
_LONG, _LONG_LAYERS = 16384, 2
# Of presets at up to `DEPTH`.
_SWAA_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Side:
    """One setting under comparison: a library, whether it uses flash attention, its cache and SWAA configuration."""

    library: str
    flash_attn: bool = True
    kv: str = "f16"
    config: str = FULL

    @property
    def label(self) -> str:
        flash = "" if self.flash_attn else ", no flash attention"
        return f"{self.library}{flash}, {self.kv}" + ("" if self.config == FULL else f", {self.config}")


NO_FLASH, FLASH, MINE = Side(UNPATCHED, flash_attn=False), Side(UNPATCHED), Side(OURS)
MINE_Q8_0, FLASH_Q8_0 = Side(OURS, kv="q8_0"), Side(UNPATCHED, kv="q8_0")
# Neighbours are the pairs whose ratios count most.
_SIDES = (NO_FLASH, MINE, FLASH, MINE_Q8_0)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One side at one depth: prefill so many tokens, then decode."""

    side: Side
    depth: int
    layers: int


@dataclasses.dataclass(frozen=True)
class Block:
    """A round. number: from 1, of those at this depth; the second and later are left out as a whole, or not at all."""

    number: int
    turns: tuple[Turn, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How it is measured; sizes in tokens. seconds: begin nothing that would end later, the first turns aside."""

    threads: int
    quick: bool = False
    layers: int = 4
    depths: tuple[int, ...] = (2048, 8192, 32768)
    swaa_depths: tuple[int, ...] = (8192, 16384)
    shape: str = "qwen3-0.6b"
    vocab: int | None = None
    ubatch: int = 512
    decode: int = 64
    rounds: int = 3
    seconds: float = 1750.0
    read_mib: float = 256.0

    @classmethod
    def quickly(cls, threads: int, **given: object) -> Settings:
        """Those of --quick: five minutes on two cores."""
        return cls(threads, **({"quick": True, "layers": 2, "depths": (DEPTH,), "rounds": 5, "seconds": 270.0} | given))


def blocks(settings: Settings) -> Iterator[Block]:
    """All rounds, in order."""
    for depth in sorted(settings.depths):
        layers = settings.layers if depth <= _LONG else min(settings.layers, _LONG_LAYERS)
        for number in range(1, 1 + (settings.rounds if depth <= _LONG else 1)):
            sides = _SIDES[:: -1 if number % 2 == 0 else 1]
            if number == 1 and not settings.quick and depth <= DEPTH:
                sides = (*sides, FLASH_Q8_0)
            yield Block(number, tuple(Turn(side, depth, layers) for side in sides))
        # Their share of the bandwidth is wanted there, and that of one moment would be chance.
        if depth > _LONG:
            for number in range(2, 1 + settings.rounds):
                yield Block(number, tuple(Turn(side, depth, layers) for side in (MINE, MINE_Q8_0)))
    if not settings.quick:
        for depth in settings.swaa_depths:
            sides = (FLASH, MINE, *(Side(library, config=name) for name in RECIPES for library in (STOCK, OURS)))
            for number in range(1, 1 + (min(_SWAA_ROUNDS, settings.rounds) if depth <= DEPTH else 1)):
                order = sides[:: -1 if number % 2 == 0 else 1]
                yield Block(number, tuple(Turn(side, depth, settings.layers) for side in order))


def left_out(settings: Settings) -> list[str]:
    """What is not measured whatever the time, one line each."""
    lines = []
    if settings.quick:
        lines.append("unpatched, q8_0: its prefill takes minutes; measured without --quick")
        lines.append("SWAA configurations: measured without --quick")
    else:
        lines += [
            f"{FLASH_Q8_0.label}, {depth:,}: its prefill would take far too long"
            for depth in sorted(settings.depths)
            if depth > DEPTH
        ]
    return lines
