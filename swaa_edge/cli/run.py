"""`swaa-edge run`: complete one prompt, streamed to stdout.

    swaa-edge run model.gguf -f report.txt -n 200

It is also the shortest way to see what a configuration costs: --json has the timings.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from swaa_edge.cli.options.engine import Engine, engine_options, interruptible, progress_stream, sampling_options
from swaa_edge.cli.options.swaa import swaa_options_or_full
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.files.model import read_model
from swaa_edge.support.progress import PrefillProgress

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama


@click.command()
@click.argument("model", metavar="MODEL.gguf")
@click.option("-p", "--prompt", metavar="TEXT", help="The text to continue.")
@click.option("-f", "--file", metavar="FILE", help="Read it from a UTF-8 file; - is stdin.")
@click.option(
    "-n",
    "--tokens",
    type=click.IntRange(1),
    metavar="N",
    default=128,
    show_default=True,
    help="Tokens to generate at most.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: text, timings, settings.")
@click.option("--progress/--no-progress", default=None, help="Show the prefill's progress.  [if stderr is a terminal]")
@sampling_options
@engine_options
@swaa_options_or_full
def run(
    model: str,
    prompt: str | None,
    file: str | None,
    tokens: int,
    as_json: bool,
    progress: bool | None,
    sampling: dict[str, Any],
    engine: Engine,
    swaa: SwaaConfig | Literal[False] | None,
) -> None:
    """Complete one prompt, streamed to stdout.

    SWAA runs as the file's keys say; the options below run other settings instead. The context fits the
    prompt and N tokens, up to what the model was trained for; --ctx sets it by hand.

    \b
    swaa-edge run model.gguf -p "Once upon a time"
    swaa-edge run model.gguf -f report.txt -n 200 --recipe quality
    """
    # llama_cpp takes seconds to import; --help and a wrong command line needn't wait for it.
    from swaa_edge.engine.tokenizer import tokenize

    text = prompt_text(prompt, file)
    if sampling["seed"] is None:
        sampling["seed"] = random.SystemRandom().randrange(2**32 - 1)
    prompt_tokens = tokenize(model, text)
    n_ctx = fitting_context(model, len(prompt_tokens), tokens, engine.ctx)
    stream = progress_stream(progress)
    shown = PrefillProgress(stream) if stream else None
    started = time.perf_counter()
    llm = engine.load(model, swaa=swaa, n_ctx=n_ctx, on_prefill=shown)
    load_seconds = time.perf_counter() - started
    try:
        with interruptible(llm):
            pieces, reason = stream_completion(llm, prompt_tokens, tokens, sampling, echo=not as_json)
        if as_json:
            click.echo(json.dumps(report(llm, "".join(pieces), reason, sampling["seed"], load_seconds), indent=2))
    finally:
        if shown:
            shown.close()
        llm.close()


def prompt_text(prompt: str | None, file: str | None) -> str:
    """The prompt that -p or -f means. Raises `click.UsageError`, `ConfigError`."""
    if (prompt is None) == (file is None):
        raise click.UsageError("give the prompt by -p TEXT or by -f FILE (- is stdin), one of them")
    if file is None:
        text, where = prompt, "the prompt"
    else:
        where = "stdin" if file == "-" else file
        try:
            data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            text = data.decode("utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {where}: {error.strerror}; give a text file") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where} is not UTF-8 text (byte {error.start}); convert it first") from error
    if not text:
        raise ConfigError(f"{where} is empty; there is nothing to continue")
    return text


def fitting_context(model: str, prompt: int, new: int, wanted: int | None) -> int:
    """The context for `prompt` + `new` tokens: just that, or `wanted`. Raises `GenerationError` if it is too small."""
    needed = prompt + new
    if wanted is not None:
        if wanted < needed:
            raise GenerationError(f"--ctx {wanted} can't hold {prompt} prompt tokens and {new} more; it takes {needed}")
        return wanted
    trained = read_model(model).context_length
    if trained and needed > trained:
        raise GenerationError(
            f"{prompt} prompt tokens and {new} more exceed the {trained} that the model was trained for; "
            f"shorten the prompt, lower -n, or go beyond with --ctx {needed}"
        )
    return needed


def stream_completion(
    llm: SwaaLlama, tokens: list[int], new: int, sampling: dict[str, Any], *, echo: bool
) -> tuple[list[str], str | None]:
    """Generate, and with `echo` print as it comes; the pieces of text and why it ended ("stop" or "length")."""
    pieces, reason = [], None
    for chunk in llm.create_completion(tokens, max_tokens=new, stream=True, **sampling):
        choice = chunk["choices"][0]
        pieces.append(choice["text"])
        reason = choice["finish_reason"] or reason
        if echo:
            click.echo(choice["text"], nl=False)
            sys.stdout.flush()
    if echo and not "".join(pieces[-2:]).endswith("\n"):
        click.echo()
    return pieces, reason


def report(llm: SwaaLlama, text: str, reason: str | None, seed: int, load_seconds: float) -> dict[str, Any]:
    """What --json prints; seconds are wall time, speeds tokens per second."""
    timings = llm.last_timings
    return {
        "model": llm.model_path,
        "text": text,
        "finish_reason": reason,
        "prompt_tokens": timings.prompt_tokens,
        "generated_tokens": timings.generated_tokens,
        "seed": seed,
        "n_ctx": llm.n_ctx(),
        "swaa": llm.swaa.to_dict() if llm.swaa else None,
        "policy": llm.swaa_policy,
        "timings": {
            "load_seconds": load_seconds,
            "prefill_seconds": timings.prefill_seconds,
            "prefill_tokens_per_second": timings.prefill_speed,
            "decode_seconds": timings.decode_seconds,
            "decode_tokens_per_second": timings.decode_speed,
        },
    }
