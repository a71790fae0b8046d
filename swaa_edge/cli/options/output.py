"""Options for output, and functions that print results and progress.

@click.command()
@json_option
@force_option
@progress_option
def bench(json_file, force, progress): ...
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from swaa_edge.errors import SwaaError
from swaa_edge.support.interrupt import Stopped
from swaa_edge.support.progress import progress_bar

progress_option = click.option(
    "--progress/--no-progress", default=None, help="Show progress on stderr.  [default: if stderr is a terminal]"
)
json_option = click.option(
    "--json", "json_file", metavar="FILE", help='Write the results as one JSON document; "-" means stdout.'
)
#: For commands that always print the result.
json_flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
force_option = click.option("--force", is_flag=True, help="Overwrite existing output files.")


def run_shown(function: Callable[..., Any], *args: Any, progress: bool | None, **options: Any) -> Any:
    """Call `function`, and show progress and notes on stderr.

    progress: value of the option --progress.
    """
    with progress_bar(progress) as on_progress:
        return function(*args, on_progress=on_progress, on_note=lambda line: click.echo(line, err=True), **options)


def print_result(result: Any, as_json: bool) -> None:
    """Print a result as a JSON document or as text."""
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))


def raise_stopped(stopped: Stopped) -> None:
    """Raise the error or the interrupt that ended a run early. Do nothing after a complete run."""
    if stopped is not None:
        raise stopped if isinstance(stopped, SwaaError) else KeyboardInterrupt


def print_piece(text: str) -> None:
    """Show a piece of generated text immediately."""
    click.echo(text, nl=False)
    sys.stdout.flush()
