"""The options of `swaa-edge eval`, in groups, and a check of combinations.

@click.command(cls=Grouped)
@eval_options
def evaluate(tasks, configs, **options): check_options(tasks, **options)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import click

from swaa_edge.cli.options.numbers import Numbers
from swaa_edge.cli.options.output import force_option, json_option, progress_option
from swaa_edge.cli.options.settings import setting_option
from swaa_edge.config import RECIPES
from swaa_edge.engine.configurations import DEFAULT, FILE, FULL, NAIVE
from swaa_edge.evaluate.questions import BUILT_IN, JUDGE, PERPLEXITY, PROMPT_TOKENS, Questions, split_tasks
from swaa_edge.evaluate.scoring import SCORERS


def eval_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `eval` to a command.

    Parameters have the same names as in `evaluate.compare`. In addition, the command receives `no_chat` and `progress`.
    """
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that `eval` and `distill` share."""
    for option in reversed(_FILE_OPTIONS):
        command = option(command)
    return command


def check_options(tasks: tuple[str, ...], plot_file: str | None, heatmap_file: str | None, **options: Any) -> None:
    """Raise `click.UsageError` for an option that no task uses, and `ConfigError` for an unknown task."""
    names, files = split_tasks(tasks)
    for name in ("scorer", "judge", "judge_model", "limit", "skip_long"):
        if options[name] and not files:
            raise click.UsageError(
                f"--{name.replace('_', '-')} applies to questions from a file; add --task FILE.jsonl"
            )
    if options["text"] is not None and PERPLEXITY not in names:
        raise click.UsageError(f"--text applies to the task {PERPLEXITY}; add --task {PERPLEXITY}")
    if heatmap_file is not None and "needle" not in names:
        raise click.UsageError("--heatmap shows the task needle; add needle to --task")
    if plot_file is not None and not files and names == [PERPLEXITY]:
        raise click.UsageError(f"--plot shows accuracy, which {PERPLEXITY} does not measure; add another task")


class Grouped(click.Command):
    """A command whose help lists the options in groups. The last group has all options without a group."""

    groups: Mapping[str, str] = {
        "Questions": "tasks prompt_tokens samples depths style beyond needles pairs hops seed haystack max_tokens "
        "no_chat",
        "Own files and text": "scorer judge judge_model limit skip_long text",
        "Configurations": "configs recipe config_file window_size sink_count fa_layers fa_decode tail_count",
        "Results": "json_file plot_file heatmap_file force journal_file fresh progress",
    }

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = (param for param in self.get_params(ctx) if isinstance(param, click.Option))
        records = {option.name: option.get_help_record(ctx) for option in options}
        groups = {title: names.split() for title, names in self.groups.items()}
        grouped = {name for names in groups.values() for name in names}
        groups["Engine"] = [name for name in records if name not in grouped]
        for title, names in groups.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := records.get(name))])


_setting = functools.partial(setting_option, Questions)

_FILE_OPTIONS = [
    click.option("--no-chat", is_flag=True, help="Ask in plain text, without the model's chat template."),
    click.option(
        "--scorer",
        type=click.Choice([*SCORERS, JUDGE]),
        help="How to score responses to questions from a file.  [default: contains]",
    ),
    click.option(
        "--judge",
        metavar="URL",
        help="OpenAI-compatible address of a model that scores responses, such as http://localhost:8000/v1.",
    ),
    click.option("--judge-model", metavar="NAME", help="Name of the judge's model."),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Use only the first N questions of each file."),
    click.option("--skip-long", is_flag=True, help="Skip questions from files if their prompts exceed the context."),
    force_option,
    click.option(
        "--journal",
        "journal_file",
        metavar="FILE",
        help="Keep the answers in this file for resuming.  [default: in the user's cache until the run is complete]",
    ),
    click.option("--fresh", is_flag=True, help="Discard the answers of an interrupted run instead of resuming it."),
    progress_option,
]

_OPTIONS = [
    click.option(
        "--task",
        "tasks",
        multiple=True,
        metavar="NAME|FILE,...",
        help=f"Tasks: {', '.join(BUILT_IN)}, {PERPLEXITY} (perplexity), or a FILE.jsonl or FILE.parquet with the "
        f"fields prompt, question and answer; repeatable.  [default: {','.join(BUILT_IN)}]",
    ),
    click.option(
        "--prompt-tokens",
        type=Numbers(int, 16, 2**31 - 1, "4096,8192"),
        metavar="N,...",
        help="Prompt lengths in tokens, chat template included.  "
        f"[default: as many as fit in the context, up to {PROMPT_TOKENS}]",
    ),
    _setting("--samples", click.IntRange(1, 10**6), "N", "Number of questions per task and prompt length."),
    _setting(
        "--depths",
        Numbers(float, 0, 1, "0,0.5,1"),
        "X,...",
        "Positions of the needle in the prompt; 0 is the start, 1 the end.",
    ),
    _setting(
        "--style",
        click.Choice(["direct", "spoken", "both"]),
        None,
        "direct: ask for the answer as the first token, so that prefill must find it. spoken: ask for the answer in a "
        "sentence, so that decode can find it.",
    ),
    _setting("--beyond", click.IntRange(0), "N", "Hide facts at least N tokens before the end of the prompt."),
    _setting("--needles", int, "N", "Number of needles per prompt of the task multi-needle."),
    _setting("--pairs", int, "N", "Number of key-value pairs per prompt of the task kv."),
    _setting("--hops", int, "N", "Number of facts per chain in the task chain."),
    _setting("--seed", int, "N", "Random seed of the questions."),
    click.option(
        "--haystack",
        metavar="FILE",
        help="UTF-8 text in which the facts are hidden.  [default: Python's language reference, built in]",
    ),
    _setting("--max-tokens", click.IntRange(1), "N", "Maximum number of tokens per answer."),
    click.option(
        "--text", metavar="FILE", help=f"UTF-8 text for the task {PERPLEXITY}.  [default: the text of --haystack]"
    ),
    click.option(
        "--configs",
        metavar="NAME,...",
        help=f"Configurations: {FULL} (always included), {NAIVE} (only a window), {', '.join(RECIPES)}, "
        f"{FILE} (the settings in the model file), or a FILE.json. The options below change each of them.  "
        f"[default: {FILE} if it has settings, else {','.join(DEFAULT)}]",
    ),
    json_option,
    click.option("--plot", "plot_file", metavar="FILE.png", help="Plot accuracy against prefill speed-up."),
    click.option(
        "--heatmap", "heatmap_file", metavar="FILE.png", help="Plot needle accuracy by depth and prompt length."
    ),
    *_FILE_OPTIONS,
]
