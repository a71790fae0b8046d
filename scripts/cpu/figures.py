"""Rows and ratios out of what was measured: plain arithmetic on samples, medians throughout.

rows = make_rows(run.samples, settings); ratios(rows)["decode_vs_no_flash"]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from swaa_edge.bench.random_model import SHAPES

from .fit import attention_seconds
from .measuring import SHALLOW, Sample
from .plan import DEPTH, FLASH, FULL, MINE, MINE_Q8_0, NO_FLASH, OURS, RECIPES, STOCK, Settings, Side, Turn

Row = dict[str, Any]
# Of a number in the cache: q8_0 has 32 of them and a scale in 34 bytes.
_KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}


def make_rows(samples: Mapping[Turn, Sequence[Sample]], settings: Settings) -> list[Row]:
    """A row per side and depth, in the order of measuring; every figure is the median of the rounds in `repeats`.

    attention_seconds: of the prefill; None where layers slide, and where the times tell none. decode_attention_seconds:
    per token, what decoding at the depth takes more than at `SHALLOW` tokens, in the same process; decode_gb_s: K and V
    that it reads more, over that. read_gb_s: of the memory right after; read_share: decode_gb_s over it. spread: of
    prefill and attention (largest - smallest) over the median, None of one round; of decode the interquartile range of
    its tokens over their median. cpu_share: processor time of the prefill over threads times seconds; well below 1,
    other programs had the rest.
    """
    return [_row(turn, taken, settings) for turn, taken in samples.items()]


def _row(turn: Turn, samples: Sequence[Sample], settings: Settings) -> Row:
    side = turn.side
    rounds = [_figures(turn, sample, settings) for sample in samples]
    repeats = {name: [figures[name] for figures in rounds] for name in rounds[0]}
    medians = {name: _median(values) for name, values in repeats.items()}
    tokens = [seconds for sample in samples for seconds in sample.deep.decode_seconds]
    return {
        "library": side.library,
        "flash_attn": side.flash_attn,
        "kv_type": side.kv,
        "config": side.config,
        "depth": turn.depth,
        "layers": turn.layers,
        "rounds": len(samples),
        **medians,
        "spread": {
            "prefill": _range(repeats["prefill_seconds"]),
            "attention": _range(repeats["attention_seconds"]),
            "decode": _quartiles(tokens),
        },
        "repeats": {"round": [sample.round for sample in samples], **repeats},
    }


def _figures(turn: Turn, sample: Sample, settings: Settings) -> dict[str, float | None]:
    """Those of one round."""
    prefill, token = sum(sample.deep.ubatch_seconds), statistics.median(sample.deep.decode_seconds)
    more = token - statistics.median(sample.shallow.decode_seconds)
    read = _column_bytes(turn.side, turn.layers, settings) * (turn.depth - SHALLOW)
    speed = read / more / 1e9 if more > 0 and read > 0 else None
    attention = None
    # Where layers slide, a ubatch's time is no line in the columns before it.
    if turn.side.config == FULL:
        attention = attention_seconds(sample.deep.ubatch_seconds, turn.depth, settings.ubatch)
    return {
        "prefill_seconds": prefill,
        "prefill_tok_s": turn.depth / prefill,
        "attention_seconds": attention,
        "decode_tok_s": 1 / token,
        "decode_attention_seconds": more if more > 0 else None,
        "decode_gb_s": speed,
        "read_gb_s": sample.read_gb_s,
        "read_share": speed / sample.read_gb_s if speed and sample.read_gb_s else None,
        "cpu_share": sample.deep.cpu_seconds / (settings.threads * prefill),
    }


def _column_bytes(side: Side, layers: int, settings: Settings) -> float:
    """Bytes of K and V of one token."""
    shape = SHAPES[settings.shape]
    return layers * 2 * shape.kv_heads * shape.head_size * _KV_BYTES[side.kv]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _range(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return (max(known) - min(known)) / statistics.median(known) if len(known) > 1 else None


def _quartiles(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def ratios(rows: Sequence[Row]) -> dict[str, Any]:
    """Every ratio that the rows tell; above 1 is to our favour, None where something for it was not measured.

    A ratio is taken in every round and the median of those counts, since within a round the sides ran close together.
    ratio_depth: of the first three, `DEPTH` or else the longest. decode_ratio: by depth and cache type, our tokens per
    second over those of the unpatched library without flash attention and with f16, which takes no q8_0;
    decode_flash_ratio: over its own with flash attention and the same cache. decode_bandwidth_share: by cache type,
    `read_share` at the longest depth. swaa: by depth and preset, over the unpatched library's full attention, and over
    the same preset with upstream's kernels.
    """
    depths = sorted({row["depth"] for row in rows if row["config"] == FULL})
    decoded = [depth for depth in depths if find(rows, NO_FLASH, depth)]
    at = DEPTH if DEPTH in decoded else (decoded or depths or [DEPTH])[-1]

    def ratio(key: str, above: Side, below: Side, depth: int = at) -> float | None:
        return paired(find(rows, above, depth), find(rows, below, depth), key)

    mine = {"f16": MINE, "q8_0": MINE_Q8_0}
    return {
        "ratio_depth": at,
        "decode_vs_no_flash": ratio("decode_tok_s", MINE, NO_FLASH),
        "prefill_attention_speedup": ratio("attention_seconds", _faster(rows, at), MINE),
        "q8_0_over_f16": ratio("attention_seconds", MINE, MINE_Q8_0),
        "decode_ratio": {
            str(depth): {kv: ratio("decode_tok_s", side, NO_FLASH, depth) for kv, side in mine.items()}
            for depth in decoded
        },
        "decode_flash_ratio": {
            str(depth): {
                kv: ratio("decode_tok_s", side, Side(FLASH.library, kv=kv), depth) for kv, side in mine.items()
            }
            for depth in decoded
        },
        "decode_bandwidth_share": {
            kv: row["read_share"] if decoded and (row := find(rows, side, decoded[-1])) else None
            for kv, side in mine.items()
        },
        "swaa": list(_swaa(rows)),
    }


def _faster(rows: Sequence[Row], depth: int) -> Side:
    """The unpatched library's setting with the faster attention in prefill."""
    taken = {side: row["attention_seconds"] for side in (FLASH, NO_FLASH) if (row := find(rows, side, depth))}
    return min((side for side in taken if taken[side] is not None), key=taken.get, default=FLASH)


def _swaa(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for depth in sorted({row["depth"] for row in rows if row["config"] != FULL}):
        full = find(rows, FLASH, depth)
        for name in RECIPES:
            mine, stock = (find(rows, Side(library, config=name), depth) for library in (OURS, STOCK))
            yield {
                "depth": depth,
                "config": name,
                "prefill_vs_full": paired(full, mine, "prefill_seconds"),
                "decode_vs_full": paired(mine, full, "decode_tok_s"),
                "prefill_vs_stock": paired(stock, mine, "prefill_seconds"),
                "decode_vs_stock": paired(mine, stock, "decode_tok_s"),
            }


def paired(above: Row | None, below: Row | None, key: str) -> float | None:
    """The median of one row's figure over the other's, over the rounds that have both; None if none has."""
    x, y = _by_round(above, key), _by_round(below, key)
    return _median([x[at] / y[at] for at in x if at in y])


def _by_round(row: Row | None, key: str) -> dict[int, float]:
    if row is None:
        return {}
    pairs = zip(row["repeats"]["round"], row["repeats"][key], strict=True)
    return {at: value for at, value in pairs if value is not None}


def find(rows: Sequence[Row], side: Side, depth: int) -> Row | None:
    """The row of a side at a depth; None if there is none."""
    wanted = (side.library, side.flash_attn, side.kv, side.config, depth)
    keys = ("library", "flash_attn", "kv_type", "config", "depth")
    return next((row for row in rows if tuple(row[key] for key in keys) == wanted), None)
