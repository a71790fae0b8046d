"""Models and contexts for the reuse tests: a rule, and a cache small enough to evict constantly.

Use: `setup = Setup(sliding="1111", window=24); engine.open(path, setup.overrides, **setup.settings); setup.ring.cells`
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from support.oracle.grid import round_up
from support.oracle.rule import Rule
from support.reuse.book import Ring


@dataclass(frozen=True)
class Setup:
    """Model and context. sliding without a 1: SWAA off; fa_decode: one character per layer, as sliding."""

    sliding: str
    fa_decode: str = "0000"
    window: int = 31
    sinks: int = 4
    n_ubatch: int = 32
    n_ctx: int = 1024
    sequences: int = 4
    unified: bool = True
    swa_full: bool = False
    arch: str = "llama"
    kv: str = "f16"

    def changed(self) -> dict:
        """The fields that differ from their defaults: Setup(**setup.changed()) == setup."""
        given = asdict(self)
        return {f.name: given[f.name] for f in fields(self) if given[f.name] != f.default}

    def __str__(self) -> str:
        cache = "unified" if self.unified else "streams"
        full = " swa_full" if self.swa_full else ""
        return (
            f"{self.arch} s{self.sliding} d{self.fa_decode} W{self.window} S{self.sinks} u{self.n_ubatch} "
            f"c{self.n_ctx} {self.sequences} {cache} {self.kv}{full}"
        )

    @property
    def rule(self) -> Rule:
        return Rule.of(self.window, self.sinks, self.sliding, self.fa_decode)

    @property
    def swaa(self) -> bool:
        return "1" in self.sliding

    @property
    def overrides(self) -> dict:
        return self.rule.overrides if self.swaa else {}

    @property
    def settings(self) -> dict:
        same = ("n_ctx", "n_ubatch", "sequences", "unified", "swa_full", "kv")
        return {name: getattr(self, name) for name in same} | {"n_batch": 512}

    @property
    def cells(self) -> int:
        """Cells of the full cache per stream."""
        return round_up(self.n_ctx if self.unified else self.n_ctx // self.sequences)

    @property
    def ring(self) -> Ring | None:
        """The expected ring of this context, if any."""
        in_ring = any(s == "1" and d == "0" for s, d in zip(self.sliding, self.fa_decode, strict=True))
        sequences = self.sequences if self.unified else 1
        cells = round_up(sequences * (self.window + self.sinks) + self.n_ubatch)
        if not in_ring or self.swa_full or cells >= self.cells:
            return None
        return Ring(cells, self.window, self.sinks, keep=self.window + self.n_ubatch)
