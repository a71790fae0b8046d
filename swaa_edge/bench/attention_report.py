"""The results of `bench_attention`: samples, figures, ratios and text.

report.to_dict()["decode_vs_no_flash"]; print(report)

Each ratio compares two sides within one round. The report gives the median over the rounds.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from swaa_edge.bench import bound
from swaa_edge.bench.client import PATCHED, UPSTREAM_KERNELS, Timing
from swaa_edge.bench.report import Run, heading, number, ratio, warnings
from swaa_edge.engine.configurations import FULL
from swaa_edge.support.table import table

#: Length of the short prompt, whose attention time counts as zero.
SHALLOW = 16
#: Prompt length of the headline ratios. If this length was not measured, the longest is used.
LENGTH = 8192
# Other programs disturbed a prefill that got a smaller share of the processor's time.
_BUSY = 0.9
Figures = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of the comparison. `library` and `config` are names."""

    library: str
    flash_attn: bool = True
    cache_type: str = "f16"
    config: str = FULL

    @property
    def label(self) -> str:
        flash = "" if self.flash_attn else ", no flash attention"
        return f"{self.library}{flash}, {self.cache_type}" + ("" if self.config == FULL else f", {self.config}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """The times of one turn.

    deep: prefill and decode of the long prompt, in a context of n_ctx tokens.
    shallow: prefill and decode of the short prompt (`SHALLOW` tokens).
    read_gb_s: memory bandwidth right after the turn, in 1e9 bytes per second.
    """

    deep: Timing
    shallow: Timing
    read_gb_s: float
    n_ctx: int


@dataclasses.dataclass
class AttentionReport(Run):
    """The samples so far, by side and prompt length: one sample per round.

    reference: name of the library that runs llama.cpp's own attention.
    skipped: one line per measurement that was left out, with the reason.
    """

    reference: str
    samples: dict[tuple[Side, int], list[Sample]] = dataclasses.field(default_factory=dict)
    skipped: list[str] = dataclasses.field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per side and prompt length. A figure is the median of its values in `repeats`."""
        return [self._row(side, length) for side, length in self.samples]

    def _row(self, side: Side, length: int) -> dict[str, Any]:
        rounds = self._rounds(side, length)
        repeats = {name: [figures[name] for figures in rounds] for name in rounds[0]}
        return {
            "library": side.library,
            "flash_attn": side.flash_attn,
            "cache_type": side.cache_type,
            "config": side.config,
            "prompt_tokens": length,
            **{name: _median(values) for name, values in repeats.items()},
            "repeats": repeats,
        }

    def _rounds(self, side: Side, length: int) -> list[Figures]:
        return [self._figures(side, length, sample) for sample in self.samples.get((side, length), [])]

    def _figures(self, side: Side, length: int, sample: Sample) -> Figures:
        """Return the figures of one round. A figure that can't be computed is None."""
        engine, times = self.work.engine, sample.deep.ubatch_seconds
        prefill, token = sum(times), statistics.median(sample.deep.decode_seconds)
        more = token - statistics.median(sample.shallow.decode_seconds)
        line = gb_s = None
        # Under SWAA, ubatch times form no line, and a decoded token may read only a part of K and V.
        if side.config == FULL:
            line = bound.fit_line(times[: length // engine.n_ubatch], engine.n_ubatch)
            read = sample.deep.kv_bytes / sample.n_ctx * (length - SHALLOW)
            gb_s = read / more / 1e9 if more > 0 and read > 0 else None
        return {
            "prefill_seconds": prefill,
            "prefill_tok_s": length / prefill,
            "attention_seconds": line and bound.attention_seconds(line, length, engine.n_ubatch),
            "attention_share": line and bound.attention_fraction(line, length, engine.n_ubatch),
            "decode_tok_s": 1 / token,
            "decode_attention_seconds": more if more > 0 else None,
            "decode_gb_s": gb_s,
            "read_gb_s": sample.read_gb_s,
            "read_share": gb_s and gb_s / sample.read_gb_s,
            "cpu_share": sample.deep.cpu_seconds / (engine.n_threads * prefill),
        }

    def ratios(self) -> dict[str, Any]:
        """Return the ratios. A ratio is None if one of its sides was not measured.

        ratio_depth: prompt length of the next three ratios.
        decode_vs_no_flash: our decode speed divided by the reference's speed without flash attention, with f16 caches.
        prefill_attention_speedup: the reference's attention time in prefill divided by our time, with f16 caches. The
            reference runs with or without flash attention, whichever is faster.
        q8_0_over_f16: our attention time in prefill with an f16 cache, divided by our time with a q8_0 cache.
        decode_ratio: like decode_vs_no_flash, for each prompt length, with our cache in f16 and in q8_0.
        decode_bandwidth_share: speed of reading K and V at the longest prompt, as a fraction of the memory bandwidth,
            for each cache type.
        swaa: our speed in prefill and decode, for each configuration and prompt length. `*_vs_full` is divided by the
            reference's speed under full attention. `*_vs_upstream` is divided by the speed of llama.cpp's kernels under
            the same configuration.
        """
        ours = {kind: Side(PATCHED, cache_type=kind) for kind in ("f16", "q8_0")}
        no_flash, flash = Side(self.reference, flash_attn=False), Side(self.reference)
        lengths = sorted({length for side, length in self.samples if side == no_flash})
        at = LENGTH if LENGTH in lengths or not lengths else lengths[-1]
        faster = min((flash, no_flash), key=lambda side: self._figure(side, at, "attention_seconds") or float("inf"))
        return {
            "ratio_depth": at,
            "decode_vs_no_flash": self._paired(ours["f16"], no_flash, at, "decode_tok_s"),
            "prefill_attention_speedup": self._paired(faster, ours["f16"], at, "attention_seconds"),
            "q8_0_over_f16": self._paired(ours["f16"], ours["q8_0"], at, "attention_seconds"),
            "decode_ratio": {
                str(n): {kind: self._paired(side, no_flash, n, "decode_tok_s") for kind, side in ours.items()}
                for n in lengths
            },
            "decode_bandwidth_share": {
                kind: self._figure(side, lengths[-1], "read_share") if lengths else None for kind, side in ours.items()
            },
            "swaa": list(self._swaa(flash)),
        }

    def _swaa(self, flash: Side) -> Iterator[dict[str, Any]]:
        for side, length in self.samples:
            if side.config == FULL or side.library != PATCHED:
                continue
            theirs = Side(UPSTREAM_KERNELS, config=side.config)
            yield {
                "prompt_tokens": length,
                "config": side.config,
                "prefill_vs_full": self._paired(flash, side, length, "prefill_seconds"),
                "decode_vs_full": self._paired(side, flash, length, "decode_tok_s"),
                "prefill_vs_upstream": self._paired(theirs, side, length, "prefill_seconds"),
                "decode_vs_upstream": self._paired(side, theirs, length, "decode_tok_s"),
            }

    def _figure(self, side: Side, length: int, key: str) -> float | None:
        return _median([figures[key] for figures in self._rounds(side, length)])

    def _paired(self, above: Side, below: Side, length: int, key: str) -> float | None:
        pairs = zip(self._rounds(above, length), self._rounds(below, length), strict=False)
        return _median([x[key] / y[key] if x[key] and y[key] else None for x, y in pairs])

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as plain JSON values: ratios, rows, memory bandwidth, `skipped` and `Run.facts`."""
        reads, facts = [sample.read_gb_s for samples in self.samples.values() for sample in samples], self.facts()
        del facts["settings"]["cache_type"]  # each side has its own
        return {
            **self.ratios(),
            "rows": self.rows(),
            "roofline": {"read_gb_s": _median(reads), "samples": reads},
            "reference": self.reference,
            "skipped": self.skipped,
            **facts,
        }

    def __str__(self) -> str:
        document = self.to_dict()
        cells = [list(_COLUMNS), *([cell(row) for cell in _COLUMNS.values()] for row in document["rows"])]
        return "\n".join([*heading(document), "", table(cells), "", *_ratio_lines(document), *_notes(document)])


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "side": lambda row: Side(row["library"], row["flash_attn"], row["cache_type"], row["config"]).label,
    "prompt": lambda row: f"{row['prompt_tokens']:,}",
    "rounds": lambda row: str(len(row["repeats"]["prefill_seconds"])),
    "prefill s": lambda row: f"{row['prefill_seconds']:,.2f}",
    "attention s": lambda row: number(row["attention_seconds"], ",.2f"),
    "decode tok/s": lambda row: f"{row['decode_tok_s']:,.1f}",
    "K and V GB/s": lambda row: number(row["decode_gb_s"], ",.1f"),
    "memory GB/s": lambda row: f"{row['read_gb_s']:,.1f}",
}


def _ratio_lines(document: dict[str, Any]) -> Iterator[str]:
    what, at = document["reference"], f"at {document['ratio_depth']:,} tokens"
    yield f"decode_vs_no_flash {at}: {ratio(document['decode_vs_no_flash'])} the {what} library without flash attention"
    speedup = ratio(document["prefill_attention_speedup"])
    yield f"prefill_attention_speedup {at}: {speedup} the {what} library's faster setting"
    yield f"q8_0_over_f16 {at}: prefill attention {ratio(document['q8_0_over_f16'])} as fast with a q8_0 cache"
    for length, by_type in document["decode_ratio"].items():
        found = ", ".join(f"{kind} {ratio(value)}" for kind, value in by_type.items())
        yield f"decode_ratio at {int(length):,} tokens: {found}"
    shares = ", ".join(f"{kind} {number(value, '.0%')}" for kind, value in document["decode_bandwidth_share"].items())
    yield f"decode_bandwidth_share, longest prompt: {shares}"
    for row in document["swaa"]:
        yield (
            f"{row['config']} at {row['prompt_tokens']:,} tokens: prefill {ratio(row['prefill_vs_full'])}, decode "
            f"{ratio(row['decode_vs_full'])} the {what} library's full attention; {ratio(row['prefill_vs_upstream'])} "
            f"and {ratio(row['decode_vs_upstream'])} the same configuration with llama.cpp's kernels"
        )


def _notes(document: dict[str, Any]) -> Iterator[str]:
    yield from (f"Not measured: {line}." for line in document["skipped"])
    share = min((row["cpu_share"] for row in document["rows"]), default=1.0)
    if share < _BUSY:
        yield f"Other programs took processor time (one prefill got {share:.0%} of it); the figures may be noise."
    yield from warnings(document)
