"""`swaa-edge inspect`: show a model file, its SWAA settings, and the memory of its KV cache.

swaa-edge inspect model.gguf --json
"""

import json
from typing import Any

import click

from swaa_edge.cli.options.output import json_flag
from swaa_edge.describe import CONTEXTS, describe
from swaa_edge.engine.settings import CACHE_TYPES
from swaa_edge.kvsize import FA, KINDS, SLIDING, SLIDING_FA_DECODE

_SIGNS = {FA: "#", SLIDING_FA_DECODE: "+", SLIDING: "."}
_LEGEND = {FA: "full attention (FA)", SLIDING_FA_DECODE: "sliding, decodes with FA", SLIDING: "sliding"}
_PER_ROW = 40


@click.command()
@click.argument("model", metavar="MODEL.gguf")
@json_flag
def inspect(model: str, as_json: bool) -> None:
    """Show a model, its SWAA settings, a map of its layers, and the memory of its KV cache.

    The command reads only metadata, no weights. A file without SWAA keys runs full attention.

    \b
    swaa-edge inspect model.gguf
    swaa-edge inspect model.gguf --json
    """
    report = describe(model)
    click.echo(json.dumps(report, indent=2) if as_json else draw(report))


def draw(report: dict[str, Any]) -> str:
    """Render the result of `describe` as text."""
    return "\n\n".join("\n".join(part) for part in (_facts(report), _swaa(report), _map(report), _memory(report)))


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
        "context": f"{model['context_length']:,} tokens" if model["context_length"] else "not stated",
        "vocabulary": f"{model['vocabulary']:,} tokens",
    }
    return [f"{name:<14}{value}" for name, value in rows.items()]


def _swaa(report: dict[str, Any]) -> list[str]:
    swaa, refusal = report["swaa"], report["model"]["swaa_refusal"]
    if swaa is None:
        lines = ["SWAA          off (full attention): the file has no SWAA keys, or swaa.enabled is false"]
    else:
        lines = [
            f"SWAA          on, keys of version {swaa['version']}, recipe {_plain(swaa['recipe'])}",
            f"  window      {swaa['window_size']:,} tokens",
            f"  sinks       {swaa['sink_count']:,} tokens",
            f"  tail        {swaa['tail_count']:,} tokens",
            f"  sliding     {sum(kind != FA for kind in report['layers'])} of {len(report['layers'])} layers",
        ]
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
    title = "KV memory of plain K and V in every layer" if report["model"]["swaa_refusal"] else "KV memory"
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


def _range(counts: int | list[int]) -> str:
    return str(counts) if isinstance(counts, int) else f"{min(counts)} to {max(counts)}"


def _plain(text: str) -> str:
    """Replace unprintable characters with question marks. Such characters could move the terminal's cursor."""
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
