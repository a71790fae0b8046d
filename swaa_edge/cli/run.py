"""`swaa-edge run`: complete one prompt, streamed to stdout.

swaa-edge run model.gguf -f report.txt -n 200
"""

from __future__ import annotations

import json
from typing import Any

import click

from swaa_edge.cli.options.engine import engine_options, sampling_options
from swaa_edge.cli.options.output import json_flag, print_piece, progress_option
from swaa_edge.cli.options.swaa import swaa_options_or_full
from swaa_edge.config import Configuration
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError
from swaa_edge.files.records import read_text
from swaa_edge.support.interrupt import interruptible
from swaa_edge.support.progress import PrefillProgress, progress_stream


@click.command()
@click.argument("model", metavar="MODEL.gguf")
@click.option("-p", "--prompt", metavar="TEXT", help="Text to continue.")
@click.option("-f", "--file", metavar="FILE", help="Read the prompt from a UTF-8 file; - means stdin.")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(1),
    metavar="N",
    default=128,
    show_default=True,
    help="Maximum number of tokens to generate.",
)
@json_flag
@progress_option
@sampling_options
@engine_options
@swaa_options_or_full
def run(
    model: str,
    prompt: str | None,
    file: str | None,
    max_tokens: int,
    as_json: bool,
    progress: bool | None,
    sampling: dict[str, Any],
    engine: EngineSettings,
    swaa: Configuration | None,
) -> None:
    """Complete one prompt, streamed to stdout.

    By default the model runs with the SWAA settings in its file; the options below replace them. The context is just
    large enough for the prompt and --max-tokens new tokens, unless --ctx is given.

    \b
    swaa-edge run model.gguf -p "Once upon a time"
    swaa-edge run model.gguf -f report.txt -n 200 --recipe quality
    """
    if (prompt is None) == (file is None):
        raise click.UsageError("give the prompt with either -p TEXT or -f FILE (- means stdin)")
    text = prompt if file is None else read_text(file)
    if not text:
        raise ConfigError("the prompt is empty; give a text to continue")

    from swaa_edge.generate import complete

    stream = progress_stream(progress)
    shown = PrefillProgress(stream) if stream else None
    try:
        completion = complete(
            model,
            text,
            max_tokens=max_tokens,
            swaa=swaa,
            engine=engine,
            sampling=sampling,
            using=interruptible,
            on_text=None if as_json else print_piece,
            on_prefill=shown,
        )
    finally:
        if shown:
            shown.close()
    if as_json:
        click.echo(json.dumps(completion.to_dict(), indent=2))
    elif not completion.text.endswith("\n"):
        click.echo()
