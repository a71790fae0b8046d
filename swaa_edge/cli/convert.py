"""`swaa-edge convert`: a Hugging Face model directory to GGUF, quantized and with SWAA keys if asked.

swaa-edge convert Qwen3-4B -o qwen3-4b.gguf --quantize Q4_K_M --recipe balanced
"""

import sys

import click

from swaa_edge.cli.options.swaa import recipe_table, swaa_options
from swaa_edge.config import SwaaConfig


@click.command(epilog=recipe_table())
@click.argument("model", metavar="HF_DIR")
@click.option("-o", "--output", required=True, metavar="OUT.gguf", help="The file to write.")
@click.option("--outtype", metavar="TYPE", default="auto", help="f16, bf16, f32, q8_0 or auto.  [auto]")
@click.option("--quantize", metavar="TYPE", help="Quantize with llama.cpp: Q4_K_M, Q5_K_M, Q8_0, ...")
@click.option("--lora", metavar="DIR", help="Merge this LoRA adapter, as PEFT saved it, into the model first.")
@click.option("--adapter-only", is_flag=True, help="With --lora: the adapter alone, for --lora of run and others.")
@click.option("--pre", metavar="NAME", help="Name of the pre-tokenizer, for a tokenizer that is not recognised.")
@click.option("--force", is_flag=True, help="Replace OUT.gguf if it exists.")
@click.option("-v", "--verbose", is_flag=True, help="Show the logs of all steps.")
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
    """HF model directory to GGUF with SWAA keys.

    Takes safetensors checkpoints of every architecture that llama.cpp's converter knows. Without SWAA
    settings the result is a plain GGUF; `annotate` can add them later. An adapter that says what it was trained under
    brings its settings along, and is refused under others.

    \b
    swaa-edge convert Qwen3-4B -o qwen3-4b.gguf --quantize Q4_K_M --recipe balanced
    swaa-edge convert Qwen3-4B -o tuned.gguf --outtype f16 --lora my-adapter
    swaa-edge convert Qwen3-4B -o my-adapter.gguf --lora my-adapter --adapter-only
    """
    if adapter_only and lora is None:
        raise click.UsageError("--adapter-only writes the adapter that --lora names; add --lora DIR")
    if adapter_only and (quantize is not None or pre is not None):
        option = "--quantize" if quantize is not None else "--pre"
        raise click.UsageError(f"{option} is for a model; --adapter-only takes --outtype f32, f16, bf16, q8_0 or auto")
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
