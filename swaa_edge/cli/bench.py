"""`swaa-edge bench`: full attention against SWAA configurations, as ratios, beside the bound.

swaa-edge bench model.gguf --prompt-tokens 4096,16384 --recipes quality,balanced
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swaa_edge.bench.random_model import SHAPES, TYPES, write_shape
from swaa_edge.cli.options.engine import Engine, engine_options, status_line
from swaa_edge.cli.options.swaa import swaa_options
from swaa_edge.config import RECIPES, SwaaConfig
from swaa_edge.errors import SwaaError
from swaa_edge.support.atomic import atomic_output
from swaa_edge.support.progress import duration

if TYPE_CHECKING:
    from swaa_edge.bench.bench import Progress
    from swaa_edge.bench.report import Compared

#: Compared by default, unless the file has settings of its own.
DEFAULT_RECIPES = ("quality", "balanced", "fast")
#: The name by which --recipes takes the patched library with SWAA off.
OFF = "off"


class _Lengths(click.ParamType):
    name = "lengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        parts = str(value).replace("_", "").split(",")
        if not all(part.strip().isdigit() and 0 < int(part) < 2**31 for part in parts):
            self.fail(f"{value!r} must be numbers of tokens from 1, as in 4096,8192")
        return [int(part) for part in parts]


@click.command()
@click.argument("model", metavar="[MODEL.gguf]", required=False)
@click.option(
    "--prompt-tokens",
    type=_Lengths(),
    metavar="N,N,...",
    help="Prompt lengths to measure.  [4096,8192 as far as the model goes]",
)
@click.option(
    "--recipes",
    metavar="NAME,...",
    help=f"What to compare: {', '.join(RECIPES)}, FILE.json with settings, or {OFF} (SWAA turned off).  "
    f"[the file's own settings, else {','.join(DEFAULT_RECIPES)}]",
)
@click.option("--baseline", metavar="DIR", help="Folder of an unpatched libllama, which then runs full attention.")
@click.option(
    "--decode", type=click.IntRange(0), metavar="N", default=32, show_default=True, help="Tokens generated after it."
)
@click.option("--repeat", type=click.IntRange(1), metavar="N", help="Rounds per length.  [3; above 8192 tokens: 2]")
@click.option("--json", "json_file", metavar="FILE", help="Write one JSON document, raw samples included; - is stdout.")
@click.option("--plot", "plot_file", metavar="FILE.png", help="Draw speed and ratios over the prompt length.")
@click.option("--force", is_flag=True, help="Replace these files if they exist.")
@click.option("--shape", metavar="NAME", help=f"Instead of a model, random weights: {', '.join(SHAPES)}.")
@click.option("--layers", type=click.IntRange(1), metavar="N", help="With --shape: only so many layers.")
@click.option("--type", "ftype", metavar="TYPE", help=f"With --shape: {', '.join(TYPES)}.  [{TYPES[0]}]")
@click.option("--vocab", type=click.IntRange(1), metavar="N", help="With --shape: only so many tokens.")
@click.option("--progress/--no-progress", default=None, help="Show how far it is.  [if stderr is a terminal]")
@engine_options
@swaa_options
def bench(
    model: str | None,
    prompt_tokens: list[int] | None,
    recipes: str | None,
    baseline: str | None,
    decode: int,
    repeat: int | None,
    json_file: str | None,
    plot_file: str | None,
    force: bool,
    progress: bool | None,
    engine: Engine,
    swaa: SwaaConfig | None,
    **shape: Any,
) -> None:
    """Full attention against SWAA configurations, as ratios.

    All sides are measured in one run, in turns; the table has medians. A ratio above 1 is faster than full
    attention. The bound is the prefill ratio that would hold if sliding layers cost exactly their window's
    share of the measured attention time. Ctrl-C prints what was measured so far.

    \b
    swaa-edge bench model.gguf --prompt-tokens 4096,16384 --recipes quality,balanced
    swaa-edge bench --shape qwen3-0.6b --layers 4 --window 2048 --sinks 64 --plot bench.png
    """
    from swaa_edge.bench import bench as tool
    from swaa_edge.bench.report import Settings, check_plot, plot

    if plot_file is not None:
        check_plot()
    if engine.lora is not None:
        raise click.UsageError("bench measures no adapters; merge it into the model by: swaa-edge convert --lora DIR")
    sizes = {name: value for name, value in vars(engine).items() if name != "lora"}
    settings = Settings(decode=decode, repeat=repeat, **sizes)
    with contextlib.ExitStack() as stack:
        # Both files are claimed before the minutes of measuring.
        outputs = {file for file in (json_file, plot_file) if file not in (None, "-")}
        files = {file: stack.enter_context(atomic_output(file, force=force)) for file in outputs}
        path = stack.enter_context(_model(model, **shape))
        configs = compared(path, recipes, swaa)
        shown = stack.enter_context(status_line(progress, _told))
        report = tool.bench(path, configs, prompt_tokens, settings=settings, baseline=baseline, on_progress=shown)
        document = report.to_dict()
        if not document["rows"]:
            raise KeyboardInterrupt
        if json_file in files:
            files[json_file].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if plot_file is not None:
            plot(document, files[plot_file], Path(plot_file).suffix.lstrip(".").lower() or "png")
    # After the files: minutes of measuring must not be lost to a reader of stdout that went away.
    click.echo(json.dumps(document, indent=2) if json_file == "-" else table(document))
    if isinstance(report.stopped, SwaaError):
        raise report.stopped
    if report.stopped:
        raise KeyboardInterrupt


def compared(path: str | os.PathLike[str], recipes: str | None, swaa: SwaaConfig | None) -> dict[str, Compared]:
    """The configurations that the options mean, by the names under which they are shown.

    Raises `ConfigError` for a recipe that doesn't exist or a file without sound settings, `ModelFileError`.
    """
    from swaa_edge.metadata import read_swaa

    configs: dict[str, Compared] = {}
    for name in [] if recipes is None else map(str.strip, recipes.split(",")):
        if name.endswith(".json"):
            configs[Path(name).stem] = SwaaConfig.from_json(name)
        else:
            configs[name] = False if name == OFF else SwaaConfig.from_recipe(name)
    if swaa is None and not configs:
        swaa = read_swaa(path)
    if swaa is not None:
        configs[swaa.recipe] = swaa
    return configs or {name: SwaaConfig.from_recipe(name) for name in DEFAULT_RECIPES}


@contextlib.contextmanager
def _model(given: str | None, shape: str | None, **measures: Any) -> Iterator[str]:
    """The model's path; a shape is written to a temporary folder, for as long as this lasts."""
    chosen = {name: value for name, value in measures.items() if value is not None}
    if (given is None) == (shape is None):
        raise click.UsageError("give either MODEL.gguf or --shape NAME")
    if given is not None:
        if chosen:
            raise click.UsageError("--layers, --type and --vocab belong to --shape; a model file has its own")
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="swaa-edge-bench-") as folder:
        yield str(write_shape(Path(folder, f"{Path(shape).name}.gguf"), shape, **chosen))


def table(document: dict[str, Any]) -> str:
    """The report for people: what was measured where, a row per configuration and length, and how to read it."""
    rows = document["rows"]
    lines = [tuple(_COLUMNS), *(tuple(cell(row) for cell in _COLUMNS.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(map(str.rjust, line, widths)) for line in lines]
    for at in range(len(rows) - 1, 0, -1):
        if rows[at]["prompt_tokens"] != rows[at - 1]["prompt_tokens"]:
            shown.insert(at + 1, "")
    return "\n".join([*_facts(document), "", *shown, "", *_notes(document)])


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "prompt": lambda row: f"{row['prompt_tokens']:,}",
    "config": lambda row: row["config"],
    "prefill tok/s": lambda row: f"{row['prefill_tok_s']:,.1f}",
    "prefill": lambda row: _times(row["prefill_ratio"]),
    "bound": lambda row: _times(row["bound"]),
    "of bound": lambda row: "-" if row["ratio_to_bound"] is None else f"{row['ratio_to_bound']:.0%}",
    "decode tok/s": lambda row: "-" if row["decode_tok_s"] is None else f"{row['decode_tok_s']:,.1f}",
    "decode": lambda row: _times(row["decode_ratio"]),
    "request": lambda row: _times(row["ratio"]),
    "compute MiB": lambda row: f"{row['compute_buffer_bytes'] / 2**20:,.1f}",
    "KV MiB": lambda row: f"{row['kv_bytes'] / 2**20:,.1f}",
}


def _facts(document: dict[str, Any]) -> Iterator[str]:
    model, machine, settings, rows = (document[name] for name in ("model", "machine", "settings", "rows"))
    threads = settings["threads"] or f"{machine['cores']} in prefill, {max(machine['cores'] // 2, 1)} in decode"
    full, size = document["libraries"]["full"], f"{model['bytes'] / 1e9:.2f} GB"
    yield f"{model['name']} ({model['architecture']}, {model['layers']} layers, {model['type']}, {size})"
    device = "" if rows[0]["device"] == machine["cpu"] else f"on {rows[0]['device']}; "
    yield (
        f"{device}{machine['cpu']}, threads: {threads}; {settings['cache_type']} KV cache, "
        f"ubatch {settings['ubatch']}; prompt: {document['prompt']}"
    )
    patched = "the patched library with SWAA off" if full["patched"] else f"the unpatched library in {full['path']}"
    yield f"full attention: {patched} (ggml {full['ggml']})"


def _notes(document: dict[str, Any]) -> Iterator[str]:
    load, cores = document["machine"]["load"], document["machine"]["cores"]
    if load is not None and load > cores / 4:
        yield f"The machine was busy when this began (load {load:.1f} on {cores} cores); the times may be noise."
    if document["stopped"]:
        yield f"Stopped early ({document['stopped']}); this is what was measured until then."
    yield "prefill, decode, request (both): full attention's time over this one's; above 1.00x is faster."
    yield "bound: the prefill ratio if sliding layers cost just their window's share of the measured attention time."


def _told(at: Progress) -> tuple[str, object]:
    left = "" if at.seconds_left is None else f", about {duration(at.seconds_left)} left"
    text = f"{at.turn}/{at.turns} {at.config}: {at.done:,}/{at.prompt_tokens:,} tokens{left}"
    return text, (at.turn, at.done) if at.done in (0, at.prompt_tokens) else None
