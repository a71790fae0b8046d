"""The options of `swaa-edge eval`, under headings, and what of them doesn't go together.

@click.command(cls=Grouped)
@eval_options
def evaluate(asked: Asked): names, files = tasks_of(asked)
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from swaa_edge.cli.configs import DEFAULT, FILE, FULL, NAIVE, like
from swaa_edge.config import RECIPES
from swaa_edge.errors import ConfigError

BUILT_IN = ("needle", "multi-needle", "kv", "chain")
PERPLEXITY = "ppl"
#: Without --length: tokens of a prompt at most.
LENGTH = 4096
_DATA = (".jsonl", ".json", ".parquet")
_SCORERS = ("contains", "in-order", "exact", "regex", "judge")


@dataclasses.dataclass(frozen=True)
class Asked:
    """The options, as click gives them."""

    tasks: tuple[str, ...]
    configs: str | None
    lengths: tuple[int, ...] | None
    samples: int
    depths: tuple[float, ...]
    style: str
    beyond: int
    needles: int
    pairs: int
    hops: int
    seed: int
    haystack: str | None
    max_tokens: int
    no_chat: bool
    scorer: str | None
    judge: str | None
    judge_model: str | None
    limit: int | None
    skip_long: bool
    text: str | None
    json_file: str | None
    plot_file: str | None
    heatmap_file: str | None
    force: bool
    journal_file: str | None
    fresh: bool
    progress: bool | None


def eval_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `Asked`, and pass it one as `asked`."""

    @functools.wraps(command)
    def with_asked(*args: Any, **kwargs: Any) -> Any:
        chosen = {field.name: kwargs.pop(field.name) for field in dataclasses.fields(Asked)}
        return command(*args, asked=Asked(**chosen), **kwargs)

    for option in reversed(_OPTIONS):
        with_asked = option(with_asked)
    return with_asked


def file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command those of `eval`'s options that are about questions of a file and about a run that goes on."""
    for option in reversed(_FILE_OPTIONS):
        command = option(command)
    return command


def tasks_of(asked: Asked) -> tuple[list[str], list[str]]:
    """The tasks by name, and the data files; what doesn't go together is refused."""
    given = [part.strip() for value in asked.tasks for part in ([value] if os.path.exists(value) else value.split(","))]
    chosen = list(dict.fromkeys(filter(None, given))) or list(BUILT_IN)
    known = [*BUILT_IN, PERPLEXITY]
    names = [name for name in chosen if name in known]
    files = [name for name in chosen if name not in known]
    for name in files:
        if not (name.endswith(_DATA) or os.path.exists(name) or os.sep in name):
            near = like(name, known)
            raise ConfigError(f"there is no task {name}{near}; there are {', '.join(known)}, or give a FILE.jsonl")
    shown = [*names, *(Path(name).stem for name in files)]
    if twice := next((name for name in shown if shown.count(name) > 1), None):
        raise ConfigError(f"two tasks would be shown as {twice}; rename one of the files")
    for option, value in (
        ("--scorer", asked.scorer),
        ("--judge", asked.judge),
        ("--judge-model", asked.judge_model),
        ("--limit", asked.limit),
        ("--skip-long", asked.skip_long),
    ):
        if value and not files:
            raise click.UsageError(f"{option} is for questions of a file; add --task FILE.jsonl")
    check_judge(asked.scorer, asked.judge, asked.judge_model)
    if asked.text is not None and PERPLEXITY not in names:
        raise click.UsageError(f"--text is for the task {PERPLEXITY}; add --task {PERPLEXITY}")
    if asked.heatmap_file is not None and "needle" not in names:
        raise click.UsageError("--heatmap shows the task needle; add it to --task")
    if asked.plot_file is not None and chosen == [PERPLEXITY]:
        raise click.UsageError(f"--plot shows the share of right answers, and {PERPLEXITY} has none; add a task")
    return names, files


def check_judge(scorer: str | None, judge: str | None, judge_model: str | None) -> None:
    """Raise `click.UsageError` unless these options go together."""
    if (judge is None) != (judge_model is None):
        raise click.UsageError("a judge needs both --judge URL and --judge-model NAME")
    if (scorer == "judge") > (judge is not None) or (judge and scorer not in (None, "judge")):
        raise click.UsageError("--scorer judge and --judge URL --judge-model NAME belong together")


def lengths_of(asked: Asked, context: int) -> tuple[int, ...]:
    """The lengths of the prompts, in tokens; one that doesn't fit a context of `context` (0: any) is refused."""
    if asked.lengths is None:
        return (min(LENGTH, context - asked.max_tokens if context else LENGTH),)
    for length in asked.lengths:
        if context and length + asked.max_tokens > context:
            raise ConfigError(
                f"--length {length} and {asked.max_tokens} tokens for the answer exceed the context of {context} "
                f"tokens; lower --length to {context - asked.max_tokens}, or give --ctx if the model can do more"
            )
    return asked.lengths


class _Numbers(click.ParamType):
    """Comma-separated numbers of `kind`, from `least` to `most`."""

    def __init__(self, kind: type, least: float, most: float, example: str) -> None:
        self.name, self._kind, self._least, self._most, self._example = "numbers", kind, least, most, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        try:
            numbers = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(self._least <= number <= self._most for number in numbers):
            self.fail(f"{value!r} must be numbers from {self._least} to {self._most}, as in {self._example}")
        return tuple(dict.fromkeys(numbers))


class Grouped(click.Command):
    """A command whose help has its options under headings; those named in no group come last."""

    groups: Mapping[str, tuple[str, ...]] = {
        "Questions": (
            "tasks",
            "lengths",
            "samples",
            "depths",
            "style",
            "beyond",
            "needles",
            "pairs",
            "hops",
            "seed",
            "haystack",
            "max_tokens",
            "no_chat",
        ),
        "Own files and text": ("scorer", "judge", "judge_model", "limit", "skip_long", "text"),
        "Configurations": ("configs", "recipe", "config_file", "window_size", "sink_count", "fa_layers", "fa_decode"),
        "Results": ("json_file", "plot_file", "heatmap_file", "force", "journal_file", "fresh", "progress"),
    }

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        told = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        grouped = {name for names in self.groups.values() for name in names}
        rest = tuple(str(name) for name in told if name not in grouped)
        for title, names in {**self.groups, "Engine": rest}.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := told.get(name))])


_FILE_OPTIONS = [
    click.option("--no-chat", is_flag=True, help="Ask in plain text, without the model's chat template."),
    click.option(
        "--scorer", type=click.Choice(_SCORERS), help="How replies to a file's questions are judged.  [contains]"
    ),
    click.option("--judge", metavar="URL", help="OpenAI-compatible address of a judge, as http://localhost:8000/v1."),
    click.option("--judge-model", metavar="NAME", help="The judge's model."),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N questions of a file."),
    click.option("--skip-long", is_flag=True, help="Leave out a file's questions that exceed the context."),
    click.option("--force", is_flag=True, help="Replace these files if they exist."),
    click.option(
        "--journal", "journal_file", metavar="FILE", help="Keep the answers here.  [in the cache, until done]"
    ),
    click.option("--fresh", is_flag=True, help="Forget the answers of an interrupted run."),
    click.option("--progress/--no-progress", default=None, help="Show how far it is.  [if stderr is a terminal]"),
]

_OPTIONS = [
    click.option(
        "--task",
        "tasks",
        multiple=True,
        metavar="NAME|FILE,...",
        help=f"{', '.join(BUILT_IN)}, {PERPLEXITY}, or FILE.jsonl or FILE.parquet with prompt, question, answer; can "
        f"be repeated.  [{','.join(BUILT_IN)}]",
    ),
    click.option(
        "--length",
        "lengths",
        type=_Numbers(int, 16, 2**31 - 1, "4096,8192"),
        metavar="N,...",
        help=f"Tokens of whole prompts.  [what the model takes, up to {LENGTH}]",
    ),
    click.option(
        "--samples",
        type=click.IntRange(1, 10**6),
        metavar="N",
        default=50,
        show_default=True,
        help="Questions per task and length.",
    ),
    click.option(
        "--depths",
        type=_Numbers(float, 0, 1, "0,0.5,1"),
        metavar="X,...",
        default="0,0.25,0.5,0.75,1",
        show_default=True,
        help="Where needles stand, 0 is the start.",
    ),
    click.option(
        "--style",
        type=click.Choice(["direct", "spoken", "both"]),
        default="both",
        show_default=True,
        help="Whether the answer is wanted as the first token (which prefill decides) or after some words.",
    ),
    click.option(
        "--beyond",
        type=click.IntRange(0),
        metavar="N",
        default=0,
        show_default=True,
        help="Hide answers at least N tokens before the end.",
    ),
    click.option("--needles", type=int, metavar="N", default=4, show_default=True, help="Of a multi-needle prompt."),
    click.option("--pairs", type=int, metavar="N", default=64, show_default=True, help="Of a kv prompt."),
    click.option("--hops", type=int, metavar="N", default=2, show_default=True, help="Of a chain."),
    click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Other seeds, other questions."),
    click.option("--haystack", metavar="FILE", help="Hide things in this text.  [Python's language reference]"),
    click.option(
        "--max-tokens",
        type=click.IntRange(1),
        metavar="N",
        default=64,
        show_default=True,
        help="Of an answer, at most.",
    ),
    click.option("--text", metavar="FILE", help=f"UTF-8 text for {PERPLEXITY}.  [the haystack]"),
    click.option(
        "--configs",
        metavar="NAME,...",
        help=f"{FULL} (always there), {NAIVE} (a window and nothing else), {', '.join(RECIPES)}, {FILE} (the file's "
        f"own), FILE.json. Single settings below change each.  [{FILE} if it has settings, else {','.join(DEFAULT)}]",
    ),
    click.option("--json", "json_file", metavar="FILE", help="Write one JSON document, answers included; - is stdout."),
    click.option("--plot", "plot_file", metavar="FILE.png", help="Draw accuracy over speed."),
    click.option("--heatmap", "heatmap_file", metavar="FILE.png", help="Draw needles by depth and length."),
    *_FILE_OPTIONS,
]
