"""The `swaa-edge` command: one group that loads a command's module only when that command runs.

Torch, llama_cpp and the native library cost seconds to import and may be missing; `swaa-edge --help`
needs none of them. So the names and one-line helps stand in a table here, and each command lives in
a module of its own. To add a command, write its module and add a line to `COMMANDS`.

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
    "convert": ("swaa_edge.cli.convert:convert", "HF model directory to GGUF with SWAA keys."),
    "annotate": ("swaa_edge.cli.annotate:annotate", "Write SWAA keys into an existing GGUF, or strip them."),
    "inspect": ("swaa_edge.cli.inspect:inspect", "Show a model, its SWAA keys, layers and KV memory."),
    "run": ("swaa_edge.cli.run:run", "Complete one prompt, streamed to stdout."),
    "chat": ("swaa_edge.cli.chat:chat", "Talk with a model."),
    "serve": ("swaa_edge.cli.serve:serve", "OpenAI-compatible server."),
    "bench": ("swaa_edge.cli.bench:bench", "Full attention against SWAA configurations, as ratios."),
    "eval": ("swaa_edge.cli.eval:evaluate", "Long-context accuracy per configuration, with intervals."),
    "calibrate": ("swaa_edge.cli.calibrate:calibrate", "Find the layers that should keep full attention."),
    "recommend": ("swaa_edge.cli.recommend:recommend", "Pick a configuration from what eval measured."),
    "distill": ("swaa_edge.cli.distill:distill", "Training data: the model's own right replies to long prompts."),
    "finetune": ("swaa_edge.cli.finetune:finetune", "LoRA under the SWAA mask, from Hugging Face model to adapter."),
    "demo": ("swaa_edge.cli.demo:demo", "All of it in a minute, on a small model."),
}


class LazyGroup(click.Group):
    """A group that knows its commands from `COMMANDS`, and turns our errors into one line on stderr.

    Exit codes: 0, 1 for what goes wrong in a command, 2 for a wrong command line, 130 when interrupted.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own version would import every command for its one-line help.
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
            # A reader that went away (| head) must be met here, where click ends quietly, not at exit.
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
    """The same error without the usage text around it, since a user's error is one line here."""
    # click 8.1 has no such error: there a group without a command prints its help by itself.
    if error.ctx is None or isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        return error
    # click prints the usage lines only for an error that knows its context.
    return click.UsageError(f"{error.format_message().rstrip('.')}; see {error.ctx.command_path} --help")


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="swaa-edge")
def cli() -> None:
    """Long prompts fast on laptops: sliding-window attention adaptation (SWAA) for GGUF models.

    \b
    swaa-edge annotate model.gguf -o model-swaa.gguf --recipe balanced
    swaa-edge run model-swaa.gguf -f long-prompt.txt -n 200
    """


def main() -> None:
    """Run the command line and exit the process with its code."""
    cli(prog_name="swaa-edge")
