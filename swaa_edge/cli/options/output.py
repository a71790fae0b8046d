"""Options on what a command shows and writes, and the output of text while it is generated.

@click.command()
@json_option
@force_option
@progress_option
def bench(json_file: str | None, force: bool, progress: bool | None): ...
"""

import sys

import click

progress_option = click.option(
    "--progress/--no-progress", default=None, help="Show progress on stderr.  [default: if stderr is a terminal]"
)
json_option = click.option(
    "--json", "json_file", metavar="FILE", help="Write the results as one JSON document; - means stdout."
)
#: For commands whose result goes to stdout anyway.
json_flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
force_option = click.option("--force", is_flag=True, help="Overwrite existing output files.")


def print_piece(text: str) -> None:
    """Show a piece of generated text immediately."""
    click.echo(text, nl=False)
    sys.stdout.flush()
