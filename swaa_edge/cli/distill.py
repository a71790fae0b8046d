"""`swaa-edge distill`: collect a model's own correct responses as training data.

swaa-edge distill model.gguf --data questions.jsonl -o data.jsonl
"""

from __future__ import annotations

import functools
from typing import Any

import click

from swaa_edge.cli.options.engine import engine_options, sampling_options
from swaa_edge.cli.options.eval import file_options
from swaa_edge.cli.options.output import json_flag, print_result, raise_stopped, run_shown
from swaa_edge.cli.options.settings import setting_option
from swaa_edge.finetune.settings import SAMPLES, TEMPERATURE, DistillSettings

_setting = functools.partial(setting_option, DistillSettings)


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="JSON Lines or Parquet file with the fields prompt, question and answer.",
)
@click.option("-o", "--output", required=True, metavar="OUT.jsonl", help="Output file in JSON Lines.")
@_setting(
    "--samples",
    click.IntRange(1, 10**6),
    "N",
    f"Maximum number of responses per record.  [default: {SAMPLES}; 1 at --temp 0]",
)
@_setting("--keep", click.IntRange(1), "N", "Number of correct responses to keep per record.")
@_setting(
    "--max-tokens",
    click.IntRange(1),
    "N",
    "Maximum length of a response in tokens; longer responses are not kept. Reasoning models need thousands of tokens.",
)
@json_flag
@file_options
@functools.partial(sampling_options, default_temp=TEMPERATURE, default_seed=0)
@engine_options
def distill(
    model: str,
    data: str,
    output: str,
    as_json: bool,
    no_chat: bool,
    sampling: dict[str, Any],
    **options: Any,
) -> None:
    """Make training data for `finetune`: the model's own correct responses to the prompts in a file.

    MODEL is a GGUF, or a Hugging Face model directory (which needs torch). The model runs under full
    attention, even if the file has SWAA settings. The model answers each record until --keep responses are correct, at
    most --samples times. After Ctrl-C, the same command resumes the run, even if --samples, --keep,
    --limit or --scorer has changed.

    \b
    swaa-edge distill model.gguf --data questions.jsonl -o data.jsonl
    swaa-edge distill Qwen3-4B --data questions.parquet -o data.jsonl --max-tokens 8192 --scorer exact
    swaa-edge finetune Qwen3-4B --data data.jsonl --recipe quality --output adapter
    """
    from swaa_edge.finetune import distill as run

    found = run_shown(run, model, data, output, chat=not no_chat, **sampling, **options)
    if found.collected.responses:
        print_result(found, as_json)
    raise_stopped(found.stopped)
