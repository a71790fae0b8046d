"""`swaa-edge finetune`: train a LoRA adapter for a Hugging Face model, under the SWAA mask.

swaa-edge finetune Qwen3-4B --data distilled.jsonl --output adapter --recipe quality
"""

from __future__ import annotations

import functools
from typing import Any

import click

from swaa_edge.cli.options.output import json_option, print_result, progress_option, run_shown
from swaa_edge.cli.options.settings import setting_option
from swaa_edge.cli.options.swaa import swaa_options
from swaa_edge.config import SwaaConfig
from swaa_edge.finetune.settings import Settings

_setting = functools.partial(setting_option, Settings)


class _Names(click.ParamType):
    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(name.strip() for name in value.split(","))


@click.command()
@click.argument("model", metavar="HF_DIR")
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="JSON Lines or Parquet file with the fields prompt and answer, or with messages.",
)
@click.option("--output", "-o", required=True, metavar="DIR", help="Folder for the adapter.")
@_setting("--lora-rank", int, "N", "Rank of the LoRA matrices.")
@_setting("--lora-alpha", float, "X", "Scale of the LoRA matrices; see --rslora.")
@click.option(
    "--rslora/--no-rslora",
    default=Settings.rslora,
    help="Divide --lora-alpha by the square root of the rank (rsLoRA) instead of by the rank.  [default: rslora]",
)
@_setting("--lora-dropout", float, "X", "Dropout on the input of the LoRA matrices.")
@_setting("--target-modules", _Names(), "NAME,...", "Linear layers that get LoRA matrices.")
@_setting("--epochs", float, "X", "Number of training epochs.")
@_setting("--max-steps", int, "N", "Number of optimizer steps, instead of --epochs.")
@_setting("--batch-size", int, "N", "Examples per batch.")
@_setting("--gradient-accumulation-steps", int, "N", "Batches per optimizer step.")
@_setting("--learning-rate", float, "X", "Peak learning rate.")
@_setting("--warmup-ratio", float, "X", "Fraction of the steps used for learning-rate warm-up.")
@_setting(
    "--max-length", int, "N", "Leave out examples with more than N tokens.  [default: the model's context length]"
)
@_setting("--val-fraction", float, "X", "Fraction of the examples held out to measure the validation loss.")
@_setting(
    "--eval-steps",
    int,
    "N",
    "Number of steps between validations; each validation saves a checkpoint.  "
    "[default: a tenth of all steps, up to 100]",
)
@_setting("--patience", int, "N", "Stop after N validations without improvement; 0 disables this.")
@click.option("--gradient-checkpointing", is_flag=True, help="Save memory by recomputing activations.")
@click.option("--bf16/--no-bf16", default=None, help="Compute in bfloat16.  [default: if the GPU supports it]")
@click.option("--no-chat", is_flag=True, help="Train on plain text, without the model's chat template.")
@_setting("--seed", int, "N", "Seed of all random choices.")
@click.option("--plot", "plot_file", metavar="FILE.png", help="Plot the training and validation losses.")
@json_option
@click.option("--force", is_flag=True, help="Overwrite existing files, and use DIR even if it is not empty.")
@progress_option
@swaa_options
def finetune(
    model: str,
    data: str,
    output: str,
    json_file: str | None,
    swaa: SwaaConfig | None,
    no_chat: bool,
    **options: Any,
) -> None:
    """Train a LoRA adapter under the SWAA mask.

    In training, prompts use the engine's attention mask for prefill, and answers use its mask for decode. Only
    answer tokens contribute to the loss. `distill` creates training data from the model's own responses. The adapter
    stores its recipe. `convert --lora DIR` merges the adapter into a GGUF model, or with --adapter-only converts the
    adapter alone. After Ctrl-C, the same command resumes the run.

    \b
    swaa-edge finetune Qwen3-4B --data distilled.jsonl --output adapter --recipe quality
    swaa-edge finetune Qwen3-4B --data distilled.jsonl -o adapter --recipe fast --batch-size 2 --gradient-checkpointing
    """
    if swaa is None:
        raise click.UsageError(
            "an adapter is trained under one recipe; give --recipe NAME, --config FILE or --window N"
        )
    from swaa_edge.finetune import finetune as train

    outcome = run_shown(train, model, data, output, swaa, json_file=json_file, chat=not no_chat, **options)
    print_result(outcome, as_json=json_file == "-")
