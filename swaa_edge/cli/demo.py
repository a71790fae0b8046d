"""`swaa-edge demo`: show what SWAA costs and gains, in a minute, on a small model.

swaa-edge demo
"""

from __future__ import annotations

import importlib.util

import click

from swaa_edge.cli.options.output import json_flag, print_result, progress_option, raise_stopped
from swaa_edge.support.progress import progress_bar

_PLOT = "swaa-edge-demo.png"


@click.command()
@json_flag
@click.option(
    "--plot", metavar="FILE.png", help=f"File for the plot; an existing file is replaced.  [default: {_PLOT}]"
)
@click.option("--no-plot", is_flag=True, help="Do not draw a plot.")
@click.option(
    "--samples", type=click.IntRange(1), metavar="N", default=8, show_default=True, help="Number of questions per task."
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [default: all cores]")
@progress_option
def demo(
    as_json: bool, plot: str | None, no_plot: bool, samples: int, threads: int | None, progress: bool | None
) -> None:
    """Show what SWAA costs and gains, in a minute, on a small model.

    The model ships with the package and was trained to find facts anywhere in its context of 2,048 tokens. The
    model answers the same questions under full attention, with only a sliding window, with each recipe, with the
    recipe fast without its tail, and with full attention in the layers that calibrate chooses. The table shows the
    accuracy and the prefill time of each configuration. A last line shows the times of a prompt of 16,384 tokens in two
    layers of a real model's shape.

    \b
    swaa-edge demo
    swaa-edge demo --samples 50 --plot accuracy.png
    """
    from swaa_edge import demo as tool

    if plot and no_plot:
        raise click.UsageError("give --plot FILE.png or --no-plot, not both")
    missing = importlib.util.find_spec("matplotlib") is None
    file = None if no_plot else plot or (None if missing else _PLOT)
    with progress_bar(progress) as on_progress:
        comparison = tool.demo(samples=samples, plot_file=file, threads=threads, on_progress=on_progress)
    raise_stopped(comparison.stopped)
    print_result(comparison, as_json)
    if not as_json and file:
        click.echo(f"\nplot: {file}")
    elif not as_json and not no_plot:
        click.echo("\nno plot: it needs matplotlib; pip install 'swaa-edge[plot]'")
