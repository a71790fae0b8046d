"""`swaa-edge demo`: the whole way in about a minute, on a small model made on the spot.

    swaa-edge demo
"""

from __future__ import annotations

import json
from typing import Any

import click

from swaa_edge.cli.engine_options import progress_stream

_NOTE = (
    "The model has random weights, so what it writes is noise; the times are what counts. They depend on a model's\n"
    "shape and not on its weights. Ratio: full attention's prefill time over this one's."
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: the table and what was run.")
@click.option("--keep", metavar="DIR", help="Leave the checkpoint and the GGUF in this folder.")
@click.option(
    "--prompt-tokens", type=click.IntRange(1), metavar="N", default=12288, show_default=True, help="How much is read."
)
@click.option("--progress/--no-progress", default=None, help="Show each step.  [if stderr is a terminal]")
def demo(as_json: bool, keep: str | None, prompt_tokens: int, progress: bool | None) -> None:
    """All of it in a minute, on a small model.

    Makes a small Qwen3-shaped model with random weights, converts and quantizes it with the recipe balanced,
    and reads a long text that ships with Python: under full attention, and under three recipes.

    \b
    swaa-edge demo
    swaa-edge demo --keep demo-output && swaa-edge inspect demo-output/demo-Q4_K_M.gguf
    """
    from swaa_edge import demo as tool
    from swaa_edge.progress import PrefillProgress

    stream = progress_stream(progress)

    def announce(step: str) -> None:
        if stream:
            click.echo(f"{step} ...", file=stream)

    report = tool.demo(
        keep,
        prompt_tokens=prompt_tokens,
        on_step=announce,
        on_prefill=lambda _: PrefillProgress(stream, transient=True) if stream and stream.isatty() else None,
    )
    click.echo(json.dumps(report, indent=2) if as_json else table(report))


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'config':<9} {'prefill':>9} {'tok/s':>8} {'ratio':>6}  {'decode tok/s':>12}  first tokens"]
    for row in report["table"]:
        decode = "-" if row["decode_tok_s"] is None else f"{row['decode_tok_s']:,.1f}"
        lines.append(
            f"{row['config']:<9} {row['prefill_seconds']:>7.1f} s {row['prefill_tok_s']:>8,.0f} "
            f"{row['prefill_ratio']:>5.2f}x  {decode:>12}  {json.dumps(row['text'][:24], ensure_ascii=False)}"
        )
    head = f"prompt: {report['prompt_tokens']:,} tokens of {report['prompt']}"
    kept = [f"kept: {report['kept']}"] if report["kept"] else []
    return "\n".join([head, "", *lines, "", _NOTE, *kept])
