"""`swaa-edge eval`: how accurate a model stays on long prompts under each configuration, and how fast.

    swaa-edge eval model.gguf --task needle,kv --length 4096 --configs full,naive,quality
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swaa_edge.atomic import atomic_output
from swaa_edge.cli.configs import DEFAULT, FILE, FULL, NAIVE, Compared, compared, like
from swaa_edge.cli.engine_options import Engine, engine_options, interruptible, progress_stream
from swaa_edge.cli.journals import cached, fingerprint, forget
from swaa_edge.cli.options import Chosen, raw_swaa_options
from swaa_edge.config import RECIPES
from swaa_edge.errors import ConfigError, DataFileError, SwaaError
from swaa_edge.modelfile import ModelFile, read_model
from swaa_edge.progress import duration

if TYPE_CHECKING:
    from swaa_edge.evaluate.journal import Journal
    from swaa_edge.evaluate.perplexity import PerplexityReport
    from swaa_edge.evaluate.run import Progress
    from swaa_edge.evaluate.samples import Sample
    from swaa_edge.evaluate.scoring import Scorer

BUILT_IN = ("needle", "multi-needle", "kv", "chain")
PERPLEXITY = "ppl"
#: Without --length: tokens of a prompt at most.
LENGTH = 4096
#: Bytes of weights up to which every configuration has its own copy of the model, so that they can take turns.
TOGETHER = 1 << 30
_DATA = (".jsonl", ".json", ".parquet")
_SCORERS = ("contains", "in-order", "exact", "regex", "judge")
_PICTURES = ("png", "svg", "pdf")


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


class _Grouped(click.Command):
    """A command whose help has its options under headings; those named in no group come last."""

    groups: Mapping[str, tuple[str, ...]] = {
        "Questions": (
            "tasks", "lengths", "samples", "depths", "style", "beyond", "needles", "pairs", "hops", "seed", "haystack",
            "max_tokens", "no_chat",
        ),
        "Own files and text": ("scorer", "judge", "judge_model", "limit", "skip_long", "text"),
        "Configurations": ("configs", "recipe", "config_file", "window_size", "sink_count", "fa_layers", "fa_decode"),
        "Results": ("json_file", "plot_file", "heatmap_file", "force", "journal_file", "fresh", "progress"),
    }  # fmt: skip

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        told = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        grouped = {name for names in self.groups.values() for name in names}
        rest = tuple(str(name) for name in told if name not in grouped)
        for title, names in {**self.groups, "Engine": rest}.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := told.get(name))])


@click.command(cls=_Grouped)
@click.argument("model", metavar="MODEL.gguf")
@click.option(
    "--task", "tasks", multiple=True, metavar="NAME|FILE,...",
    help=f"{', '.join(BUILT_IN)}, {PERPLEXITY}, or FILE.jsonl or FILE.parquet with prompt, question, answer; can be "
    f"repeated.  [{','.join(BUILT_IN)}]",
)
@click.option(
    "--length", "lengths", type=_Numbers(int, 16, 2**31 - 1, "4096,8192"), metavar="N,...",
    help=f"Tokens of whole prompts.  [what the model takes, up to {LENGTH}]",
)
@click.option(
    "--samples", type=click.IntRange(1, 10**6), metavar="N", default=50, show_default=True,
    help="Questions per task and length.",
)
@click.option(
    "--depths", type=_Numbers(float, 0, 1, "0,0.5,1"), metavar="X,...", default="0,0.25,0.5,0.75,1", show_default=True,
    help="Where needles stand, 0 is the start.",
)
@click.option(
    "--style", type=click.Choice(["direct", "spoken", "both"]), default="both", show_default=True,
    help="Whether the answer is wanted as the first token (which prefill decides) or after some words.",
)
@click.option(
    "--beyond", type=click.IntRange(0), metavar="N", default=0, show_default=True,
    help="Hide answers at least N tokens before the end.",
)
@click.option("--needles", type=int, metavar="N", default=4, show_default=True, help="Of a multi-needle prompt.")
@click.option("--pairs", type=int, metavar="N", default=64, show_default=True, help="Of a kv prompt.")
@click.option("--hops", type=int, metavar="N", default=2, show_default=True, help="Of a chain.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Other seeds, other questions.")
@click.option("--haystack", metavar="FILE", help="Hide things in this text.  [Python's language reference]")
@click.option(
    "--max-tokens", type=click.IntRange(1), metavar="N", default=64, show_default=True, help="Of an answer, at most."
)
@click.option("--no-chat", is_flag=True, help="Ask in plain text, without the model's chat template.")
@click.option("--scorer", type=click.Choice(_SCORERS), help="How replies to a file's questions are judged.  [contains]")
@click.option("--judge", metavar="URL", help="OpenAI-compatible address of a judge, as http://localhost:8000/v1.")
@click.option("--judge-model", metavar="NAME", help="The judge's model.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N questions of a file.")
@click.option("--skip-long", is_flag=True, help="Leave out a file's questions that exceed the context.")
@click.option("--text", metavar="FILE", help=f"UTF-8 text for {PERPLEXITY}.  [the haystack]")
@click.option(
    "--configs", metavar="NAME,...",
    help=f"{FULL} (always there), {NAIVE} (a window and nothing else), {', '.join(RECIPES)}, {FILE} (the file's own), "
    f"FILE.json. Single settings below change each.  [{FILE} if it has settings, else {','.join(DEFAULT)}]",
)
@click.option("--json", "json_file", metavar="FILE", help="Write one JSON document, answers included; - is stdout.")
@click.option("--plot", "plot_file", metavar="FILE.png", help="Draw accuracy over speed.")
@click.option("--heatmap", "heatmap_file", metavar="FILE.png", help="Draw needles by depth and length.")
@click.option("--force", is_flag=True, help="Replace these files if they exist.")
@click.option("--journal", "journal_file", metavar="FILE", help="Keep the answers here.  [in the cache, until done]")
@click.option("--fresh", is_flag=True, help="Forget the answers of an interrupted run.")
@click.option("--progress/--no-progress", default=None, help="Show how far it is.  [if stderr is a terminal]")
@engine_options
@raw_swaa_options
def evaluate(model: str, engine: Engine, chosen: Chosen, configs: str | None, **options: Any) -> None:
    """Long-context accuracy and speed of full attention and SWAA configurations, on the same questions.

    Built-in tasks hide facts in prose, in prompts of exactly --length tokens. The interval is Wilson's, 95%.
    Ctrl-C loses nothing: the same command goes on where it was. A model of a few hundred megabytes is loaded once
    per configuration, and they take turns; a larger one (over 1 GiB together) runs one after the other.

    \b
    swaa-edge eval model.gguf --task needle,kv --length 4096,8192 --json eval.json --plot eval.png
    swaa-edge eval model.gguf --configs full,naive,quality,fast --window 128 --sinks 8 --length 2000 --beyond 128
    swaa-edge eval model.gguf --task questions.jsonl --judge http://localhost:8000/v1 --judge-model NAME
    """
    from swaa_edge.loading import plan_swaa

    asked = _Asked(**options)
    names, files = _tasks(asked)
    facts = read_model(model)
    sides = compared(model, configs, chosen)
    for config in sides.values():
        plan_swaa(model, config, None)
    context = engine.ctx or facts.context_length or 0
    lengths = _lengths(asked, context)
    _run(model, facts, sides, engine, asked, names, files, context, lengths)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The options, as click gives them."""

    tasks: tuple[str, ...]
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


def _tasks(asked: _Asked) -> tuple[list[str], list[str]]:
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
    for option, value in (("--scorer", asked.scorer), ("--judge", asked.judge), ("--judge-model", asked.judge_model),
                          ("--limit", asked.limit), ("--skip-long", asked.skip_long)):  # fmt: skip
        if value and not files:
            raise click.UsageError(f"{option} is for questions of a file; add --task FILE.jsonl")
    if (asked.judge is None) != (asked.judge_model is None):
        raise click.UsageError("a judge needs both --judge URL and --judge-model NAME")
    if (asked.scorer == "judge") > (asked.judge is not None) or (asked.judge and asked.scorer not in (None, "judge")):
        raise click.UsageError("--scorer judge and --judge URL --judge-model NAME belong together")
    if asked.text is not None and PERPLEXITY not in names:
        raise click.UsageError(f"--text is for the task {PERPLEXITY}; add --task {PERPLEXITY}")
    if asked.heatmap_file is not None and "needle" not in names:
        raise click.UsageError("--heatmap shows the task needle; add it to --task")
    if asked.plot_file is not None and chosen == [PERPLEXITY]:
        raise click.UsageError(f"--plot shows the share of right answers, and {PERPLEXITY} has none; add a task")
    return names, files


def _lengths(asked: _Asked, context: int) -> tuple[int, ...]:
    if asked.lengths is None:
        return (min(LENGTH, context - asked.max_tokens if context else LENGTH),)
    for length in asked.lengths:
        if context and length + asked.max_tokens > context:
            raise ConfigError(
                f"--length {length} and {asked.max_tokens} tokens for the answer exceed the context of {context} "
                f"tokens; lower --length to {context - asked.max_tokens}, or give --ctx if the model can do more"
            )
    return asked.lengths


def _run(
    model: str, facts: ModelFile, configs: dict[str, Compared], engine: Engine, asked: _Asked, names: list[str],
    files: list[str], context: int, lengths: tuple[int, ...],
) -> None:  # fmt: skip
    from swaa_edge.benchreport import machine
    from swaa_edge.cli import evaltable
    from swaa_edge.evaluate import plot
    from swaa_edge.evaluate.perplexity import measure
    from swaa_edge.evaluate.report import Report
    from swaa_edge.evaluate.run import evaluate as ask

    scorer = _scorer(asked)
    pictures = [file for file in (asked.plot_file, asked.heatmap_file) if file is not None]
    if pictures:
        plot.check_plot()
    for file in pictures:
        if _kind(file) not in _PICTURES:
            raise ConfigError(f"{file} must be a picture: {', '.join('.' + kind for kind in _PICTURES)}")
        if file == asked.json_file:
            raise ConfigError(f"{file} can't be both JSON and a picture; give two names")
    haystack = _text(asked.haystack)
    with contextlib.ExitStack() as stack:
        outputs = dict.fromkeys(file for file in (asked.json_file, *pictures) if file not in (None, "-"))
        written = {file: stack.enter_context(atomic_output(file, force=asked.force)) for file in outputs}
        samples, words, skipped = _samples(model, asked, names, files, context, lengths, haystack)
        windows = min(len(words) // max(lengths), asked.samples)
        if PERPLEXITY in names and not windows:
            raise ConfigError(
                f"the text has {len(words)} tokens, fewer than a window of {max(lengths)}; lower --length, or give a "
                "longer --text"
            )
        settings = {
            "tasks": [*names, *files], "lengths": list(lengths), "samples": asked.samples, "depths": list(asked.depths),
            "style": asked.style, "beyond": asked.beyond, "needles": asked.needles, "pairs": asked.pairs,
            "hops": asked.hops, "max_tokens": asked.max_tokens, "chat": not asked.no_chat,
            "scorer": asked.scorer or ("judge" if asked.judge else "contains"), "judge_model": asked.judge_model,
            "engine": dataclasses.asdict(engine), "skipped": skipped,
        }  # fmt: skip
        key = {
            "model": fingerprint(facts),
            "samples": _digest(samples, words, lengths),
            "configs": {name: config.to_dict() if config else None for name, config in configs.items()},
            "settings": settings | {"judge": asked.judge},
        }
        journals: list[tuple[Journal, Path | None]] = []

        def opened(what: str, total: int) -> Journal:
            journal, path = _journal(asked, key | {"what": what}, what)
            stack.callback(journal.close)
            if journal.records:
                click.echo(f"resuming: {len(journal.records)} of {total} {what} are in", err=True)
            journals.append((journal, path))
            return journal

        def load(config: Compared, n_ctx: int) -> Any:
            return engine.load(model, swaa=config, n_ctx=max(n_ctx, engine.ctx or 0))

        report = Report(dict(configs), samples, [])
        found: PerplexityReport | None = None
        # Both before anything runs: one of them may be refused.
        answers_in = opened("answers", len(samples) * len(configs)) if samples else None
        windows_in = opened("windows", windows * len(configs)) if windows else None
        with _shown(asked.progress) as shown:
            if samples:
                report = ask(
                    load, configs, samples, scorer=scorer, max_tokens=asked.max_tokens, journal=answers_in,
                    using=interruptible, together=facts.size * len(configs) <= TOGETHER, on_progress=shown,
                )  # fmt: skip
            if windows and not report.stopped:
                try:
                    found = measure(
                        load, configs, words, max(lengths), windows=windows, journal=windows_in, using=interruptible,
                        on_progress=shown,
                    )  # fmt: skip
                except SwaaError as error:
                    report.stopped = error  # the answers that are in are shown all the same
        document = report.to_dict()
        document["perplexity"] = found.to_dict() if found else None
        stopped = report.stopped or (found.stopped if found else None)
        document |= {
            "stopped": str(stopped) if stopped else None,
            "front": evaltable.front(document["table"]),
            "conclusion": evaltable.conclusion(document["table"]),
            "model": {
                "path": str(facts.paths[0]), "name": facts.name, "architecture": facts.architecture,
                "layers": facts.n_layers, "type": facts.file_type, "bytes": facts.size,
            },
            "machine": machine(),
            "settings": settings,
            "samples": {"seed": asked.seed, "haystack_sha256": hashlib.sha256(haystack.encode()).hexdigest()},
            "progress": {
                "answers": sum(row["samples"] for row in document["table"]), "of": len(samples) * len(configs),
                "windows": sum(row["windows"] for row in found.rows()) if found else 0,
                "of_windows": windows * len(configs), "kept": all(path is not None for _, path in journals),
            },
        }  # fmt: skip
        if stopped:
            # The files are for a complete run; its answers so far are in the journal.
            if document["progress"]["answers"] or document["progress"]["windows"]:
                _print(asked, document)
            raise stopped if isinstance(stopped, SwaaError) else KeyboardInterrupt
        if asked.json_file in written:
            written[asked.json_file].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        _draw(asked, document, written)
    if asked.journal_file is None:
        for _, path in journals:
            if path is not None:
                path.unlink(missing_ok=True)
    _print(asked, document)


def _print(asked: _Asked, document: dict[str, Any]) -> None:
    from swaa_edge.cli import evaltable

    click.echo(json.dumps(document, indent=2) if asked.json_file == "-" else evaltable.table(document))


def _draw(asked: _Asked, document: dict[str, Any], written: Mapping[str, Path]) -> None:
    from swaa_edge.evaluate.plot import plot_accuracy, plot_both, plot_heatmap

    if asked.plot_file is not None and asked.plot_file == asked.heatmap_file:
        plot_both(document, written[asked.plot_file], _kind(asked.plot_file))
        return
    if asked.plot_file is not None:
        plot_accuracy(document, written[asked.plot_file], _kind(asked.plot_file))
    if asked.heatmap_file is not None:
        plot_heatmap(document, written[asked.heatmap_file], _kind(asked.heatmap_file))


def _kind(file: str) -> str:
    return Path(file).suffix.lstrip(".").lower() or "png"


def _samples(
    model: str, asked: _Asked, names: list[str], files: list[str], context: int, lengths: tuple[int, ...], haystack: str
) -> tuple[list[Sample], list[int], int]:
    """The questions, the tokens of the text for perplexity, and how many questions were left out."""
    from swaa_edge.evaluate.datafile import check_lengths, read_samples
    from swaa_edge.evaluate.facts import STYLES
    from swaa_edge.evaluate.prompts import Prompts
    from swaa_edge.evaluate.tasks import Plan, build

    built_in = tuple(name for name in names if name != PERPLEXITY)
    samples: list[Sample] = []
    words: list[int] = []
    with Prompts(model, chat=not asked.no_chat) as prompts:
        if built_in:
            styles = tuple(style for style in STYLES if asked.style in (style, "both"))
            plan = Plan(
                built_in, lengths, asked.samples, asked.seed, asked.depths, styles, asked.beyond, asked.needles,
                asked.pairs, asked.hops, haystack,
            )  # fmt: skip
            samples += build(plan, prompts)
        skipped = 0
        for file in files:
            found = read_samples(file, prompts, limit=asked.limit)
            fit = check_lengths(found, context or 2**31, asked.max_tokens, skip_long=asked.skip_long)
            skipped += len(found) - len(fit)
            samples += fit
        if PERPLEXITY in names:
            words = prompts.tokenize(haystack if asked.text is None else _text(asked.text))
    if asked.scorer == "regex":
        _check_patterns(sample for sample in samples if sample.task not in BUILT_IN)
    return samples, words, skipped


def _check_patterns(samples: Iterator[Sample]) -> None:
    for sample in samples:
        for answer in sample.answers:
            try:
                re.compile(answer)
            except re.error as error:
                where = getattr(sample, "source", sample.id)
                raise DataFileError(f"{where}: answer {answer!r} is no regular expression: {error}") from None


def _text(path: str | None) -> str:
    from swaa_edge.prose import real_text

    if path is None:
        return real_text()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise ConfigError(f"{path} is empty; give a text")
    return text


def _scorer(asked: _Asked) -> Scorer:
    """Built-in questions are scored by what the reply contains; those of files as the options say."""
    from swaa_edge.evaluate.scoring import SCORERS, contains, in_order

    own: Scorer = contains
    if asked.judge is not None:
        from swaa_edge.evaluate.judge import Judge

        own = Judge(asked.judge, str(asked.judge_model))
    elif asked.scorer is not None:
        own = SCORERS[asked.scorer]
    return lambda sample, reply: (in_order if sample.task in BUILT_IN else own)(sample, reply)


def _digest(samples: list[Sample], words: list[int], lengths: tuple[int, ...]) -> str:
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps([sample.id, sample.answers, sample.question]).encode())
        found.update(sample.prompt.tobytes())
    found.update(json.dumps([words, lengths if words else None]).encode())
    return found.hexdigest()


def _journal(asked: _Asked, key: dict[str, Any], what: str) -> tuple[Journal, Path | None]:
    """The journal of `what`, and where it lies; in memory where there is no place for it."""
    from swaa_edge.evaluate.journal import Journal

    if asked.journal_file is not None:
        path = Path(asked.journal_file + ("" if what == "answers" else f".{what}"))
    else:
        path = cached("eval", key)
        if path is None:
            return Journal(None, key), None
    if asked.fresh:
        forget(path)
    return Journal(path, key), path


@contextlib.contextmanager
def _shown(wanted: bool | None) -> Iterator[Callable[[Progress], None] | None]:
    """An `on_progress`: a line on stderr, rewritten on a terminal; None where nobody watches."""
    stream = progress_stream(wanted)
    if stream is None:
        yield None
        return
    width, last = 0, ""

    def show(at: Progress) -> None:
        nonlocal width, last
        text = f"{at.answers:,}/{at.total:,} {at.config}"
        known = text
        if at.seconds_left is not None:
            text += f", about {duration(at.seconds_left)} left"
        if stream.isatty():
            stream.write("\r" + text.ljust(width))
            width = len(text)
        elif known != last:
            stream.write(text + "\n")
            last = known
        stream.flush()

    try:
        yield show
    finally:
        if width:
            stream.write("\r" + " " * width + "\r")
            stream.flush()
