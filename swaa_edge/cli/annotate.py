"""`swaa-edge annotate`: write SWAA keys into an existing GGUF, or remove them.

swaa-edge annotate model.gguf -o model-swaa.gguf --recipe balanced
"""

import click

from swaa_edge.cli.options.output import force_option
from swaa_edge.cli.options.swaa import recipe_table, swaa_options
from swaa_edge.config import SwaaConfig
from swaa_edge.support.progress import byte_bar


@click.command(epilog=recipe_table())
@click.argument("model", metavar="IN.gguf")
@click.option("-o", "--output", metavar="OUT.gguf", help="File to write.")
@click.option("--in-place", is_flag=True, help="Replace IN.gguf once the new file is complete.")
@click.option("--strip", is_flag=True, help="Remove all SWAA keys, which restores the original file byte for byte.")
@force_option
@swaa_options
def annotate(model: str, output: str | None, in_place: bool, strip: bool, force: bool, swaa: SwaaConfig | None) -> None:
    """Write SWAA keys into an existing GGUF, or remove them.

    Tensors are copied byte for byte. Programs that do not support the keys ignore them and run full attention. For a
    split model, give the first file, NAME-00001-of-0000N.gguf; with -o, the other files are copied too.

    \b
    swaa-edge annotate model.gguf -o model-swaa.gguf --recipe balanced
    swaa-edge annotate model.gguf --in-place --window 2048 --sinks 64 --fa-layers 1::2 --fa-decode
    swaa-edge annotate model-swaa.gguf -o model.gguf --strip
    """
    if in_place == (output is not None):
        raise click.UsageError("give either -o OUT.gguf or --in-place")
    if strip and swaa is not None:
        raise click.UsageError("--strip removes the keys; give --strip or SWAA settings, not both")
    if not strip and swaa is None:
        raise click.UsageError(
            "no settings given; use --recipe NAME, --config FILE.json or --window N, or remove the keys with --strip"
        )

    from swaa_edge.convert.annotate import annotate as write_keys

    with byte_bar("Writing") as on_progress:
        written = write_keys(model, output, swaa, in_place=in_place, force=force, on_progress=on_progress)
    for path in written:
        click.echo(f"wrote {path}")
