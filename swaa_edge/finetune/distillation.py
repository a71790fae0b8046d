"""Training data that a model writes itself: the Python function behind `swaa-edge distill`.

distilled = distill("model.gguf", "questions.jsonl", "data.jsonl", samples=8)
print(distilled); distilled.to_dict()["kept"]
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from swaa_edge.config import FULL_ATTENTION
from swaa_edge.engine.preflight import resolve_swaa
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.evaluate.datafile import check_lengths, read_samples
from swaa_edge.evaluate.questions import check_patterns, scorer
from swaa_edge.evaluate.samples import Sample
from swaa_edge.files.lora_gguf import read_lora
from swaa_edge.files.model import read_model
from swaa_edge.finetune.answerers import Answerer, LlamaAnswerer
from swaa_edge.finetune.responses import Collected, collect, write_lines
from swaa_edge.finetune.settings import DistillSettings
from swaa_edge.generate.prompts import Prompts
from swaa_edge.support.atomic import atomic_output, check_outputs
from swaa_edge.support.interrupt import Stopped
from swaa_edge.support.journal import open_journal
from swaa_edge.support.progress import OnProgress


@dataclasses.dataclass(frozen=True)
class Distilled:
    """The result of `distill`.

    collected: the responses.
    of: number of records to ask about.
    skipped: number of records left out because they are too long.
    output: the file that was written, or None.
    journal: the file that keeps the responses, or None.
    settings: the settings, as plain JSON values.
    """

    collected: Collected
    of: int
    skipped: int
    output: str | None
    journal: str | None
    settings: dict[str, Any]

    def __str__(self) -> str:
        return _summary(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The counts and settings, as plain JSON values."""
        more = {name: getattr(self, name) for name in ("of", "skipped", "output", "journal", "settings")}
        return self.collected.to_dict() | more

    @property
    def stopped(self) -> Stopped:
        """The reason why there is no output: "interrupted" or an error. None if there is output."""
        found = self.collected
        if found.stopped or found.lines:
            return found.stopped
        if found.truncated == found.responses:
            return GenerationError("no response ended within --max-tokens, so none was kept; raise it")
        return GenerationError(
            "no response was correct, so nothing was written; try another --scorer, or resume with more --samples "
            f"than {self.settings['samples']}"
        )


def distill(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    engine: EngineSettings | None = None,
    force: bool = False,
    journal_file: str | None = None,
    fresh: bool = False,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], object] = lambda line: None,
    **settings: Any,
) -> Distilled:
    """Ask a model about each record under full attention, and write the correct responses to a file.

    model: a GGUF file or a Hugging Face model directory.
    data: a JSON Lines or Parquet file. `swaa_edge.evaluate.datafile` describes the records.
    output: the JSON Lines file to write.
    settings: values for the fields of `DistillSettings`.
    force: whether to replace `output` if it exists.
    journal_file: file that keeps all responses. With this file, the same call resumes an interrupted run. By default,
        the user's cache folder keeps the responses until the run is complete.
    fresh: whether to discard the responses of an earlier run.
    on_note: function that receives a line of text about reused responses.

    Ctrl-C ends the run early, and so does an error after the first response. `Distilled.stopped` then has the reason.

    Raises `ConfigError`, `DataFileError` or `ModelFileError` for invalid input. Raises `OutputError` if the output
    can't be written. Loading and running the model can raise other errors.
    """
    chosen, engine = DistillSettings(**settings), engine or EngineSettings()
    _check_output(output, force, (data, journal_file))
    is_correct = scorer(chosen.scorer, chosen.judge, chosen.judge_model)
    source = (_hf_source if Path(model).is_dir() else _gguf_source)(model, engine, chosen)
    records, skipped = _records(source, data, chosen)
    shown = {"model": os.fspath(model), "data": os.fspath(data)} | dataclasses.asdict(chosen)
    shown["scorer"] = chosen.scorer or ("judge" if chosen.judge else "contains")
    shown["engine"] = dataclasses.asdict(engine)
    key = _key(source, chosen, engine, None if journal_file else output)
    with open_journal("distill", key, journal_file, fresh) as journal:
        if journal.records:
            on_note(f"resuming after {len(journal.records)} responses")
        found = collect(source.load, records, is_correct, chosen, journal=journal, on_progress=on_progress)
        done = bool(found.lines) and not found.stopped
        kept_in = None if journal.path is None else str(journal.path)
        distilled = Distilled(found, len(records), skipped, os.fspath(output) if done else None, kept_in, shown)
        if done:
            with atomic_output(output, force=force) as file:
                file.write_text(write_lines(found.lines), encoding="utf-8")
            journal.discard()
    return distilled


def _check_output(output: str | os.PathLike[str], force: bool, others: Iterable[str | os.PathLike[str] | None]) -> None:
    name = os.fspath(output)
    if Path(name).suffix not in (".jsonl", ".json"):
        raise ConfigError(f"{name} must end in .jsonl, the format that finetune reads")
    check_outputs([name], force=force, others=others)


@dataclasses.dataclass(frozen=True)
class _Source:
    """The model that writes the responses.

    prompts: builds the prompts (`Prompts` or `HfPrompts`).
    context: maximum context size in tokens, or 0 for no limit.
    identity: plain JSON values that identify the model's weights and settings.
    load(n_ctx): loads the model with room for `n_ctx` tokens.
    """

    prompts: Any
    context: int
    identity: Any
    load: Callable[[int], Answerer]


def _gguf_source(model: str | os.PathLike[str], engine: EngineSettings, settings: DistillSettings) -> _Source:
    file = read_model(model)
    resolve_swaa(file, FULL_ATTENTION, None, engine.lora_path)

    def load(n_ctx: int) -> Answerer:
        llm = engine.load(file, swaa=FULL_ATTENTION, n_ctx=max(n_ctx, engine.n_ctx or 0))
        return LlamaAnswerer(llm, max_tokens=settings.max_tokens, sampling=settings.sampling)

    lora = [] if engine.lora_path is None else [read_lora(engine.lora_path, file).fingerprint]
    identity = [file.fingerprint, *lora]
    return _Source(Prompts(file, chat=settings.chat), engine.n_ctx or file.context_length, identity, load)


def _hf_source(model: str | os.PathLike[str], engine: EngineSettings, settings: DistillSettings) -> _Source:
    from swaa_edge.convert.hf_folder import read_hf_folder
    from swaa_edge.files.lora_training import BaseModel

    if engine != EngineSettings(n_ctx=engine.n_ctx, n_threads=engine.n_threads):
        raise ConfigError(f"{model} is a Hugging Face model; the only engine options for it are --ctx and --threads")
    read_hf_folder(model)
    identity = [BaseModel.of(model).fingerprint]
    generation = Path(model, "generation_config.json")
    if generation.is_file():
        identity.append(generation.read_bytes().hex())

    from swaa_edge.finetune.hf_answerer import HfAnswerer, HfPrompts  # imports torch
    from swaa_edge.finetune.hf_model import context_length

    def load(n_ctx: int) -> Answerer:
        sampling = settings.sampling
        return HfAnswerer(model, max_tokens=settings.max_tokens, sampling=sampling, threads=engine.n_threads)

    context = engine.n_ctx or context_length(model) or 0
    return _Source(HfPrompts(model, chat=settings.chat), context, identity, load)


def _records(source: _Source, data: str | os.PathLike[str], settings: DistillSettings) -> tuple[list[Sample], int]:
    """Return the records to ask about, and the number of records left out as too long."""
    with source.prompts as prompts:
        found = read_samples(data, prompts, limit=settings.limit)
    fit = check_lengths(found, source.context or 2**31, settings.max_tokens, skip_long=settings.skip_long)
    if settings.scorer == "regex":
        check_patterns(fit)
    return fit, len(found) - len(fit)


def _key(
    source: _Source, settings: DistillSettings, engine: EngineSettings, output: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """Return everything that a response depends on.

    output: path of the output file, or None if the user named a journal. In the cache folder, this path identifies the
        run.
    """
    return {
        "distill": 2,
        "model": source.identity,
        "chat": settings.chat,
        "max_tokens": settings.max_tokens,
        "sampling": settings.sampling,
        "seed": settings.seed,
        "engine": dataclasses.asdict(engine),
        "output": None if output is None else os.path.abspath(output),
    }


def _summary(document: dict[str, Any]) -> str:
    d = document
    lines = [
        f"{d['responses']:,} responses to {d['records']:,} records: {d['kept']:,} kept, {d['incorrect']:,} incorrect, "
        f"{d['truncated']:,} truncated at {d['settings']['max_tokens']:,} tokens, {d['duplicates']:,} duplicates",
        f"{d['without_correct']:,} records without a correct response",
    ]
    if d["skipped"]:
        lines.append(f"{d['skipped']:,} records exceed the context and were left out")
    if d["stopped"]:
        then = "the same command resumes, and writes the file when it is complete"
        if d["journal"] is None:
            then = "the responses are lost, since the cache folder can't be written; give --journal FILE"
        lines.append(f"Stopped early ({d['stopped']}) after {d['records']:,} of {d['of']:,} records; {then}.")
    if d["output"] is not None:
        lines.append(f"wrote {d['output']}")
    return "\n".join(lines)
