"""`swaa-edge convert`: convert a Hugging Face model directory to GGUF.

swaa-edge convert Qwen3-4B -o qwen3-4b.gguf --quantize Q4_K_M --recipe balanced
"""

import sys

import click

from swaa_edge.cli.options.output import force_option
from swaa_edge.cli.options.swaa import recipe_table, swaa_options
from swaa_edge.config import SwaaConfig


@click.command(epilog=recipe_table())
@click.argument("model", metavar="HF_DIR")
@click.option("-o", "--output", required=True, metavar="OUT.gguf", help="File to write.")
@click.option(
    "--outtype",
    metavar="TYPE",
    default="auto",
    show_default=True,
    help="Type of the output weights: f16, bf16, f32, q8_0, or auto to keep the type of the input.",
)
@click.option("--quantize", metavar="TYPE", help="Quantize with llama.cpp: Q4_K_M, Q5_K_M, Q8_0, ...")
@click.option("--lora", metavar="DIR", help="Merge this LoRA adapter, saved by PEFT, into the model.")
@click.option(
    "--adapter-only",
    is_flag=True,
    help="Convert only the adapter given with --lora, to a GGUF that run --lora can apply.",
)
@click.option("--pre", metavar="NAME", help="Pre-tokenizer to use if the tokenizer is not recognized.")
@force_option
@click.option("-v", "--verbose", is_flag=True, help="Show the log output of every step.")
@swaa_options
def convert(
    model: str,
    output: str,
    outtype: str,
    quantize: str | None,
    lora: str | None,
    adapter_only: bool,
    pre: str | None,
    force: bool,
    verbose: bool,
    swaa: SwaaConfig | None,
) -> None:
    """Convert a Hugging Face model directory to GGUF, with SWAA keys.

    The weights must be safetensors files of an architecture that llama.cpp's converter supports. Without SWAA settings,
    the result is a plain GGUF, to which annotate can add settings later. If an adapter was trained under a recipe,
    the recipe provides the settings, and other settings are refused.

    \b
    swaa-edge convert Qwen3-4B -o qwen3-4b.gguf --quantize Q4_K_M --recipe balanced
    swaa-edge convert Qwen3-4B -o tuned.gguf --outtype f16 --lora my-adapter
    swaa-edge convert Qwen3-4B -o my-adapter.gguf --lora my-adapter --adapter-only
    """
    if adapter_only and lora is None:
        raise click.UsageError("--adapter-only converts the adapter given with --lora; add --lora DIR")
    if adapter_only and (quantize is not None or pre is not None):
        option = "--quantize" if quantize is not None else "--pre"
        raise click.UsageError(f"{option} does not apply to --adapter-only; use --outtype f32, f16, bf16, q8_0 or auto")
    from swaa_edge.convert import hf, lora_to_gguf

    def announce(step: str) -> None:
        if sys.stderr.isatty() or verbose:
            click.echo(f"{step} ...", err=True)

    options = {"outtype": outtype.lower(), "swaa": swaa, "force": force, "verbose": verbose, "on_step": announce}
    if lora is not None and adapter_only:
        written = lora_to_gguf.convert_adapter(model, lora, output, **options)
    else:
        written = hf.convert(model, output, quantize=quantize, lora=lora, pre=pre, **options)
    click.echo(f"wrote {written} ({written.stat().st_size / 1e6:,.1f} MB)")
