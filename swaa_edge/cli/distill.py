"""`swaa-edge distill`: training data that the model writes itself, under full attention.

swaa-edge distill model.gguf --data questions.jsonl -o data.jsonl
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swaa_edge.cli.evalquestions import check_patterns, file_scorer
from swaa_edge.cli.journals import fingerprint, opened
from swaa_edge.cli.options.engine import Engine, engine_options, interruptible, sampling_options, status_line
from swaa_edge.cli.options.eval import check_judge, file_options
from swaa_edge.errors import ConfigError, GenerationError, SwaaError
from swaa_edge.files.model import read_model
from swaa_edge.finetune.distill import MAX_TOKENS, SAMPLES, TEMPERATURE, write_lines
from swaa_edge.support.atomic import atomic_output
from swaa_edge.support.progress import duration

if TYPE_CHECKING:
    from swaa_edge.evaluate.datafile import FileSample
    from swaa_edge.finetune.answerers import Answerer
    from swaa_edge.finetune.distill import Distilled, Progress


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--data", required=True, metavar="FILE", help="JSON Lines or Parquet with prompt, question, answer.")
@click.option("-o", "--output", required=True, metavar="OUT.jsonl", help="The file to write.")
@click.option(
    "--samples",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help=f"Replies to a record at most.  [{SAMPLES}; 1 at --temp 0]",
)
@click.option(
    "--keep", type=click.IntRange(1), metavar="N", default=1, show_default=True, help="Right ones kept: the first N."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    metavar="N",
    default=MAX_TOKENS,
    show_default=True,
    help="Of a reply; one that doesn't end within them is not kept. Models that think need thousands.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: the counts and the settings.")
@file_options
@functools.partial(sampling_options, default_temp=TEMPERATURE, default_seed=0)
@engine_options
def distill(
    model: str,
    data: str,
    output: str,
    samples: int | None,
    keep: int,
    max_tokens: int,
    as_json: bool,
    no_chat: bool,
    scorer: str | None,
    judge: str | None,
    judge_model: str | None,
    limit: int | None,
    skip_long: bool,
    force: bool,
    journal_file: str | None,
    fresh: bool,
    progress: bool | None,
    sampling: dict[str, Any],
    engine: Engine,
) -> None:
    """Training data for `finetune`: the model's own right replies to the prompts of a file.

    MODEL is a GGUF, or the folder of a Hugging Face model (which needs torch); it answers under full attention,
    whatever settings it has. A record is asked again until --keep replies are right, at most --samples times. Ctrl-C
    loses nothing: the same command goes on where it was, also with other --samples, --keep, --limit or --scorer.

    \b
    swaa-edge distill model.gguf --data questions.jsonl -o data.jsonl
    swaa-edge distill Qwen3-4B --data questions.parquet -o data.jsonl --max-tokens 8192 --scorer exact
    swaa-edge finetune Qwen3-4B --data data.jsonl --recipe quality --output adapter
    """
    check_judge(scorer, judge, judge_model)
    if sampling["temperature"] == 0 and (samples or 1) > 1:
        raise click.UsageError("replies at --temp 0 are all the same; give --samples 1 or a higher --temp")
    samples = samples or (SAMPLES if sampling["temperature"] else 1)
    if keep > samples:
        raise click.UsageError(f"--keep {keep} needs as many --samples; there are {samples}")
    if Path(output).suffix not in (".jsonl", ".json"):
        raise ConfigError(f"{output} must end in .jsonl, by which finetune knows what it is")
    if os.path.exists(output) and os.path.exists(data) and os.path.samefile(output, data):
        raise ConfigError(f"{output} is what --data reads; choose another name")
    seed = sampling.pop("seed")

    from swaa_edge.finetune.distill import distill as tool

    right = file_scorer(scorer, judge, judge_model)
    with contextlib.ExitStack() as stack:
        written = stack.enter_context(atomic_output(output, force=force))
        source = (_folder if Path(model).is_dir() else _gguf)(model, engine, not no_chat, max_tokens, sampling)
        records, skipped = _records(source, data, limit, max_tokens, skip_long)
        if scorer == "regex":
            check_patterns(records)
        key = {
            "distill": 1,
            "model": source.key,
            "chat": not no_chat,
            "max_tokens": max_tokens,
            "sampling": sampling,
            "seed": seed,
            "engine": dataclasses.asdict(engine),
            # In the cache, the runs into one file are one run; whoever names a journal knows what belongs to it.
            "output": None if journal_file else os.path.abspath(output),
        }
        journal, journal_path = opened("distill", key, journal_file, fresh)
        stack.callback(journal.close)
        if journal.records:
            click.echo(f"resuming: {len(journal.records)} replies are in", err=True)
        with status_line(progress, _told) as shown:
            result = tool(
                source.load,
                records,
                right,
                n_ctx=max(len(record.prompt) for record in records) + max_tokens,
                samples=samples,
                keep=keep,
                seed=seed,
                scored_by=f"{judge} {judge_model}" if judge else scorer or "",
                journal=journal,
                on_progress=shown,
            )
        complete = bool(result.lines) and not result.stopped
        document = result.to_dict() | {
            "of": len(records),
            "skipped": skipped,
            "output": output if complete else None,
            "journal": str(journal_path) if journal_path else None,
            "settings": {
                "model": model,
                "data": data,
                "samples": samples,
                "keep": keep,
                "seed": seed,
                "max_tokens": max_tokens,
                "chat": not no_chat,
                "scorer": scorer or ("judge" if judge else "contains"),
                "judge_model": judge_model,
                **sampling,
                "engine": dataclasses.asdict(engine),
            },
        }
        if not complete:
            if result.asked:
                _print(document, as_json)
            _raise(result, samples)
        written.write_text(write_lines(result.lines), encoding="utf-8")
    if journal_file is None and journal_path is not None:
        journal_path.unlink(missing_ok=True)
    _print(document, as_json)


@dataclasses.dataclass(frozen=True)
class _Source:
    """The model that is asked. prompts: writes its prompts, while it is open. context: tokens that it takes; 0: any.

    key: of plain JSON values, changes whenever its replies may. load(n_ctx): opens it.
    """

    prompts: Any
    context: int
    key: Any
    load: Callable[[int], Answerer]


def _gguf(model: str, engine: Engine, chat: bool, max_tokens: int, sampling: dict[str, Any]) -> _Source:
    from swaa_edge.engine.preflight import plan_swaa
    from swaa_edge.evaluate.prompts import Prompts
    from swaa_edge.finetune.answerers import LlamaAnswerer

    facts = read_model(model)
    plan_swaa(model, False, None, engine.lora)

    def load(n_ctx: int) -> Answerer:
        llm = engine.load(model, swaa=False, n_ctx=max(n_ctx, engine.ctx or 0))
        return LlamaAnswerer(llm, max_tokens=max_tokens, sampling=sampling, using=interruptible)

    return _Source(Prompts(model, chat=chat), engine.ctx or facts.context_length, fingerprint(facts, engine.lora), load)


def _folder(model: str, engine: Engine, chat: bool, max_tokens: int, sampling: dict[str, Any]) -> _Source:
    from swaa_edge.convert.hf_folder import read_checkpoint
    from swaa_edge.files.lora_training import BaseModel

    if engine != Engine(ctx=engine.ctx, threads=engine.threads):
        raise click.UsageError(f"{model} is a folder; of the engine's options only --ctx and --threads go with it")
    read_checkpoint(model)
    key = [BaseModel.of(model).fingerprint]
    settings = Path(model, "generation_config.json")
    if settings.is_file():
        key.append(settings.read_bytes().hex())

    from swaa_edge.finetune.hfanswerer import HfAnswerer, HfPrompts, context_of

    def load(n_ctx: int) -> Answerer:
        return HfAnswerer(model, max_tokens=max_tokens, sampling=sampling, threads=engine.threads)

    return _Source(HfPrompts(model, chat=chat), engine.ctx or context_of(model) or 0, key, load)


def _records(
    source: _Source, data: str, limit: int | None, max_tokens: int, skip_long: bool
) -> tuple[list[FileSample], int]:
    """The records to ask, and how many are too long for that."""
    from swaa_edge.evaluate.datafile import check_lengths, read_samples

    with source.prompts as prompts:
        found = read_samples(data, prompts, limit=limit)
    fit: list[Any] = check_lengths(found, source.context or 2**31, max_tokens, skip_long=skip_long)
    return fit, len(found) - len(fit)


def _raise(result: Distilled, samples: int) -> None:
    if isinstance(result.stopped, SwaaError):
        raise result.stopped
    if result.stopped:
        raise KeyboardInterrupt
    if result.cut_off == result.asked:
        raise GenerationError("no reply ended within --max-tokens, so none is kept; raise it")
    raise GenerationError(
        f"no reply was right, so nothing is written; try another --scorer, or more than {samples} --samples: it goes on"
    )


def _print(document: dict[str, Any], as_json: bool) -> None:
    click.echo(json.dumps(document, indent=2) if as_json else _summary(document))


def _summary(told: dict[str, Any]) -> str:
    lines = [
        f"{told['replies']:,} replies to {told['records']:,} records: {told['kept']:,} kept, {told['wrong']:,} wrong, "
        f"{told['cut_off']:,} cut off at {told['settings']['max_tokens']:,} tokens, {told['duplicates']:,} duplicates",
        f"{told['without']:,} records without a right reply",
    ]
    if told["skipped"]:
        lines.append(f"{told['skipped']:,} records exceed the context and were left out")
    if told["stopped"]:
        then = "the same command goes on from there, and writes the file when it is complete"
        if told["journal"] is None:
            then = "they aren't kept, since the cache folder can't be written to; give --journal FILE"
        through = f"{told['records']:,} of {told['of']:,} records are through"
        lines.append(f"Stopped early ({told['stopped']}): {through}; {then}.")
    if told["output"] is not None:
        lines.append(f"wrote {told['output']}")
    return "\n".join(lines)


def _told(at: Progress) -> tuple[str, object]:
    text = f"{at.done:,}/{at.total:,} records, {at.kept:,} kept"
    more = f", reply {at.sample + 1}" if at.sample else ""
    left = "" if at.seconds_left is None else f", about {duration(at.seconds_left)} left"
    return text + more + left, text
