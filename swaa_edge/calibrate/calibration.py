"""Finds the layers of a model that should keep full attention.

found = calibrate("model.gguf", SwaaConfig.from_recipe("balanced"), text="notes.txt", method="greedy")
print(found); found.config
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from swaa_edge.calibrate.cases import Case, from_samples, from_text
from swaa_edge.calibrate.report import Report, plot, summary
from swaa_edge.calibrate.search import search
from swaa_edge.calibrate.settings import PROMPT_TOKENS, SAMPLES, WINDOWS, CalibrateSettings
from swaa_edge.config import CUSTOM, RECIPES, Configuration, SwaaConfig
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.engine.tokenizer import tokenize
from swaa_edge.errors import ConfigError, SwaaError
from swaa_edge.evaluate.tasks import TaskSettings, build
from swaa_edge.files.lora_gguf import read_lora
from swaa_edge.files.model import ModelFile, read_model
from swaa_edge.files.records import read_text
from swaa_edge.generate.prompts import Prompts
from swaa_edge.support.atomic import atomic_output, check_outputs, write_json
from swaa_edge.support.figure import check_pictures, picture_type
from swaa_edge.support.interrupt import Stopped
from swaa_edge.support.journal import open_journal
from swaa_edge.support.progress import OnProgress, Progress

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

# Tokens that a retrieval sample reserves for the answer.
_ANSWER_ROOM = 64


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    model: path of the model file.
    name: name of the model in its metadata.
    prompt_tokens: length of a sample in tokens, including the answer.
    report: the measurements and the chosen layers.
    written: paths of the files that now contain the chosen settings.
    """

    model: str
    name: str
    prompt_tokens: int
    report: Report
    written: tuple[str, ...] = ()

    def __str__(self) -> str:
        return summary(self.to_dict())

    @property
    def config(self) -> SwaaConfig | None:
        """Return the settings with the chosen layers, or None if no layers are chosen yet."""
        return self.report.config()

    @property
    def stopped(self) -> Stopped:
        """Why the run ended early: "interrupted" or an error. None if the run is complete."""
        return self.report.stopped

    def to_dict(self) -> dict[str, Any]:
        """Return the calibration as plain JSON values."""
        model = {"path": self.model, "name": self.name}
        return {"model": model, "prompt_tokens": self.prompt_tokens} | self.report.to_dict()


def calibrate(
    model: str | os.PathLike[str],
    swaa: SwaaConfig | None = None,
    *,
    engine: EngineSettings | None = None,
    output: str | None = None,
    annotate: str | None = None,
    in_place: bool = False,
    json_file: str | None = None,
    plot_file: str | None = None,
    force: bool = False,
    journal_file: str | None = None,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], object] = lambda line: None,
    **settings: Any,
) -> Calibration:
    """Choose the layers of the GGUF `model` that should keep full attention. The loss of reference answers decides.

    swaa: window, sinks, tail and FA decode. The default is the recipe fast, with window and sinks reduced to fit the
        prompts. The FA layers of `swaa` are used only in a comparison.
    settings: keyword arguments for `CalibrateSettings`.
    output: path of a JSON file for the chosen settings.
    annotate: path for a copy of the model that contains the chosen settings.
    in_place: write the chosen settings into the model file itself.
    force: replace existing files.
    json_file, plot_file: paths for the result of a complete run, as JSON and as a picture.
    journal_file: file with the measurements. The same call resumes an interrupted run from this file. The default is a
        file in the user's cache folder until the run is complete.
    on_note: function that is called with one line of text if measurements are reused.

    If Ctrl-C or an error ends the run early, the result is incomplete, and `stopped` holds the reason. Without any
    results, the error or KeyboardInterrupt is raised.
    Raises `ConfigError` or `ModelFileError` for invalid input, and `OutputError` if a file can't be written. Also
    raises the errors of loading and running a model.
    """
    chosen, file = CalibrateSettings(**settings), read_model(model)
    chosen.layers_to_keep(file.n_layers)  # raises its errors before any work
    if annotate is not None and in_place:
        raise ConfigError("annotate and in_place exclude each other; give one of them")
    check_pictures(plot_file)
    check_outputs((output, annotate, json_file, plot_file), force=force, others=(model, chosen.text, journal_file))
    engine = _check_engine(engine or EngineSettings(), file)
    length = _prompt_tokens(file, chosen.prompt_tokens)
    swaa = _sliding(swaa, length)
    cases, held_out = _cases(file, length, swaa, chosen)
    key = _key(file, swaa, engine, [*cases, *held_out])
    with open_journal("calibrate", key, journal_file, False) as journal:
        if journal.records:
            on_note(f"resuming after {len(journal.records)} measurements")
        more = {"held_out": held_out, "journal": journal, "on_progress": on_progress}
        report = search(partial(_load, file, engine), swaa, file.n_layers, cases, chosen, **more)
        found = Calibration(os.fspath(model), file.name, length, report)
        if report.full is None:  # there is nothing to report
            raise report.stopped if isinstance(report.stopped, SwaaError) else KeyboardInterrupt
        if found.config and not report.stopped:
            _write_report(found, json_file, plot_file, force)
            written = _write_settings(found, output, annotate, in_place, force, on_progress)
            found = dataclasses.replace(found, written=written)
            journal.discard()
    return found


def _check_engine(engine: EngineSettings, file: ModelFile) -> EngineSettings:
    """Set swa_full in `engine`. The cache then keeps all positions, and a document is prefilled only once."""
    if engine.lora_path is not None and read_lora(engine.lora_path, file).swaa is not None:
        raise ConfigError(
            f"{engine.lora_path} was trained under a recipe with fixed FA layers; calibrate without this adapter"
        )
    return dataclasses.replace(engine, swa_full=True)


def _load(file: ModelFile, engine: EngineSettings, config: Configuration, n_ctx: int) -> SwaaLlama:
    return engine.load(file, swaa=config, n_ctx=max(n_ctx, engine.n_ctx or 0))


def _prompt_tokens(file: ModelFile, requested: int | None) -> int:
    trained = file.context_length
    if requested is not None and trained and requested > trained:
        raise ConfigError(
            f"prompt_tokens = {requested} exceeds the {trained} tokens that the model was trained for; lower it"
        )
    return requested or min(PROMPT_TOKENS, trained or PROMPT_TOKENS)


def _sliding(swaa: SwaaConfig | None, length: int) -> SwaaConfig:
    """Return `swaa`. The default is the recipe fast, with window and sinks reduced to fit `length` prompt tokens."""
    if swaa is None:
        fast = RECIPES["fast"].config
        window = min(fast.window_size, length // 4)
        return dataclasses.replace(
            fast, window_size=window, sink_count=min(fast.sink_count, window // 8), recipe=CUSTOM
        )
    if swaa.reach >= length:
        raise ConfigError(
            f"window {swaa.window_size} and {swaa.sink_count} sinks cover all {length} tokens of a prompt, so no layer "
            "slides; lower the window or raise prompt_tokens"
        )
    return swaa


def _cases(
    file: ModelFile, length: int, swaa: SwaaConfig, settings: CalibrateSettings
) -> tuple[list[Case], list[Case]]:
    """Return the cases to measure and the held-out cases. Without settings.compare, no case is held out."""
    if settings.text is not None:
        text, head = read_text(settings.text), tokenize(file, "")
        with Prompts(file, chat=False) as prompts:
            tokens = prompts.tokenize(text)
        count, answer = settings.samples or WINDOWS, settings.answer_tokens
        return from_text(tokens, head=head, length=length, answer=answer, count=count, held_out=settings.compare)
    names = tuple(name.strip() for name in settings.task.split(","))
    found = []
    with Prompts(file, chat=settings.chat) as prompts:
        for number in range(1 + settings.compare):
            lengths, seed = (length - _ANSWER_ROOM,), 2 * settings.seed + number
            tasks = TaskSettings(names, lengths, settings.samples or SAMPLES, seed, beyond=swaa.window_size)
            made = from_samples(build(tasks, prompts), prompts)
            found.append([dataclasses.replace(case, id=f"{'ab'[number]}/{case.id}") for case in made])
    return found[0], found[1] if settings.compare else []


def _key(file: ModelFile, swaa: SwaaConfig, engine: EngineSettings, cases: list[Case]) -> dict[str, Any]:
    """Return the inputs that determine a loss. The method is not included, so another method can reuse the losses."""
    tokens = hashlib.sha256(json.dumps([(case.id, case.prompt, case.answer) for case in cases]).encode())
    lora = [] if engine.lora_path is None else [read_lora(engine.lora_path, file).fingerprint]
    return {
        "calibration": 2,
        "model": [file.fingerprint, *lora],
        "swaa": dataclasses.replace(swaa, fa_layers="none", recipe=CUSTOM, adapter=None).to_dict(),
        "cache_type": engine.cache_type,
        "cases": tokens.hexdigest(),
    }


def _write_report(found: Calibration, json_file: str | None, plot_file: str | None, force: bool) -> None:
    if json_file not in (None, "-"):
        write_json(json_file, found.to_dict(), force=force)
    if plot_file is not None and found.report.rows:
        with atomic_output(plot_file, force=force) as temporary:
            plot(found.to_dict(), temporary, picture_type(plot_file))


def _write_settings(
    found: Calibration,
    output: str | None,
    annotated: str | None,
    in_place: bool,
    force: bool,
    on_progress: OnProgress | None,
) -> tuple[str, ...]:
    """Write the chosen settings to the requested files. Return the paths of the written files."""
    config, written = found.config, []
    assert config is not None
    if output is not None:
        write_json(output, config.to_dict(), force=force)
        written.append(output)
    if annotated is not None or in_place:
        from swaa_edge.convert.annotate import annotate

        def show(done: int, total: int) -> None:
            if on_progress:
                on_progress(Progress(done, total, "writing the model"))

        files = annotate(found.model, annotated, config, in_place=in_place, force=force, on_progress=show)
        written += map(str, files)
    return tuple(written)
