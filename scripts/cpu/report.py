"""What a run of the CPU benchmark says: one JSON document, and the same as text for people.

document = make_document(run, facts); print(text(document))
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from swaa_edge.bench.report import machine

from .figures import Row, make_rows, ratios
from .measuring import Run
from .plan import FULL

#: What is wanted of the ratios: at least so much. The key, the least, and what it is.
WANTED = (
    ("decode_vs_no_flash", 1.0, "decode with flash attention over the unpatched library's without it, f16"),
    ("prefill_attention_speedup", 2.0, "attention of the prefill over the unpatched library's faster setting, f16"),
    ("q8_0_over_f16", 1.0, "attention of the prefill with a q8_0 cache over that with f16"),
)
#: Of the bandwidth, by decoding at the longest depth.
WANTED_SHARE = 0.75
# Those that kernels of matrix products and attention are written for, as Linux spells them.
_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
    "sme",
)
_BUSY = 0.9


def make_document(run: Run, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All of a run as plain JSON values; facts: more of them, for the top level."""
    rows = make_rows(run.samples, run.settings)
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(run.settings).items()
    }
    # What was measured counts, also if the program for it died after that.
    roofline = facts["roofline"].summary() if facts.get("roofline") and facts["roofline"].samples else None
    return {
        **ratios(rows),
        "rows": rows,
        "roofline": roofline,
        "skipped": run.skipped,
        "settings": settings,
        "machine": machine() | {"flags": cpu_flags(), "threads": run.settings.threads, "load": facts["load"]},
        "libraries": run.libraries.facts(),
        "seconds": run.elapsed,
        "stopped": facts.get("stopped"),
    }


def cpu_flags() -> list[str]:
    """The instruction sets of this processor that matter here; [] where the system doesn't tell."""
    found: set[str] = set()
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                found.update(line.partition(":")[2].split())
                break
    elif sys.platform == "darwin":
        asked = subprocess.run(["sysctl", "hw.optional"], capture_output=True, text=True, check=False).stdout
        names = {
            "FEAT_DotProd": "asimddp",
            "FEAT_FP16": "asimdhp",
            "FEAT_BF16": "bf16",
            "FEAT_I8MM": "i8mm",
            "FEAT_SME": "sme",
            "avx2_0": "avx2",
            "avx512f": "avx512f",
            "AdvSIMD": "asimd",
        }
        told = dict(line.rpartition(".")[2].split(": ") for line in asked.splitlines() if ": " in line)
        found = {ours for theirs, ours in names.items() if told.get(theirs) == "1"}
    return [flag for flag in _FLAGS if flag in found]


def text(document: Mapping[str, Any]) -> str:
    """The document for people: the machine, a row per side and depth, the ratios, and what was left out."""
    lines = [tuple(_COLUMNS), *(tuple(cell(row) for cell in _COLUMNS.values()) for row in document["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([*_facts(document), "", *shown, "", *_ratios(document), *_notes(document)])


def _side(row: Row) -> str:
    flash = "flash" if row["flash_attn"] else "no flash"
    return f"{row['library']}, {flash}, {row['kv_type']}" + ("" if row["config"] == FULL else f", {row['config']}")


def _number(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else format(value, form)


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "side": _side,
    "depth": lambda row: f"{row['depth']:,}",
    "layers": lambda row: str(row["layers"]),
    "rounds": lambda row: str(row["rounds"]),
    "prefill s": lambda row: _number(row["prefill_seconds"]),
    "attention s": lambda row: _number(row["attention_seconds"]),
    "spread": lambda row: _number(row["spread"]["attention"], ".0%"),
    "decode tok/s": lambda row: _number(row["decode_tok_s"], ",.1f"),
    "iqr": lambda row: _number(row["spread"]["decode"], ".0%"),
    "K and V GB/s": lambda row: _number(row["decode_gb_s"], ",.1f"),
    "reads GB/s": lambda row: _number(row["read_gb_s"], ",.1f"),
}


def _facts(document: Mapping[str, Any]) -> Iterator[str]:
    machine, settings = document["machine"], document["settings"]
    yield f"{machine['cpu']}, {machine['threads']} threads ({' '.join(machine['flags']) or 'flags unknown'})"
    yield f"{settings['shape']}, random Q8_0 weights, ubatch {settings['ubatch']}, {settings['decode']} tokens decoded"
    for name, library in document["libraries"].items():
        yield f"{name}: {library['path']} (ggml {library['ggml']})"
    roof = document["roofline"]
    if roof:
        peaks = [
            f"{_number(roof[unit], ',.0f')} {name}"
            for unit, name in (
                ("f32_gflops", "GFLOP/s f32"),
                ("bf16_gflops", "GFLOP/s bf16"),
                ("int8_gops", "GOP/s int8"),
            )
            if roof[unit] is not None
        ]
        samples = len(roof["samples"])
        yield f"roofline: {', '.join(peaks)}, reads {_number(roof['read_gb_s'], ',.1f')} GB/s (medians of {samples})"


def _ratios(document: Mapping[str, Any]) -> Iterator[str]:
    for key, least, what in WANTED:
        yield f"{key}: {_number(document[key])} (wanted {least:.2f}; at {document['ratio_depth']:,}): {what}"
    for depth, by_type in document["decode_ratio"].items():
        flash = document["decode_flash_ratio"][depth]
        for kv, found in by_type.items():
            theirs = f", over its own with flash attention {_number(flash[kv])}" if flash[kv] else ""
            yield f"decode_ratio at {int(depth):,}, {kv}: {_number(found)} (wanted 1.00){theirs}"
    at = f" at {int(list(document['decode_ratio'])[-1]):,}" if document["decode_ratio"] else ""
    for kv, share in document["decode_bandwidth_share"].items():
        yield f"decode_bandwidth_share{at}, {kv}: {_number(share, '.0%')} (wanted {WANTED_SHARE:.0%} at 32,768)"
    for row in document["swaa"]:
        yield (
            f"swaa at {row['depth']:,}, {row['config']}: prefill {_number(row['prefill_vs_full'])} and decode "
            f"{_number(row['decode_vs_full'])} over unpatched full attention; {_number(row['prefill_vs_stock'])} and "
            f"{_number(row['decode_vs_stock'])} over the same with upstream's kernels"
        )


def _notes(document: Mapping[str, Any]) -> Iterator[str]:
    for line in document["skipped"]:
        yield f"left out: {line}"
    shares = [row["cpu_share"] for row in document["rows"]]
    if shares and min(shares) < _BUSY:
        yield f"Other programs took processor time (a prefill got {min(shares):.0%} of it); the figures may be noise."
    if document["stopped"]:
        yield f"Stopped early ({document['stopped']}); this is what was measured until then."
