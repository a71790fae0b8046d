"""The `swaa-edge` command. A subcommand's module is imported only when the subcommand runs.

Torch, llama_cpp and the native library take seconds to import, and may be missing. `swaa-edge --help` must work without
these imports. So the table `COMMANDS` holds a one-line help text for each subcommand.

    swaa-edge --help
"""

import importlib
import sys
from typing import Any

import click

from swaa_edge import __version__
from swaa_edge.errors import SwaaError

#: name: ("module:attribute" of the click command, one-line help)
COMMANDS = {
    "convert": ("swaa_edge.cli.convert:convert", "Convert a Hugging Face model directory to GGUF, with SWAA keys."),
    "annotate": ("swaa_edge.cli.annotate:annotate", "Write SWAA keys into an existing GGUF, or remove them."),
    "inspect": ("swaa_edge.cli.inspect:inspect", "Show a model, its SWAA settings, layers and KV memory."),
    "run": ("swaa_edge.cli.run:run", "Complete one prompt, or answer one question about it, streamed to stdout."),
    "chat": ("swaa_edge.cli.chat:chat", "Chat with a model."),
    "serve": ("swaa_edge.cli.serve:serve", "Serve a model over OpenAI's API."),
    "bench": ("swaa_edge.cli.bench:bench", "Compare the speed of full attention and SWAA configurations."),
    "eval": ("swaa_edge.cli.eval:evaluate", "Compare the accuracy of configurations on long prompts."),
    "calibrate": ("swaa_edge.cli.calibrate:calibrate", "Find the layers that should keep full attention."),
    "recommend": ("swaa_edge.cli.recommend:recommend", "Pick a configuration from the results of eval."),
    "distill": ("swaa_edge.cli.distill:distill", "Collect the model's own correct responses as training data."),
    "finetune": ("swaa_edge.cli.finetune:finetune", "Train a LoRA adapter under the SWAA mask."),
    "demo": ("swaa_edge.cli.demo:demo", "Show what SWAA costs and gains, in a minute, on a small model."),
}


class LazyGroup(click.Group):
    """A click group with the commands in `COMMANDS`. An error is printed as one line on stderr.

    Exit codes: 0 for success, 1 for an error, 2 for a wrong command line, 130 after an interrupt.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own method imports every command for the one-line help texts.
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            raise _in_one_line(error) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            # If the pipe is closed (`| head`), flush raises here. click handles the error and exits quietly.
            if sys.stdout is not None:  # None if the caller closed stdout
                sys.stdout.flush()
            return result
        except SwaaError as error:
            raise click.ClickException(" ".join(str(error).splitlines())) from error
        except click.UsageError as error:
            raise _in_one_line(error) from None
        except (KeyboardInterrupt, click.Abort):
            click.echo("Interrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{where}{error.strerror or error}") from error


def _in_one_line(error: click.UsageError) -> click.UsageError:
    """Return the error without click's usage lines."""
    # click 8.1 has no NoArgsIsHelpError. There, a group without a command prints its help without an error.
    if error.ctx is None or isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        return error
    # click prints the usage lines only for an error with a context.
    return click.UsageError(f"{error.format_message().rstrip('.')}; see {error.ctx.command_path} --help")


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="swaa-edge")
def cli() -> None:
    """Run long prompts fast on laptops, with sliding-window attention adaptation (SWAA) of GGUF models.

    \b
    swaa-edge annotate model.gguf -o model-swaa.gguf --recipe balanced
    swaa-edge run model-swaa.gguf -f long-prompt.txt -n 200
    """


def main() -> None:
    """Run the command line and exit the process with its code."""
    cli(prog_name="swaa-edge")
