"""`swaa-edge inspect`: what a model file is, what slides in it, and what its cache costs.

swaa-edge inspect model.gguf --json
"""

import json
from typing import Any

import click

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError
from swaa_edge.files.model import ModelFile, read_model
from swaa_edge.kvsize import FA, KINDS, SLIDING, SLIDING_FA_DECODE, kv_size, layer_kinds
from swaa_edge.metadata import VERSION

CONTEXTS = {"8k": 8192, "32k": 32768, "128k": 131072}
CACHE_TYPES = ("f16", "q8_0")

_SIGNS = {FA: "#", SLIDING_FA_DECODE: "+", SLIDING: "."}
_LEGEND = {FA: "full attention (FA)", SLIDING_FA_DECODE: "sliding, decodes with FA", SLIDING: "sliding"}
_PER_ROW = 40


@click.command()
@click.argument("model", metavar="MODEL.gguf")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(model: str, as_json: bool) -> None:
    """Show a model, its SWAA keys, the map of its layers, and the memory of its KV cache.

    Reads the file's header only. A file without SWAA keys is shown as what it is: full attention.

    \b
    swaa-edge inspect model.gguf
    swaa-edge inspect model.gguf --json
    """
    found = read_model(model)
    report = describe(found)
    click.echo(json.dumps(report, indent=2) if as_json else draw(report))


def describe(model: ModelFile) -> dict[str, Any]:
    """Everything that `inspect` shows, as plain JSON values; sizes in bytes."""
    swaa = model.swaa()
    kinds = layer_kinds(swaa, model.n_layers)
    return {
        "file": str(model),
        "files": len(model.paths),
        "size": model.size,
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "parameters": model.n_parameters,
            "file_type": model.file_type,
            "tensor_types": model.tensor_types,
            "layers": model.n_layers,
            "heads": _one_or_all(model.n_heads),
            "kv_heads": _one_or_all(model.n_kv_heads),
            "key_length": model.key_length,
            "value_length": model.value_length,
            "context_length": model.context_length,
            "vocabulary": model.n_vocab,
            "swaa_refusal": model.refusal,
        },
        "swaa": None if swaa is None else {"version": VERSION, **swaa.to_dict()},
        "layers": kinds,
        "kv_memory": [_kv_memory(model, swaa, n_ctx) for n_ctx in CONTEXTS.values()],
    }


def draw(report: dict[str, Any]) -> str:
    """The report for people."""
    return "\n\n".join("\n".join(part) for part in (_facts(report), _swaa(report), _map(report), _memory(report)))


def _kv_memory(model: ModelFile, swaa: SwaaConfig | None, n_ctx: int) -> dict[str, Any]:
    """Bytes by kind of layer, and in all, with rings and (`total_swa_full`) without; None: the type doesn't fit."""
    memory: dict[str, Any] = {"context": n_ctx, "ring_cells": kv_size(model, swaa, n_ctx=n_ctx).ring_cells}
    for kind in CACHE_TYPES:
        try:
            size, full = (
                kv_size(model, swaa, n_ctx=n_ctx, type_k=kind, type_v=kind, swa_full=swa_full)
                for swa_full in (False, True)
            )
        except ConfigError:
            memory[kind] = None
        else:
            memory[kind] = {**size.bytes, "total": size.total, "total_swa_full": full.total}
    return memory


def _facts(report: dict[str, Any]) -> list[str]:
    model = report["model"]
    types = ", ".join(f"{count} {name}" for name, count in model["tensor_types"].items()) or "none"
    length = str(model["key_length"])
    if model["value_length"] != model["key_length"]:
        length = f"{length} (K), {model['value_length']} (V)"
    files = f" in {report['files']} files" if report["files"] > 1 else ""
    rows = {
        "model": _plain(model["name"]),
        "architecture": _plain(model["architecture"]),
        "parameters": f"{_short(model['parameters'])} ({model['parameters']:,})",
        "quantization": f"{model['file_type']}; tensors: {types}",
        "size": f"{_bytes(report['size'])}{files}",
        "layers": str(model["layers"]),
        "heads": f"{_range(model['heads'])}, KV heads {_range(model['kv_heads'])}, head size {length}",
        "context": f"{model['context_length']:,} tokens" if model["context_length"] else "not given",
        "vocabulary": f"{model['vocabulary']:,} tokens",
    }
    return [f"{name:<14}{value}" for name, value in rows.items()]


def _swaa(report: dict[str, Any]) -> list[str]:
    swaa, refusal = report["swaa"], report["model"]["swaa_refusal"]
    lines = []
    if swaa is None:
        lines.append("SWAA          off: the file has no SWAA keys, or swaa.enabled is false; full attention")
    else:
        sliding = sum(kind != FA for kind in report["layers"])
        lines.append(f"SWAA          on, keys of version {swaa['version']}, recipe {_plain(swaa['recipe'])}")
        lines.append(f"  window      {swaa['window_size']:,} tokens")
        lines.append(f"  sinks       {swaa['sink_count']:,} tokens")
        lines.append(f"  sliding     {sliding} of {len(report['layers'])} layers")
        if swaa["adapter"]:
            lines.append(f"  adapter     {_plain(swaa['adapter'])}")
    if refusal:
        lines.append(f"  note        {_plain(refusal)}")
    return lines


def _map(report: dict[str, Any]) -> list[str]:
    signs = [_SIGNS[kind] for kind in report["layers"]]
    lines = ["layers        " + "  ".join(f"{_SIGNS[kind]} {text}" for kind, text in _LEGEND.items())]
    for start in range(0, len(signs), _PER_ROW):
        row = signs[start : start + _PER_ROW]
        tens = " ".join("".join(row[at : at + 10]) for at in range(0, len(row), 10))
        lines.append(f"  {f'{start}-{start + len(row) - 1}':<11} {tens}")
    return lines


def _memory(report: dict[str, Any]) -> list[str]:
    memory, kinds = report["kv_memory"], report["layers"]
    width = 46
    title = "KV memory, if every layer kept plain K and V" if report["model"]["swaa_refusal"] else "KV memory"
    lines = [f"{title:<{width}}" + "".join(f"{label:>20}" for label in CONTEXTS)]
    lines.append(f"{'':<{width}}" + "".join(f"{kind:>10}" for _ in CONTEXTS for kind in CACHE_TYPES))

    def row(label: str, key: str) -> None:
        sizes = (at[kind] for at in memory for kind in CACHE_TYPES)
        cells = "".join(f"{_bytes(size[key]) if size else '-':>10}" for size in sizes)
        lines.append(f"  {label:<{width - 2}}{cells}")

    for kind in KINDS:
        count = kinds.count(kind)
        if count:
            row(f"{_LEGEND[kind]}: {count} {'layer' if count == 1 else 'layers'}", kind)
    row("total", "total")
    ring = max(at["ring_cells"] for at in memory)
    if ring:
        row("total with --swa-full", "total_swa_full")
        lines.append(f"  sliding layers keep a ring of {ring:,} tokens (window, sinks and a ubatch of 512)")
    return lines


def _one_or_all(counts: tuple[int, ...]) -> int | list[int]:
    return counts[0] if len(set(counts)) == 1 else list(counts)


def _range(counts: int | list[int]) -> str:
    return str(counts) if isinstance(counts, int) else f"{min(counts)} to {max(counts)}"


def _plain(text: str) -> str:
    """Text from a file, without what could move a terminal's cursor."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _short(count: int) -> str:
    for limit, sign in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.2f}{sign}"
    return str(count)


def _bytes(count: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            value = count / (1 << power)
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count} B"
