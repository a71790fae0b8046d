"""`swaa-edge calibrate`: which layers lose most when they slide, and so should keep full attention.

swaa-edge calibrate model.gguf --text notes.txt -o settings.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from swaa_edge.cli.calibratetable import table
from swaa_edge.cli.journals import fingerprint
from swaa_edge.cli.options.engine import Engine, engine_options, interruptible, status_line
from swaa_edge.cli.options.swaa import progress_bar, swaa_options
from swaa_edge.config import CUSTOM, RECIPES, SwaaConfig
from swaa_edge.errors import ConfigError, SwaaError
from swaa_edge.files.model import ModelFile, read_model
from swaa_edge.support.atomic import atomic_output
from swaa_edge.support.journal import _cached as cached
from swaa_edge.support.progress import duration

if TYPE_CHECKING:
    from swaa_edge.calibrate.cases import Case
    from swaa_edge.calibrate.losses import Progress
    from swaa_edge.llama import SwaaLlama

#: Without --length: tokens of a prompt, if the model was trained for as many.
LENGTH = 8192
_TASKS = "needle,multi-needle,kv,chain"


class _Keep(click.ParamType):
    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            number = int(value) if str(value).isdigit() else float(value)
        except ValueError:
            number = 0
        if not (number >= 1 if isinstance(number, int) else 0 < number < 1):
            self.fail(f"{value!r} must be a number of layers from 1, or a fraction of them as in 0.25")
        return number


@click.command()
@click.argument("model", metavar="MODEL.gguf")
@click.option("--text", "text_file", metavar="FILE", help="Measure on this UTF-8 text; - is stdin.  [retrieval tasks]")
@click.option("--tasks", metavar="NAME,...", default=_TASKS, show_default=True, help="Retrieval tasks, without --text.")
@click.option("--samples", type=click.IntRange(1), metavar="N", help="Prompts per task, or windows of text.  [4; 16]")
@click.option("--length", type=click.IntRange(16), metavar="N", help=f"Prompt and answer.  [{LENGTH} if the model can]")
@click.option(
    "--answer-tokens",
    type=click.IntRange(1),
    metavar="N",
    default=64,
    show_default=True,
    help="With --text: the last tokens of a window, whose loss counts.",
)
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of the retrieval tasks.")
@click.option("--keep", type=_Keep(), metavar="N|F", default="0.25", show_default=True, help="How many, or a share.")
@click.option(
    "--method",
    type=click.Choice(["nll", "keep", "greedy", "lazy"]),
    default="nll",
    show_default=True,
    help="Rank by: loss when a layer alone slides; gain when it alone keeps full attention; gain beside those "
    "chosen before; how much of what it looks at a window hides.",
)
@click.option("--candidates", type=click.IntRange(1), metavar="N", help="With greedy: of the N likeliest only.")
@click.option(
    "--swaps",
    type=click.IntRange(0),
    metavar="N",
    default=1,
    show_default=True,
    help="With greedy: at last, try to exchange the N chosen layers that are worth least.",
)
@click.option("--compare", is_flag=True, help="Compare the choice with periodic ones, on other samples.")
@click.option("-o", "--output", metavar="CONFIG.json", help="Write the settings, for --config of every command.")
@click.option("--annotate", "annotated", metavar="OUT.gguf", help="Write the model with these settings in it.")
@click.option("--in-place", is_flag=True, help="Write these settings into MODEL.gguf.")
@click.option("--json", "json_file", metavar="FILE", help="Write one JSON document; - is stdout.")
@click.option("--plot", "plot_file", metavar="FILE.png", help="Draw the layers as bars.")
@click.option("--force", is_flag=True, help="Replace these files if they exist.")
@click.option("--journal", metavar="FILE", help="Keep finished measurements here.  [a file in the cache folder]")
@click.option("--no-chat", is_flag=True, help="Ask in plain text, without the model's chat template.")
@click.option("--progress/--no-progress", default=None, help="Show how far it is.  [if stderr is a terminal]")
@engine_options
@swaa_options
def calibrate(
    model: str,
    text_file: str | None,
    keep: float,
    method: Any,
    candidates: int | None,
    swaps: int,
    output: str | None,
    annotated: str | None,
    in_place: bool,
    json_file: str | None,
    plot_file: str | None,
    force: bool,
    journal: str | None,
    progress: bool | None,
    engine: Engine,
    swaa: SwaaConfig | None,
    **samples: Any,
) -> None:
    """Find the layers that should keep full attention.

    Measures the loss of right answers while layers slide, by the engine on the model as it is, and proposes
    --fa-layers. Without settings it takes the recipe fast, with the window and the sinks cut where the prompts are
    short; FA layers in the settings are what --compare compares with. Ctrl-C loses nothing: the same command goes on.

    \b
    swaa-edge calibrate model.gguf --text notes.txt -o settings.json
    swaa-edge calibrate model.gguf --recipe balanced --method greedy --compare --plot layers.png
    """
    if annotated is not None and in_place:
        raise click.UsageError("give either --annotate OUT.gguf or --in-place")
    facts = read_model(model)
    count = keep if isinstance(keep, int) else max(1, round(keep * facts.n_layers))
    if count >= facts.n_layers:
        raise ConfigError(f"--keep {keep} leaves none of the model's {facts.n_layers} layers to slide; keep fewer")
    if candidates is not None and (method != "greedy" or not count <= candidates <= facts.n_layers):
        raise ConfigError(
            f"--candidates {candidates} goes with --method greedy, from {count} (those kept) to {facts.n_layers} layers"
        )

    from swaa_edge.bench.report import check_plot
    from swaa_edge.calibrate.lazy import attention_shares
    from swaa_edge.calibrate.report import plot
    from swaa_edge.calibrate.search import calibrate as tool
    from swaa_edge.files.lora_gguf import read_lora
    from swaa_edge.support.journal import Journal

    if engine.lora is not None and read_lora(engine.lora, facts).swaa is not None:
        raise ConfigError(
            f"{engine.lora} was trained under a recipe, so its layers are chosen; calibrate the model without it"
        )
    if plot_file is not None:
        check_plot()
    for file in (output, annotated, json_file, plot_file):
        if file not in (None, "-"):
            _claim(file, force)
    length = _length(facts, samples.pop("length"))
    swaa = _settings(swaa, length)
    cases, held_out = _cases(model, text_file, length, swaa, **samples)
    # All layers in one cache that can go back anywhere, so that a document asked about twice is read once.
    engine = dataclasses.replace(engine, swa_full=True)
    key = _key(facts, swaa, engine, [*cases, *held_out])
    path, ours = (journal, False) if journal is not None else (cached("calibrate", key), True)

    def load(config: SwaaConfig | Literal[False], n_ctx: int) -> SwaaLlama:
        return engine.load(model, swaa=config, n_ctx=max(n_ctx, engine.ctx or 0))

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(Journal(path, key))
        if log.records:
            click.echo(f"resuming: {len(log.records)} measurements are in", err=True)
        shown = stack.enter_context(status_line(progress, _told))
        report = tool(
            load,
            swaa,
            facts.n_layers,
            cases,
            keep=count,
            method=method,
            candidates=candidates,
            swaps=swaps,
            shares=lambda: attention_shares(load, swaa, facts.n_layers, cases, using=interruptible),
            held_out=held_out,
            journal=log,
            using=interruptible,
            on_progress=shown,
        )
    document = {"model": {"path": model, "name": facts.name}, "prompt_tokens": length} | report.to_dict()
    config = report.config()
    if document["full_loss"] is None:
        raise report.stopped if isinstance(report.stopped, SwaaError) else KeyboardInterrupt
    if json_file not in (None, "-"):
        _write(json_file, document, force)
    if plot_file is not None and document["ranking"]:
        with atomic_output(plot_file, force=force) as file:
            plot(document, file, Path(plot_file).suffix.lstrip(".").lower() or "png")
    if output is not None and config and not report.stopped:
        _write(output, config.to_dict(), force)
    written = _annotate(model, annotated, in_place, config, force) if config and not report.stopped else []
    if ours and path is not None and not report.stopped:
        path.unlink(missing_ok=True)
    click.echo(json.dumps(document, indent=2) if json_file == "-" else table(document))
    if json_file != "-":
        for file in (output, *written) if not report.stopped else ():
            if file is not None:
                click.echo(f"wrote {file}")
    if isinstance(report.stopped, SwaaError):
        raise report.stopped
    if report.stopped:
        raise KeyboardInterrupt


def _length(facts: ModelFile, wanted: int | None) -> int:
    trained = facts.context_length
    if wanted is not None and trained and wanted > trained:
        raise ConfigError(f"--length {wanted} exceeds the {trained} tokens that the model was trained for; lower it")
    return wanted or min(LENGTH, trained or LENGTH)


def _settings(swaa: SwaaConfig | None, length: int) -> SwaaConfig:
    """What slides: as given, which must leave something outside of the window; else the recipe fast, cut to fit."""
    if swaa is None:
        fast = RECIPES["fast"].config
        window = min(fast.window_size, length // 4)
        return dataclasses.replace(
            fast, window_size=window, sink_count=min(fast.sink_count, window // 8), recipe=CUSTOM
        )
    if swaa.window_size + swaa.sink_count >= length:
        raise ConfigError(
            f"window {swaa.window_size} and {swaa.sink_count} sinks show all of {length} tokens, so nothing could be "
            f"lost; give a smaller --window or a larger --length"
        )
    return swaa


def _cases(
    model: str,
    text_file: str | None,
    length: int,
    swaa: SwaaConfig,
    *,
    tasks: str,
    samples: int | None,
    answer_tokens: int,
    seed: int,
    compare: bool,
    no_chat: bool,
) -> tuple[list[Case], list[Case]]:
    """The cases, and as many others for --compare."""
    from swaa_edge.calibrate.cases import from_samples, from_text
    from swaa_edge.cli.run import prompt_text
    from swaa_edge.engine.tokenizer import tokenize
    from swaa_edge.evaluate.prompts import Prompts
    from swaa_edge.evaluate.tasks import TaskSettings, build

    if text_file is not None:
        text = prompt_text(None, text_file)
        head = tokenize(model, "")
        with Prompts(model, chat=False) as prompts:
            tokens = prompts.tokenize(text)
        return from_text(tokens, head=head, length=length, answer=answer_tokens, count=samples or 16, held_out=compare)
    names = tuple(name.strip() for name in tasks.split(","))
    found = []
    with Prompts(model, chat=not no_chat) as prompts:
        for number in range(1 + compare):
            plan = TaskSettings(names, (length - _ROOM,), samples or 4, 2 * seed + number, beyond=swaa.window_size)
            made = from_samples(build(plan, prompts), prompts)
            found.append([dataclasses.replace(case, id=f"{'ab'[number]}/{case.id}") for case in made])
    return found[0], found[1] if compare else []


#: Tokens of a length that are left for the answer.
_ROOM = 64


def _key(facts: ModelFile, swaa: SwaaConfig, engine: Engine, cases: list[Case]) -> dict[str, Any]:
    """All that a loss depends on. Not the method: a second one finds what the first one measured."""
    tokens = hashlib.sha256(json.dumps([(case.id, case.prompt, case.answer) for case in cases]).encode())
    return {
        "calibration": 1,
        "model": fingerprint(facts, engine.lora),
        "swaa": dataclasses.replace(swaa, fa_layers="none", recipe=CUSTOM, adapter=None).to_dict(),
        "cache_type": engine.cache_type,
        "cases": tokens.hexdigest(),
    }


class _Claimed(Exception):
    pass


def _claim(path: str, force: bool) -> None:
    """Raise now what writing `path` would raise after hours. Raises `OutputError`."""
    with contextlib.suppress(_Claimed), atomic_output(path, force=force):
        raise _Claimed


def _write(path: str, document: dict[str, Any], force: bool) -> None:
    with atomic_output(path, force=force) as file:
        file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _annotate(model: str, output: str | None, in_place: bool, config: SwaaConfig, force: bool) -> list[Path]:
    if output is None and not in_place:
        return []
    from swaa_edge.convert.annotate import annotate

    with progress_bar("Writing") as on_progress:
        return annotate(model, output, config, in_place=in_place, force=force, on_progress=on_progress)


def _told(at: Progress) -> tuple[str, object]:
    left = "" if at.seconds_left is None else f", about {duration(at.seconds_left)} left"
    return f"{at.done:,}/{at.total:,} FA layers: {at.what}{left}", at.what
