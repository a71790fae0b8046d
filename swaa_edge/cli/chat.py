"""`swaa-edge chat`: talk with a model in the terminal, or through a pipe, a line a turn.

    swaa-edge chat model.gguf

Each turn sends the whole conversation; what of it is in the KV cache already is not computed again.
"""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any, Literal

import click
import jinja2

from swaa_edge.cli.options.engine import (
    Engine,
    conversation_context,
    engine_options,
    interruptible,
    progress_stream,
    sampling_options,
)
from swaa_edge.cli.options.swaa import swaa_options_or_full
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.support.progress import PrefillProgress

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


@click.command()
@click.argument("model", metavar="MODEL.gguf")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option("-n", "--tokens", type=click.IntRange(1), metavar="N", help="Tokens of an answer at most.  [the context]")
@click.option("--progress/--no-progress", default=None, help="Show the prefill's progress.  [if stderr is a terminal]")
@sampling_options
@engine_options
@swaa_options_or_full
def chat(
    model: str,
    system: str | None,
    tokens: int | None,
    progress: bool | None,
    sampling: dict[str, Any],
    engine: Engine,
    swaa: SwaaConfig | Literal[False] | None,
) -> None:
    """Talk with a model, by the chat template that it brings along.

    /clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer. Input that is piped
    in is taken a line a turn.

    \b
    swaa-edge chat model.gguf
    echo "What is a KV cache?" | swaa-edge chat model.gguf --recipe quality
    """
    stream = progress_stream(progress)
    shown = PrefillProgress(stream, transient=True) if stream else None
    llm = engine.load(model, swaa=swaa, n_ctx=conversation_context(model, engine.ctx), on_prefill=shown)
    try:
        if "tokenizer.chat_template" not in llm.metadata:
            click.echo(f"{model} has no chat template; its turns are written in the {llm.chat_format} format", err=True)
        Conversation(llm, system, tokens, sampling).run()
    finally:
        llm.close()


class Conversation:
    """The turns so far, and the loop that adds to them; answers go to stdout, all else to stderr."""

    def __init__(self, llm: SwaaLlama, system: str | None, tokens: int | None, sampling: dict[str, Any]) -> None:
        self._llm, self._system, self._tokens = llm, system, tokens
        seed = sampling["seed"]
        # A seed of its own for each answer: with one seed, equal questions would get equal answers.
        self._seeds = random.Random(seed) if seed is not None else random.SystemRandom()
        self._sampling = sampling
        self.messages: list[dict[str, str]] = []
        self.clear()

    def clear(self) -> None:
        """Back to the system prompt."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def run(self) -> None:
        """Take turns until the input ends or says /exit."""
        terminal = sys.stdin.isatty()
        if terminal:
            click.echo(HELP, err=True)
        while (line := self._read(terminal)) is not None:
            command = line.strip()
            if command == "/exit":
                return
            if command == "/clear":
                self.clear()
            elif command.startswith("/") and " " not in command and terminal:
                click.echo(f"there is no {command}; {HELP}", err=True)
            elif command:
                self._answer(line)

    @staticmethod
    def _read(terminal: bool) -> str | None:
        """The next line, or None at the end of the input."""
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

    def _answer(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})
        answer: list[str] = []
        try:
            with interruptible(self._llm):
                self._stream(answer)
        except KeyboardInterrupt:
            click.echo(" [stopped]", err=True)
            if not sys.stdin.isatty():
                raise
        except (ValueError, jinja2.TemplateError) as error:
            # Both come from llama_cpp: what doesn't fit, and what the template's author doesn't allow.
            self.messages.pop()
            if "exceed context window" in str(error):
                size = self._llm.n_ctx()
                _tell(f"the conversation is longer than the context of {size} tokens; /clear it, or raise --ctx")
            else:
                _tell(f"the model's chat template refuses this conversation: {error}")
            return
        if answer:
            self.messages.append({"role": "assistant", "content": "".join(answer)})
        else:
            self.messages.pop()

    def _stream(self, answer: list[str]) -> None:
        sampling = self._sampling | {"seed": self._seeds.randrange(2**32 - 1)}
        for chunk in self._llm.create_chat_completion(self.messages, max_tokens=self._tokens, stream=True, **sampling):
            piece = chunk["choices"][0]["delta"].get("content")
            if piece:
                answer.append(piece)
                click.echo(piece, nl=False)
                sys.stdout.flush()
        click.echo()


def _tell(problem: str) -> None:
    # At a terminal the conversation goes on; a pipe has nobody who could react, so there it is an error.
    if not sys.stdin.isatty():
        raise GenerationError(problem)
    click.echo(problem, err=True)
