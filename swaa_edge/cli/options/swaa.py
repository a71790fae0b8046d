"""The options for SWAA settings.

@click.command()
@swaa_options
def annotate(swaa): ...
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import click

from swaa_edge.config import (
    CUSTOM,
    FULL_ATTENTION,
    FULL_ATTENTION_ACCURACY,
    FULL_ATTENTION_SECONDS,
    RECIPES,
    SwaaConfig,
)
from swaa_edge.support.table import table


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The SWAA options of a command line.

    base: the configuration from --recipe or --config, or None.
    changes: the values of the other options, by field of `SwaaConfig`.
    """

    base: SwaaConfig | None = None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> SwaaConfig | None:
        """The configuration from all options, or None if no option was given.

        Raises `click.UsageError` if the window is missing, and `ConfigError` for a wrong value.
        """
        if self.base is not None:
            return dataclasses.replace(self.base, recipe=CUSTOM, **self.changes) if self.changes else self.base
        if not self.changes:
            return None
        if "window_size" not in self.changes:
            raise click.UsageError("SWAA settings need a window; add --window N, or start from --recipe NAME")
        return SwaaConfig(**self.changes)


def raw_swaa_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the SWAA options to a command. The command receives a `Chosen` as `chosen`.

    The command raises `click.UsageError` if --recipe and --config are both given, and `ConfigError` for a wrong value.
    """

    @functools.wraps(command)
    def with_chosen(*args: Any, recipe: str | None, config_file: str | None, **kwargs: Any) -> Any:
        given = {
            name: kwargs.pop(name) for name in ("window_size", "sink_count", "fa_layers", "fa_decode", "tail_count")
        }
        changes = {name: value for name, value in given.items() if value is not None}
        return command(*args, chosen=Chosen(_base(recipe, config_file), changes), **kwargs)

    for option in reversed(_OPTIONS):
        with_chosen = option(with_chosen)
    return with_chosen


def swaa_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the SWAA options to a command. The command receives `Chosen.config` as `swaa`."""

    @functools.wraps(command)
    def with_config(*args: Any, chosen: Chosen, **kwargs: Any) -> Any:
        return command(*args, swaa=chosen.config, **kwargs)

    return raw_swaa_options(with_config)


def swaa_options_or_full(command: Callable[..., Any]) -> Callable[..., Any]:
    """Do the same as `swaa_options`, and add --full-attention. This option sets `swaa` to `FULL_ATTENTION`."""

    @functools.wraps(command)
    def with_choice(*args: Any, swaa: SwaaConfig | None, full_attention: bool, **kwargs: Any) -> Any:
        if full_attention and swaa is not None:
            raise click.UsageError("--full-attention turns SWAA off; give either --full-attention or SWAA settings")
        return command(*args, swaa=FULL_ATTENTION if full_attention else swaa, **kwargs)

    help_text = "Run full attention and ignore the SWAA keys in the file."
    return swaa_options(click.option("--full-attention", is_flag=True, help=help_text)(with_choice))


def _base(recipe: str | None, config_file: str | None) -> SwaaConfig | None:
    if recipe is not None and config_file is not None:
        raise click.UsageError("--recipe and --config both name a whole configuration; give one of them")
    if recipe is not None:
        return SwaaConfig.from_recipe(recipe)
    return None if config_file is None else SwaaConfig.from_json(config_file)


def recipe_table() -> str:
    """Return a table of the recipes and the published figures, for the end of a help text."""
    rows = [["recipe", "W", "S", "FA layers", "FA decode", "T", "accuracy", "with LoRA", "time"]]
    for name, recipe in RECIPES.items():
        config, decode = recipe.config, "yes" if recipe.config.fa_decode else "no"
        settings = [
            str(config.window_size),
            str(config.sink_count),
            str(config.fa_layers),
            decode,
            str(config.tail_count),
        ]
        seconds = "-" if recipe.seconds is None else f"{recipe.seconds:.2f} s"
        rows.append([name, *settings, recipe.accuracy or "-", recipe.accuracy_lora or "-", seconds])
    rows.append(["full attention", "", "", "", "", "", FULL_ATTENTION_ACCURACY, "", f"{FULL_ATTENTION_SECONDS:.2f} s"])
    note = (
        "Accuracy in percent on LongMemEval at 24k tokens, reasoning/instruct model; time for a prompt of 128k tokens "
        "and 512 generated ones. Both were published for Qwen3-4B (arXiv 2512.10411), without a tail (--tail 0). The "
        "recipe early is ours; docs/results-real.md has its figures on a small model."
    )
    # \b keeps click from re-wrapping the table.
    return f"\b\n{table(rows)}\n\n{note}"


_OPTIONS = [
    click.option("--recipe", metavar="NAME", help=f"Start from a recipe: {', '.join(RECIPES)}."),
    click.option(
        "--config",
        "config_file",
        metavar="FILE.json",
        help="Start from settings in a JSON file, with key names of swaa-edge or of the SWAA paper.",
    ),
    click.option(
        "--window", "window_size", type=int, metavar="N", help="Window size W in tokens, current token included."
    ),
    click.option(
        "--sinks",
        "sink_count",
        type=int,
        metavar="N",
        help="Sink count S: the first S tokens stay visible.  [default: 0]",
    ),
    click.option(
        "--fa-layers",
        metavar="SPEC",
        help='Layers that keep full attention: a slice ("1::2"; ":1/4" for the first quarter), a list ("0,5,7"), '
        '"none" or "all".  [default: none]',
    ),
    click.option(
        "--fa-decode/--no-fa-decode",
        default=None,
        help="Let sliding layers see all tokens while generating (FA decode).  [default: no]",
    ),
    click.option(
        "--tail",
        "tail_count",
        type=int,
        metavar="N",
        help="Tail T: in layers with FA decode, the last T tokens of a prompt see all tokens.  [default: 0]",
    ),
]
