"""`swaa-edge calibrate`: find the layers that should keep full attention.

swaa-edge calibrate model.gguf --text notes.txt -o settings.json
"""

from __future__ import annotations

import functools
from typing import Any

import click

from swaa_edge.calibrate.settings import METHODS, PROMPT_TOKENS, SAMPLES, WINDOWS, CalibrateSettings
from swaa_edge.cli.options.engine import engine_options
from swaa_edge.cli.options.output import (
    force_option,
    json_option,
    print_result,
    progress_option,
    raise_stopped,
    run_shown,
)
from swaa_edge.cli.options.settings import setting_option
from swaa_edge.cli.options.swaa import swaa_options
from swaa_edge.config import SwaaConfig

_setting = functools.partial(setting_option, CalibrateSettings)


class _Keep(click.ParamType):
    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            return int(value) if str(value).isdigit() else float(value)
        except ValueError:
            self.fail(f"{value!r} must be a number of layers, or a fraction such as 0.25")


@click.command()
@click.argument("model", metavar="MODEL.gguf")
@_setting("--text", str, "FILE", 'Measure on this UTF-8 text instead of on retrieval tasks; "-" means stdin.')
@_setting("--task", str, "NAME,...", "Retrieval tasks.")
@_setting(
    "--samples",
    click.IntRange(1),
    "N",
    f"Number of samples per task; with --text, number of windows.  [default: {SAMPLES}; with --text: {WINDOWS}]",
)
@_setting(
    "--prompt-tokens",
    click.IntRange(16),
    "N",
    f"Length of a sample in tokens, answer included.  "
    f"[default: {PROMPT_TOKENS}, or the model's context length if that is less]",
)
@_setting(
    "--answer-tokens",
    click.IntRange(1),
    "N",
    "With --text: measure the loss on the last N tokens of each window.",
)
@_setting("--seed", int, "N", "Seed of the retrieval tasks.")
@_setting("--keep", _Keep(), "N|F", "Number of layers that keep full attention, or their fraction of all layers.")
@_setting(
    "--method",
    click.Choice(METHODS),
    None,
    "How to rank a layer. nll: by the increase of the loss if only this layer slides. keep: by the decrease of the "
    "loss if only this layer keeps full attention. greedy: by the decrease of the loss if this layer, in addition to "
    "the layers already chosen, keeps full attention.",
)
@_setting(
    "--candidates",
    click.IntRange(1),
    "N",
    "With --method greedy: try only the N layers that --method keep ranks highest.",
)
@_setting(
    "--swaps",
    click.IntRange(0),
    "N",
    "With --method greedy: as a last step, try to replace the N weakest of the chosen layers.",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Compare the chosen layers with the first layers and with periodic patterns, on held-out samples.",
)
@click.option("-o", "--output", metavar="CONFIG.json", help="Write the chosen settings to a file for --config.")
@click.option("--annotate", metavar="OUT.gguf", help="Write a copy of the model with the chosen settings.")
@click.option("--in-place", is_flag=True, help="Write the chosen settings into MODEL.gguf.")
@json_option
@click.option("--plot", "plot_file", metavar="FILE.png", help="Plot a bar chart with the gain of each layer.")
@force_option
@click.option(
    "--journal",
    "journal_file",
    metavar="FILE",
    help="Keep the measurements in this file for resuming.  [default: in the user's cache until the run is complete]",
)
@click.option("--no-chat", is_flag=True, help="Ask in plain text, without the model's chat template.")
@progress_option
@engine_options
@swaa_options
def calibrate(
    model: str,
    json_file: str | None,
    no_chat: bool,
    swaa: SwaaConfig | None,
    **options: Any,
) -> None:
    """Find the layers that should keep full attention.

    The engine measures how the loss of reference answers changes if layers of the model slide; the result is a value
    for --fa-layers. Without SWAA settings, the recipe fast applies, with window and sinks shortened to fit
    short prompts. FA layers in the settings are used only by --compare. After Ctrl-C, the same command resumes the run.

    \b
    swaa-edge calibrate model.gguf --text notes.txt -o settings.json
    swaa-edge calibrate model.gguf --recipe balanced --method greedy --compare --plot layers.png
    """
    from swaa_edge.calibrate import calibrate as run

    found = run_shown(run, model, swaa, json_file=json_file, chat=not no_chat, **options)
    print_result(found, as_json=json_file == "-")
    if json_file != "-":
        for file in found.written:
            click.echo(f"wrote {file}")
    raise_stopped(found.stopped)
