"""`swaa-edge chat`: chat with a model in a terminal, or through a pipe with one turn per line.

swaa-edge chat model.gguf
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from swaa_edge.cli.options.engine import engine_options, sampling_options
from swaa_edge.cli.options.output import print_piece, progress_option
from swaa_edge.cli.options.swaa import swaa_options_or_full
from swaa_edge.config import Configuration
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.files.model import read_model
from swaa_edge.support.interrupt import interruptible
from swaa_edge.support.progress import PrefillProgress, progress_stream

if TYPE_CHECKING:
    from swaa_edge.generate import Conversation
    from swaa_edge.llama import SwaaLlama

HELP = "/clear starts a new conversation, /exit or Ctrl-D quits, Ctrl-C stops an answer"


@click.command()
@click.argument("model", metavar="MODEL.gguf")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Maximum number of tokens per answer.  [default: as many as fit in the context]",
)
@progress_option
@sampling_options
@engine_options
@swaa_options_or_full
def chat(
    model: str,
    system: str | None,
    max_tokens: int | None,
    progress: bool | None,
    sampling: dict[str, Any],
    engine: EngineSettings,
    swaa: Configuration | None,
) -> None:
    """Chat with a model, using the chat template in its file.

    /clear starts a new conversation, /exit or Ctrl-D quits, Ctrl-C stops an answer. With piped input, each line is
    one turn.

    \b
    swaa-edge chat model.gguf
    echo "What is a KV cache?" | swaa-edge chat model.gguf --recipe quality
    """
    from swaa_edge.generate import Conversation, conversation_context

    file = read_model(model)
    stream = progress_stream(progress)
    shown = PrefillProgress(stream, transient=True) if stream else None
    llm = engine.load(file, swaa=swaa, n_ctx=conversation_context(file, engine.n_ctx), on_prefill=shown)
    with contextlib.closing(llm):
        if "tokenizer.chat_template" not in llm.metadata:
            click.echo(f"{model} has no chat template; using the {llm.chat_format} format", err=True)
        talk(llm, Conversation(llm, system=system, max_tokens=max_tokens, sampling=sampling), shown)


def talk(llm: SwaaLlama, conversation: Conversation, shown: PrefillProgress | None = None) -> None:
    """Take turns until /exit or the end of the input. Answers go to stdout, everything else to stderr."""
    terminal = sys.stdin.isatty()
    if terminal:
        click.echo(HELP, err=True)
    while (line := _read(terminal)) is not None:
        command = line.strip()
        if command == "/exit":
            return
        if command == "/clear":
            conversation.clear()
        elif command.startswith("/") and " " not in command and terminal:
            click.echo(f"unknown command {command}; {HELP}", err=True)
        elif command:
            try:
                with interruptible(llm):
                    conversation.ask(line, print_piece)
                    click.echo()
            except KeyboardInterrupt:
                if shown:
                    shown.close()
                click.echo(" [stopped]", err=True)
                if not terminal:
                    raise
            except GenerationError as error:
                # At a terminal, the user can react to the error. In a pipe, the error ends the program.
                if not terminal:
                    raise
                click.echo(str(error), err=True)


def _read(terminal: bool) -> str | None:
    """Return the next line, or None at the end of the input."""
    if not terminal:
        try:
            line = sys.stdin.readline()
            return line.removesuffix("\n") if line else None
        except UnicodeDecodeError as error:
            raise ConfigError(f"stdin is not UTF-8 text (byte {error.start}); convert it first") from error
    while True:
        try:
            return input("> ")
        except EOFError:
            click.echo(err=True)
            return None
        except KeyboardInterrupt:
            click.echo(f"\n{HELP}", err=True)
