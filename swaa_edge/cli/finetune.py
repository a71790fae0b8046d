"""`swaa-edge finetune`: LoRA under the SWAA mask, on a Hugging Face model.

swaa-edge finetune Qwen3-4B --data distilled.jsonl --output adapter --recipe quality
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swaa_edge.bench.report import check_plot
from swaa_edge.cli.options.engine import status_line
from swaa_edge.cli.options.swaa import swaa_options
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import SwaaError
from swaa_edge.finetune.plot import plot
from swaa_edge.finetune.settings import Settings
from swaa_edge.support.atomic import atomic_output
from swaa_edge.support.progress import duration

if TYPE_CHECKING:
    from swaa_edge.finetune.train import Outcome, Run, Step

_DEFAULT = Settings()


class _Targets(click.ParamType):
    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(name.strip() for name in value.split(","))


def _option(*names: str, default: Any = None, **more: Any) -> Any:
    return click.option(*names, default=default, show_default=default is not None, **more)


@click.command()
@click.argument("model", metavar="HF_DIR")
@click.option("--data", required=True, metavar="FILE", help="JSON Lines or Parquet: prompt and answer, or messages.")
@click.option("--output", "-o", required=True, metavar="DIR", help="The adapter's folder.")
@_option("--rank", type=int, metavar="N", default=_DEFAULT.rank, help="Of LoRA's matrices.")
@_option("--alpha", type=float, metavar="X", default=_DEFAULT.alpha, help="LoRA's scale, over its rank.")
@_option("--rslora/--no-rslora", default=_DEFAULT.rslora, help="Over the rank's square root instead.")
@_option("--dropout", type=float, metavar="X", default=_DEFAULT.dropout, help="Of what LoRA reads.")
@_option("--targets", type=_Targets(), metavar="NAME,...", default=",".join(_DEFAULT.targets), help="Linear layers.")
@_option("--epochs", type=float, metavar="X", default=_DEFAULT.epochs, help="Times over the data.")
@_option("--steps", type=int, metavar="N", help="Steps of the optimizer, instead of --epochs.")
@_option("--batch", type=int, metavar="N", default=_DEFAULT.batch, help="Records at once.")
@_option("--accumulate", type=int, metavar="N", default=_DEFAULT.accumulate, help="Batches for a step.")
@_option("--rate", type=float, metavar="X", default=_DEFAULT.rate, help="Peak of the learning rate.")
@_option("--warmup", type=float, metavar="X", default=_DEFAULT.warmup, help="Share of the steps that it rises in.")
@_option("--max-length", type=int, metavar="N", help="Tokens of a record; longer ones are left out.  [the model's]")
@_option("--holdout", type=float, metavar="X", default=_DEFAULT.holdout, help="Share of records to measure loss on.")
@_option("--every", type=int, metavar="N", help="Steps between measuring and saving.  [a tenth, up to 100]")
@_option(
    "--patience", type=int, metavar="N", default=_DEFAULT.patience, help="Stop if it failed to fall so often; 0: never."
)
@_option("--gradient-checkpointing", "checkpointing", is_flag=True, default=False, help="Less memory, more time.")
@_option("--bf16/--no-bf16", "half", help="Compute in bfloat16.  [on a GPU that can]")
@_option("--no-chat", is_flag=True, default=False, help="Plain text, without the model's chat template.")
@_option("--seed", type=int, metavar="N", default=_DEFAULT.seed, help="Of everything random.")
@click.option("--plot", "plot_file", metavar="FILE.png", help="Draw the losses.")
@click.option("--json", "json_file", metavar="FILE", help="Write one JSON document; - is stdout.")
@click.option("--force", is_flag=True, help="Replace what is in DIR, and these files.")
@click.option("--progress/--no-progress", default=None, help="Show how far it is.  [if stderr is a terminal]")
@swaa_options
def finetune(
    model: str,
    data: str,
    output: str,
    plot_file: str | None,
    json_file: str | None,
    force: bool,
    progress: bool | None,
    swaa: SwaaConfig | None,
    half: bool | None,
    no_chat: bool,
    **chosen: Any,
) -> None:
    """Train a LoRA adapter under the SWAA mask.

    The prompts of DATA slide as they will in the engine, the answers decode as they will; the loss is of the answers.
    `distill` makes such data of the model's own answers. Ctrl-C loses nothing: the same command goes on. The adapter
    keeps its recipe; `convert --lora DIR` makes a GGUF of it, merged or apart.

    \b
    swaa-edge finetune Qwen3-4B --data distilled.jsonl --output adapter --recipe quality
    swaa-edge finetune Qwen3-4B --data distilled.jsonl -o adapter --recipe fast --batch 2 --gradient-checkpointing
    """
    if swaa is None:
        raise click.UsageError(
            "an adapter is trained under one recipe; give --recipe NAME, --config FILE or --window N"
        )
    from swaa_edge.convert.hf_folder import read_checkpoint

    Settings(**chosen)  # before anything is loaded
    read_checkpoint(model)
    if plot_file is not None:
        check_plot()
    try:
        import torch

        from swaa_edge.finetune.train import Run
    except ImportError as error:
        raise SwaaError(f"fine-tuning needs {error.name}; pip install 'swaa-edge[finetune]'") from error
    if half is None:
        half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    settings = Settings(**chosen, half=half, chat=not no_chat)
    run = Run(model, data, output, swaa, settings, force=force)
    if run.too_long:
        click.echo(f"{run.too_long} records are longer than --max-length allows; they are left out", err=True)
    kept = run.folder.last_state()
    if kept is not None:
        click.echo(f"resuming: step {kept.step} is done", err=True)
    with contextlib.ExitStack() as stack:
        # Claimed before the hours of training.
        files = {
            file: stack.enter_context(atomic_output(file, force=force))
            for file in (plot_file, json_file)
            if file not in (None, "-")
        }
        with status_line(progress, _told) as shown, _interruptible(run):
            outcome = run.train(on_step=shown)
        if outcome.stopped:
            click.echo(
                f"stopped after step {outcome.step} of {outcome.total}; the same command goes on from there", err=True
            )
            raise KeyboardInterrupt
        document = {"model": model, "output": output, "swaa": run.swaa.to_dict()} | outcome.to_dict()
        text = json.dumps(document, indent=2)
        if plot_file is not None:
            plot(document, files[plot_file], Path(plot_file).suffix.lstrip(".").lower() or "png")
        if json_file in files:
            files[json_file].write_text(text + "\n", encoding="utf-8")
    click.echo(text if json_file == "-" else _summary(outcome, output))


def _told(at: Step) -> tuple[str, object]:
    told = f"step {at.step} of {at.total}"
    if at.loss is not None:
        told += f", loss {at.loss:.3f}"
    if at.held_out is not None:
        told += f", held out {at.held_out:.3f}"
    if at.seconds_left:
        told += f", {duration(at.seconds_left)} left"
    return told, at.loss


def _summary(outcome: Outcome, output: str) -> str:
    held = [line["held_out"] for line in outcome.history if "held_out" in line]
    early = f" of {outcome.total}, the held-out loss fell no more" if outcome.step < outcome.total else ""
    told = f"{outcome.step} steps{early}, over {outcome.examples} records in {duration(outcome.seconds)}"
    if held:
        told += f"; loss of the {outcome.held_out} held out: {held[0]:.3f} at first, {min(held):.3f} at best"
    return f"{told}\nwrote {output}; make a GGUF of it with: swaa-edge convert HF_DIR -o OUT.gguf --lora {output}"


@contextlib.contextmanager
def _interruptible(run: Run) -> Iterator[None]:
    """Within it Ctrl-C ends the training after its step, with the state saved; a second one ends it at once."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        run.stop()
        click.echo("stopping after this step", err=True)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
