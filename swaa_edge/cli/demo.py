"""`swaa-edge demo`: what SWAA costs and brings, in a minute, on a small model that ships with the package.

swaa-edge demo
"""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import click

from swaa_edge.cli.options.engine import status_line
from swaa_edge.evaluate.table import front
from swaa_edge.support.progress import duration

if TYPE_CHECKING:
    from swaa_edge.evaluate.run import Progress

_NOTE = (
    "accuracy: right answers, with Wilson's 95% interval. ratio: full attention's prefill time over this one's.\n"
    "* no other configuration is both as right and as fast."
)
_PLOT = "swaa-edge-demo.png"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: the table, answers, the conclusion.")
@click.option("--plot", metavar="FILE.png", help=f"Where the plot goes.  [{_PLOT}, replaced if it exists]")
@click.option("--no-plot", is_flag=True, help="Draw none.")
@click.option(
    "--samples", type=click.IntRange(1), metavar="N", default=8, show_default=True, help="Questions per task."
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [all cores]")
@click.option("--progress/--no-progress", default=None, help="Show how far it is.  [if stderr is a terminal]")
def demo(
    as_json: bool, plot: str | None, no_plot: bool, samples: int, threads: int | None, progress: bool | None
) -> None:
    """All of it in a minute, on a small model.

    A small model that ships with the package, trained to find facts anywhere in its 2,048 tokens, answers the same
    questions under full attention, a bare sliding window, each recipe, and with the layers that calibrate keeps in
    full attention: how often it is right, and how fast it reads.

    \b
    swaa-edge demo
    swaa-edge demo --samples 50 --plot accuracy.png
    """
    from swaa_edge import demo as tool

    if plot and no_plot:
        raise click.UsageError("give --plot FILE.png or --no-plot, not both")
    missing = importlib.util.find_spec("matplotlib") is None
    target = None if no_plot else plot or (None if missing else _PLOT)
    with status_line(progress, _told) as shown:
        report = tool.demo(samples=samples, plot=target, threads=threads, on_progress=shown)
    click.echo(json.dumps(report, indent=2) if as_json else table(report))
    if not as_json:
        if target:
            click.echo(f"plot: {target}")
        elif not no_plot:
            click.echo("no plot: that needs matplotlib; pip install 'swaa-edge[plot]'")


def _told(at: Progress) -> tuple[str, object]:
    left = "" if at.seconds_left is None else f", about {duration(at.seconds_left)} left"
    text = f"{at.answers}/{at.total} answers"
    return text + left, text


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    ahead = front(report["table"])
    tasks = list(report["table"][0]["tasks"])
    head = "".join(f"  {task:>12}" for task in tasks)
    lines = [f"{'config':<10}  {'accuracy':>17}{head}  {'prefill':>8}  {'ratio':>6}"]
    for row in report["table"]:
        low, high = row["interval"]
        accuracy = f"{row['accuracy']:.1%} ({low:.0%}-{high:.0%})"
        cells = "".join(f"  {row['tasks'][task]['accuracy']:>12.0%}" for task in tasks)
        mark = " *" if row["config"] in ahead else ""
        lines.append(
            f"{row['config']:<10}  {accuracy:>17}{cells}  {row['prefill_seconds']:>6.3f} s  "
            f"{row['prefill_ratio']:>5.2f}x{mark}"
        )
    told = (
        f"{report['model']}: prompts of {report['prompt_tokens']:,} tokens, window {report['window']}, "
        f"{report['sinks']} sinks in the recipes; {report['table'][0]['samples']} questions each"
    )
    return "\n".join([told, "", *lines, "", _NOTE, "", report["conclusion"]])
