"""Ask the same questions under full attention and SWAA configurations, as `swaa-edge eval` does.

comparison = compare("model.gguf", "full,naive,quality", tasks="needle,kv", prompt_tokens=4096)
print(comparison); comparison.to_dict()["table"]
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from swaa_edge.config import Configuration, SwaaConfig
from swaa_edge.engine.configurations import configurations
from swaa_edge.engine.preflight import resolve_swaa
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError, SwaaError
from swaa_edge.evaluate import perplexity, plot, run
from swaa_edge.evaluate.perplexity import PerplexityReport
from swaa_edge.evaluate.questions import Prepared, Questions, settings_of, split_tasks
from swaa_edge.evaluate.report import Report
from swaa_edge.evaluate.scoring import Scorer
from swaa_edge.evaluate.table import conclusion, front, table
from swaa_edge.files.lora_gguf import read_lora
from swaa_edge.files.model import ModelFile, read_model
from swaa_edge.support.atomic import atomic_outputs, check_outputs
from swaa_edge.support.figure import check_pictures, picture_type
from swaa_edge.support.interrupt import Stopped
from swaa_edge.support.journal import Journal, open_journal
from swaa_edge.support.machine import machine
from swaa_edge.support.progress import OnProgress

PathLike = str | os.PathLike[str]
_Files = tuple[PathLike | None, PathLike | None, PathLike | None]  # JSON, plot, heat map
#: Limit in bytes for loading one copy of the model per configuration. If all copies together are larger, the
#: configurations run one after the other.
TOGETHER = 1 << 30


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of `swaa-edge eval`. `str(comparison)` returns a table.

    document: the results as plain JSON values. If the run ended early, the document has the results so far.
    stopped: None if the run is complete, otherwise "interrupted" or the error.
    """

    document: dict[str, Any]
    stopped: Stopped = None

    def to_dict(self) -> dict[str, Any]:
        return self.document

    def __str__(self) -> str:
        return table(self.document)


def compare(
    model: PathLike,
    configs: str | Iterable[str] | Mapping[str, Configuration] | None = None,
    *,
    base: SwaaConfig | None = None,
    changes: Mapping[str, Any] | None = None,
    engine: EngineSettings | None = None,
    json_file: PathLike | None = None,
    plot_file: PathLike | None = None,
    heatmap_file: PathLike | None = None,
    force: bool = False,
    journal_file: PathLike | None = None,
    fresh: bool = False,
    on_note: Callable[[str], object] = lambda line: None,
    on_progress: OnProgress | None = None,
    **questions: Any,
) -> Comparison:
    """Ask `model` the same questions under each configuration. Count correct answers and measure time.

    model: path or `ModelFile`.
    configs, base, changes: the configurations to compare, as in `engine.configurations`.
    engine: settings for loading the model. An adapter with a recipe is applied only under SWAA, and the recipe becomes
        the default configuration.
    json_file, plot_file, heatmap_file: paths for the results of a complete run. Existing files require `force`.
    journal_file: answers for resuming. The default file is in the user's cache folder until the run is complete.
    fresh: discard the answers of an earlier run.
    on_note: function that is called with one line of text if answers are reused.
    on_progress: as in `run.evaluate`.
    questions: keyword arguments for `Questions`.

    Ctrl-C, or an error after the first answer, ends the run early. `Comparison.stopped` then holds the reason, and the
    same call resumes the run.
    Raises `ConfigError`, `DataFileError`, `OutputError` and the errors of loading a model.
    """
    asked, model = Questions(**questions), read_model(model)
    loader = _Loader(model, engine or EngineSettings())
    if loader.recipe and configs is None and base is None and not changes:
        base = loader.recipe
    sides = configurations(model, configs, base=base, changes=changes)
    loader.check(sides.values())
    scorer = asked.score()
    files = json_file, plot_file, heatmap_file
    _check_files(files, force, (model, journal_file, asked.text, asked.haystack, *split_tasks(asked.tasks)[1]))
    prepared = asked.prepare(model, loader.context)
    with contextlib.ExitStack() as stack:
        settings = settings_of(asked, prepared) | {"engine": dataclasses.asdict(loader.engine)}
        key = loader.key(sides, prepared, settings | {"judge": asked.judge})
        journals = {
            what: stack.enter_context(_journal(key, what, len(work) * len(sides), journal_file, fresh, on_note))
            for what, work in (("answers", prepared.samples), ("windows", range(prepared.windows)))
            if work
        }
        report, found = _measure(loader, sides, prepared, scorer, asked.max_tokens, journals, on_progress)
        kept = all(journal.path is not None for journal in journals.values())
        document = _document(report, found, model, settings, prepared, asked.seed, kept)
        if report.stopped is None:
            _write_files(document, files, force)
            for journal in journals.values():
                journal.discard()
    return Comparison(document, report.stopped)


class _Loader:
    """Loads `model` under a configuration. An adapter with a recipe is not loaded under full attention."""

    def __init__(self, model: ModelFile, engine: EngineSettings) -> None:
        self.model, self.engine = model, engine
        self._lora = read_lora(engine.lora_path, model) if engine.lora_path else None
        #: The adapter's recipe, if there is one.
        self.recipe = self._lora.swaa if self._lora else None
        #: Context size in tokens, 0 if unknown.
        self.context = engine.n_ctx or model.context_length or 0

    def __call__(self, config: Configuration, n_ctx: int) -> Any:
        return self._settings(config).load(self.model, swaa=config, n_ctx=max(n_ctx, self.engine.n_ctx or 0))

    def check(self, configs: Iterable[Configuration]) -> None:
        """Raise the error of loading if the model can't be loaded under one of `configs`."""
        for config in configs:
            resolve_swaa(self.model, config, lora=self._settings(config).lora_path)

    def key(self, sides: Mapping[str, Configuration], prepared: Prepared, settings: dict[str, Any]) -> dict[str, Any]:
        """Return all inputs that affect the results, to identify the run."""
        return {
            "model": [self.model.fingerprint, self._lora and self._lora.fingerprint],
            "samples": prepared.digest(),
            "configs": {name: config.to_dict() if config else None for name, config in sides.items()},
            "settings": settings,
        }

    def _settings(self, config: Configuration) -> EngineSettings:
        return self.engine if config or not self.recipe else dataclasses.replace(self.engine, lora_path=None)


def _measure(
    loader: _Loader,
    sides: Mapping[str, Configuration],
    prepared: Prepared,
    scorer: Scorer,
    max_tokens: int,
    journals: Mapping[str, Journal],
    on_progress: OnProgress | None,
) -> tuple[Report, PerplexityReport | None]:
    """Ask the questions, then measure perplexity. `Report.stopped` is set if either step ends early."""
    report, found = Report(dict(sides), prepared.samples, []), None
    if journal := journals.get("answers"):
        together = loader.model.size * len(sides) <= TOGETHER
        settings = {"scorer": scorer, "max_tokens": max_tokens, "together": together}
        report = run.evaluate(loader, sides, prepared.samples, journal=journal, on_progress=on_progress, **settings)
    if (journal := journals.get("windows")) and not report.stopped:
        more = {"windows": prepared.windows, "journal": journal, "on_progress": on_progress}
        try:
            found = perplexity.measure(loader, sides, prepared.text, max(prepared.lengths), **more)
            report.stopped = found.stopped
        except SwaaError as error:
            report.stopped = error  # the report still contains the answers
    return report, found


def _journal(
    key: dict[str, Any], what: str, total: int, file: PathLike | None, fresh: bool, on_note: Callable[[str], object]
) -> Journal:
    path = file and os.fspath(file) + ("" if what == "answers" else f".{what}")
    journal = open_journal("eval", key | {"what": what}, path, fresh)
    if journal.records:
        on_note(f"resuming after {len(journal.records)} of {total} {what}")
    return journal


def _document(
    report: Report,
    found: PerplexityReport | None,
    model: ModelFile,
    settings: dict[str, Any],
    prepared: Prepared,
    seed: int,
    kept: bool,
) -> dict[str, Any]:
    document = report.to_dict()
    document |= {
        "perplexity": found.to_dict() if found else None,
        "front": front(document["table"]),
        "conclusion": conclusion(document["table"]),
        "model": {
            "path": str(model.path),
            "name": model.name,
            "architecture": model.architecture,
            "layers": model.n_layers,
            "type": model.file_type,
            "bytes": model.size,
        },
        "machine": machine(),
        "settings": settings,
        "samples": {"seed": seed, "haystack_sha256": prepared.haystack_sha256},
        "progress": {
            "answers": sum(row["samples"] for row in document["table"]),
            "of": len(prepared.samples) * len(report.configs),
            "windows": sum(row["windows"] for row in found.rows()) if found else 0,
            "of_windows": prepared.windows * len(report.configs),
            "kept": kept,
        },
    }
    return document


def _check_files(files: _Files, force: bool, others: Iterable[str | os.PathLike[str] | None]) -> None:
    json_file, *pictures = files
    pictures = [file for file in pictures if file is not None]
    check_pictures(*pictures)
    if json_file in pictures:
        raise ConfigError(f"{json_file} can't be both a JSON file and a picture; give two names")
    check_outputs(dict.fromkeys(files), force=force, others=others)  # both pictures may go into one file


def _write_files(document: dict[str, Any], files: _Files, force: bool) -> None:
    json_file, plot_file, heatmap_file = files
    with atomic_outputs(dict.fromkeys(files), force=force) as paths:
        if json_file in paths:
            paths[json_file].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if plot_file is not None and plot_file == heatmap_file:
            plot.plot_both(document, paths[plot_file], picture_type(plot_file))
        elif plot_file is not None:
            plot.plot_accuracy(document, paths[plot_file], picture_type(plot_file))
        if heatmap_file not in (None, plot_file):
            plot.plot_heatmap(document, paths[heatmap_file], picture_type(heatmap_file))
