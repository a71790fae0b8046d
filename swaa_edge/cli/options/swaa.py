"""The options by which every command takes SWAA settings, so that they read the same everywhere.

@click.command()
@swaa_options
def annotate(swaa: SwaaConfig | None): ...
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from swaa_edge.config import CUSTOM, FULL_ATTENTION_ACCURACY, FULL_ATTENTION_SECONDS, RECIPES, SwaaConfig


def swaa_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the SWAA options, and pass it one argument `swaa`: a SwaaConfig, or None if none was given.

    --recipe or --config is the base, single settings change it; without a base --window is needed.
    Errors: `click.UsageError` for options that exclude each other, `ConfigError` for a wrong value.
    """

    @functools.wraps(command)
    def with_config(*args: Any, chosen: Chosen, **kwargs: Any) -> Any:
        return command(*args, swaa=chosen_config(chosen.recipe, chosen.config_file, chosen.single), **kwargs)

    return raw_swaa_options(with_config)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The SWAA options as they were given. single: those of single settings, by the field of SwaaConfig."""

    recipe: str | None = None
    config_file: str | None = None
    single: dict[str, Any] = dataclasses.field(default_factory=dict)


def raw_swaa_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `swaa_options`, for a command that makes its own of them: it is passed `chosen`."""

    @functools.wraps(command)
    def with_chosen(*args: Any, recipe: str | None, config_file: str | None, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in ("window_size", "sink_count", "fa_layers", "fa_decode")}
        single = {name: value for name, value in given.items() if value is not None}
        return command(*args, chosen=Chosen(recipe, config_file, single), **kwargs)

    for option in reversed(_OPTIONS):
        with_chosen = option(with_chosen)
    return with_chosen


def swaa_options_or_full(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `swaa_options`, with --full-attention, for which the command is passed `swaa=False`."""

    @functools.wraps(command)
    def with_choice(*args: Any, swaa: SwaaConfig | None, full_attention: bool, **kwargs: Any) -> Any:
        if full_attention and swaa is not None:
            raise click.UsageError("--full-attention turns SWAA off; give it or SWAA settings, not both")
        return command(*args, swaa=False if full_attention else swaa, **kwargs)

    help_text = "Run full attention, whatever SWAA keys the file has."
    return swaa_options(click.option("--full-attention", is_flag=True, help=help_text)(with_choice))


def chosen_config(recipe: str | None, config_file: str | None, single: dict[str, Any]) -> SwaaConfig | None:
    """The configuration that the options mean: the base (recipe or file) with the single settings put over it."""
    if recipe is not None and config_file is not None:
        raise click.UsageError("--recipe and --config are both a whole configuration; give one of them")
    if recipe is not None:
        base = SwaaConfig.from_recipe(recipe)
    elif config_file is not None:
        base = SwaaConfig.from_json(config_file)
    elif not single:
        return None
    elif "window_size" not in single:
        raise click.UsageError("SWAA settings need a window; add --window N, or start from --recipe NAME")
    else:
        return SwaaConfig(**single)
    return dataclasses.replace(base, recipe=CUSTOM, **single) if single else base


def recipe_table() -> str:
    """The recipes and their published figures, for the foot of a command's help."""
    lines = [f"{'recipe':<9} {'W':>5} {'S':>4} {'FA layers':<9} {'FA decode':<9} {'accuracy':<17} {'LoRA':<10} time"]
    for name, recipe in RECIPES.items():
        config, decode = recipe.config, "yes" if recipe.config.fa_decode else "no"
        lines.append(
            f"{name:<9} {config.window_size:>5} {config.sink_count:>4} {config.fa_layers:<9} {decode:<9} "
            f"{recipe.accuracy:<17} {recipe.accuracy_lora:<10} {recipe.seconds:.2f} s"
        )
    lines.append(f"{'full attention':<40} {FULL_ATTENTION_ACCURACY:<17} {'':<10} {FULL_ATTENTION_SECONDS:.2f} s")
    note = (
        "Accuracy: LongMemEval at 24k, thinking/instruct, in percent; time: 128k tokens in, 512 out; "
        "both published for Qwen3-4B (arXiv 2512.10411)."
    )
    # \b keeps click from re-wrapping the table.
    return "\b\n" + "\n".join(lines) + "\n\n" + note


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """An `on_progress(done, total)` callback that draws a bar on stderr, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1, label=label, file=sys.stderr) as bar:

        def advance(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield advance


_OPTIONS = [
    click.option("--recipe", metavar="NAME", help=f"A preset: {', '.join(RECIPES)}. Single settings change it."),
    click.option(
        "--config",
        "config_file",
        metavar="FILE.json",
        help="Settings from a JSON file, in our spelling or the paper's. Single settings change them.",
    ),
    click.option("--window", "window_size", type=int, metavar="N", help="Window W in tokens, current one included."),
    click.option("--sinks", "sink_count", type=int, metavar="N", help="The first N tokens stay visible.  [0]"),
    click.option(
        "--fa-layers",
        metavar="SPEC",
        help='Layers that keep full attention: "1::2", "0,5,7", "none" or "all".  [none]',
    ),
    click.option(
        "--fa-decode/--no-fa-decode",
        default=None,
        help="Whether sliding layers see everything while generating.  [no]",
    ),
]
