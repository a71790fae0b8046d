"""`swaa-edge run`: complete one prompt, or answer one question about a text.

swaa-edge run model.gguf -f report.txt -q "Who wrote this report?"
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
@click.option("-p", "--prompt", metavar="TEXT", help="Text to continue, or text that the question (-q) is about.")
@click.option("-f", "--file", metavar="FILE", help='Read the text from a UTF-8 file; "-" means stdin.')
@click.option(
    "-q",
    "--question",
    metavar="QUESTION",
    help="Question about the text, or a question without a text; formatted with the model's chat template.",
)
@click.option("--system", metavar="TEXT", help="System prompt for -q.")
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
    question: str | None,
    system: str | None,
    max_tokens: int,
    as_json: bool,
    progress: bool | None,
    sampling: dict[str, Any],
    engine: EngineSettings,
    swaa: Configuration | None,
) -> None:
    """Complete one prompt, or answer one question about it, streamed to stdout.

    Without -q the model continues the text as it is, which suits base models. With -q the prompt is one message in
    the model's chat template: first the text, then the question. The question comes last so that the tail covers it.

    By default the model runs with the SWAA settings in its file; the options below replace them. The context is just
    large enough for the prompt and --max-tokens new tokens, unless --ctx is given.

    \b
    swaa-edge run model.gguf -p "Once upon a time"
    swaa-edge run model.gguf -f report.txt -q "Who wrote this report?" --recipe quality
    """
    given = [source for source in (prompt, file) if source is not None]
    if len(given) > 1 or (not given and question is None):
        raise click.UsageError('give the prompt with either -p TEXT or -f FILE ("-" means stdin)')
    text = prompt if file is None else read_text(file)
    if given and not text:
        raise ConfigError(f"the prompt is empty; give a text to {'continue' if question is None else 'ask about'}")

    from swaa_edge.generate import complete

    stream = progress_stream(progress)
    shown = PrefillProgress(stream) if stream else None
    try:
        completion = complete(
            model,
            text or "",
            question=question,
            system=system,
            max_tokens=max_tokens,
            swaa=swaa,
            engine=engine,
            sampling=sampling,
            using=interruptible,
            on_text=None if as_json else print_piece,
            on_prefill=shown,
            on_note=lambda line: click.echo(line, err=True),
        )
    finally:
        if shown:
            shown.close()
    if as_json:
        click.echo(json.dumps(completion.to_dict(), indent=2))
    elif not completion.text.endswith("\n"):
        click.echo()
