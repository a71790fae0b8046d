"""`swaa-edge eval`: how accurate a model stays on long prompts under each configuration, and how fast.

swaa-edge eval model.gguf --task needle,kv --length 4096 --configs full,naive,quality
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swaa_edge.cli.configs import FULL, Compared, compared
from swaa_edge.cli.evalquestions import digest, questions, scorer_of, text_of
from swaa_edge.cli.journals import fingerprint, opened
from swaa_edge.cli.options.engine import engine_options
from swaa_edge.cli.options.eval import PERPLEXITY, Asked, Grouped, eval_options, lengths_of, tasks_of
from swaa_edge.cli.options.swaa import Chosen, raw_swaa_options
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError, SwaaError
from swaa_edge.files.model import ModelFile, read_model
from swaa_edge.support.atomic import atomic_output
from swaa_edge.support.interrupt import interruptible
from swaa_edge.support.progress import duration

if TYPE_CHECKING:
    from swaa_edge.evaluate.perplexity import PerplexityReport
    from swaa_edge.evaluate.run import Progress
    from swaa_edge.support.journal import Journal

#: Bytes of weights up to which every configuration has its own copy of the model, so that they can take turns.
TOGETHER = 1 << 30
_PICTURES = ("png", "svg", "pdf")


@click.command("eval", cls=Grouped)
@click.argument("model", metavar="MODEL.gguf")
@eval_options
@engine_options
@raw_swaa_options
def evaluate(model: str, engine: EngineSettings, chosen: Chosen, asked: Asked) -> None:
    """Long-context accuracy and speed of full attention and SWAA configurations, on the same questions.

    Built-in tasks hide facts in prose, in prompts of exactly --length tokens. The interval is Wilson's, 95%.
    Ctrl-C loses nothing: the same command goes on where it was. A model of a few hundred megabytes is loaded once
    per configuration, and they take turns; a larger one (over 1 GiB together) runs one after the other. An adapter
    (--lora) that was trained under a recipe is by default compared with full attention, which runs without it.

    \b
    swaa-edge eval model.gguf --task needle,kv --length 4096,8192 --json eval.json --plot eval.png
    swaa-edge eval model.gguf --configs full,naive,quality,fast --window 128 --sinks 8 --length 2000 --beyond 128
    swaa-edge eval model.gguf --task questions.jsonl --judge http://localhost:8000/v1 --judge-model NAME
    """
    from swaa_edge.engine.preflight import resolve_swaa
    from swaa_edge.files.lora_gguf import read_lora

    names, files = tasks_of(asked)
    facts = read_model(model)
    recipe = read_lora(engine.lora_path, facts).swaa if engine.lora_path else None
    full = engine if recipe is None else dataclasses.replace(engine, lora_path=None)
    if recipe is not None and asked.configs is None and chosen == Chosen():
        sides: dict[str, Compared] = {FULL: False, recipe.recipe: recipe}
    else:
        sides = compared(model, asked.configs, chosen)
    for config in sides.values():
        resolve_swaa(model, config, None, (engine if config else full).lora)
    context = engine.n_ctx or facts.context_length or 0
    lengths = lengths_of(asked, context)
    _run(model, facts, sides, engine, full, asked, names, files, context, lengths)


def _run(
    model: str,
    facts: ModelFile,
    configs: dict[str, Compared],
    engine: EngineSettings,
    full: EngineSettings,
    asked: Asked,
    names: list[str],
    files: list[str],
    context: int,
    lengths: tuple[int, ...],
) -> None:
    from swaa_edge.bench.report import machine
    from swaa_edge.cli import evaltable
    from swaa_edge.evaluate import plot
    from swaa_edge.evaluate.perplexity import measure
    from swaa_edge.evaluate.report import Report
    from swaa_edge.evaluate.run import evaluate as ask

    scorer = scorer_of(asked)
    pictures = [file for file in (asked.plot_file, asked.heatmap_file) if file is not None]
    if pictures:
        plot.check_plot()
    for file in pictures:
        if _kind(file) not in _PICTURES:
            raise ConfigError(f"{file} must be a picture: {', '.join('.' + kind for kind in _PICTURES)}")
        if file == asked.json_file:
            raise ConfigError(f"{file} can't be both JSON and a picture; give two names")
    haystack = text_of(asked.haystack)
    with contextlib.ExitStack() as stack:
        outputs = dict.fromkeys(file for file in (asked.json_file, *pictures) if file not in (None, "-"))
        written = {file: stack.enter_context(atomic_output(file, force=asked.force)) for file in outputs}
        samples, words, skipped = questions(model, asked, names, files, context, lengths, haystack)
        windows = min(len(words) // max(lengths), asked.samples)
        if PERPLEXITY in names and not windows:
            raise ConfigError(
                f"the text has {len(words)} tokens, fewer than a window of {max(lengths)}; lower --length, or give a "
                "longer --text"
            )
        settings = {
            "tasks": [*names, *files],
            "lengths": list(lengths),
            "samples": asked.samples,
            "depths": list(asked.depths),
            "style": asked.style,
            "beyond": asked.beyond,
            "needles": asked.needles,
            "pairs": asked.pairs,
            "hops": asked.hops,
            "max_tokens": asked.max_tokens,
            "chat": not asked.no_chat,
            "scorer": asked.scorer or ("judge" if asked.judge else "contains"),
            "judge_model": asked.judge_model,
            "engine": dataclasses.asdict(engine),
            "skipped": skipped,
        }
        key = {
            "model": fingerprint(facts, engine.lora_path),
            "samples": digest(samples, words, lengths),
            "configs": {name: config.to_dict() if config else None for name, config in configs.items()},
            "settings": settings | {"judge": asked.judge},
        }
        journals: list[tuple[Journal, Path | None]] = []

        def journal_of(what: str, total: int) -> Journal:
            file = asked.journal_file and asked.journal_file + ("" if what == "answers" else f".{what}")
            journal, path = opened("eval", key | {"what": what}, file, asked.fresh)
            stack.callback(journal.close)
            if journal.records:
                click.echo(f"resuming: {len(journal.records)} of {total} {what} are in", err=True)
            journals.append((journal, path))
            return journal

        def load(config: Compared, n_ctx: int) -> Any:
            return (engine if config else full).load(model, swaa=config, n_ctx=max(n_ctx, engine.n_ctx or 0))

        report = Report(dict(configs), samples, [])
        found: PerplexityReport | None = None
        # Both before anything runs: one of them may be refused.
        answers_in = journal_of("answers", len(samples) * len(configs)) if samples else None
        windows_in = journal_of("windows", windows * len(configs)) if windows else None
        with status_line(asked.progress, _told) as shown:
            if samples:
                report = ask(
                    load,
                    configs,
                    samples,
                    scorer=scorer,
                    max_tokens=asked.max_tokens,
                    journal=answers_in,
                    using=interruptible,
                    together=facts.size * len(configs) <= TOGETHER,
                    on_progress=shown,
                )
            if windows and not report.stopped:
                try:
                    found = measure(
                        load,
                        configs,
                        words,
                        max(lengths),
                        windows=windows,
                        journal=windows_in,
                        using=interruptible,
                        on_progress=shown,
                    )
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
                "path": str(facts.paths[0]),
                "name": facts.name,
                "architecture": facts.architecture,
                "layers": facts.n_layers,
                "type": facts.file_type,
                "bytes": facts.size,
            },
            "machine": machine(),
            "settings": settings,
            "samples": {"seed": asked.seed, "haystack_sha256": hashlib.sha256(haystack.encode()).hexdigest()},
            "progress": {
                "answers": sum(row["samples"] for row in document["table"]),
                "of": len(samples) * len(configs),
                "windows": sum(row["windows"] for row in found.rows()) if found else 0,
                "of_windows": windows * len(configs),
                "kept": all(path is not None for _, path in journals),
            },
        }
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


def _print(asked: Asked, document: dict[str, Any]) -> None:
    from swaa_edge.cli import evaltable

    click.echo(json.dumps(document, indent=2) if asked.json_file == "-" else evaltable.table(document))


def _draw(asked: Asked, document: dict[str, Any], written: Mapping[str, Path]) -> None:
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


def _told(at: Progress) -> tuple[str, object]:
    left = "" if at.seconds_left is None else f", about {duration(at.seconds_left)} left"
    text = f"{at.answers:,}/{at.total:,} {at.config}"
    return text + left, text
