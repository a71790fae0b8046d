"""Measures the stages, the calibration and the perplexity for docs/results-real.md. Makes one JSON document.

    document = measure_all(threads=2, committed=None)      # scripts/real/measure.py

Results are kept in build/real-*.jsonl, so the same command resumes an interrupted run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from real.cells import (
    DOCUMENTS,
    FULL,
    SINKS,
    TAILS,
    TEXTS,
    Row,
    Stage,
    first_stages,
    later_stages,
    quick,
    seconds,
    texts_of,
    tuned,
)
from real.corpus import corpus, fingerprints
from real.fetch import real_model
from real.lora import trained
from real.reading import answers_of, finished, measure_stage
from real.tasks import CUE, SCORED, SEED, TASKS, Document, build, digest
from swaa_edge import SwaaConfig, SwaaLlama
from swaa_edge.bench.bound import Line, bound
from swaa_edge.calibrate.cases import Case
from swaa_edge.calibrate.search import search
from swaa_edge.calibrate.settings import CalibrateSettings
from swaa_edge.config import Configuration
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.evaluate import perplexity
from swaa_edge.files.model import read_model
from swaa_edge.generate.prompts import Prompts
from swaa_edge.support.journal import Journal, Record
from swaa_edge.support.journal import digest as journal_digest
from swaa_edge.support.machine import machine
from swaa_edge.support.table import table

BUILD = Path(__file__).resolve().parents[2] / "build"
#: Number of layers to keep in calibration: the same as for the periodic patterns 1::4 and 1::2.
KEPT = {"quarter": 8, "half": 15}
#: The calibration's documents: length, number, place in the text, passages per document. Also tail and candidates.
CALIBRATION = {"length": 1024, "documents": 2, "part": 70, "asked": 2, "tail": 32, "candidates": 16}


class Real:
    """The model, the texts and the engine's settings."""

    def __init__(self, threads: int) -> None:
        self.path = real_model().q8_0
        self.model = read_model(self.path)
        # Every row reuses the document's prefix. A ring could drop the prefix, so swa_full turns rings off.
        self.engine = EngineSettings(n_threads=threads, n_gpu_layers=0, swa_full=True)
        self.texts = corpus()
        self.adapters = trained(self.texts)
        self.threads = threads

    def load(self, swaa: Configuration, n_ctx: int) -> SwaaLlama:
        return self.engine.load(self.path, swaa=swaa, n_ctx=n_ctx)

    def load_row(self, row: Row, n_ctx: int) -> SwaaLlama:
        engine = dataclasses.replace(
            self.engine, lora_path=str(self.adapters[row.adapter].gguf) if row.adapter else None
        )
        return engine.load(self.path, swaa=row.swaa, n_ctx=n_ctx)

    def documents(self, length: int, count: int, prompts: Prompts, asked: int = 5) -> list[Document]:
        """Make documents from Python's reference and Debian's manuals, in turn."""
        read = {name: text for name, text in self.texts.items() if name != "docstrings"}
        return build(length, count, prompts, read, 4 if length == 8192 else asked)


def plan_table(threads: int) -> str:
    """Return the plan as a table, with each row's expected time on `threads` threads."""
    rows: list[Sequence[str]] = [("prompt", "window", "configuration", "tails", "documents", "minutes")]
    total = 0.0
    chosen = {f"{size} {method}": range(count) for size, count in KEPT.items() for method in ("greedy", "nll")}
    for stage in [*first_stages(), Stage(2048, DOCUMENTS[2048], tuned()), *later_stages(chosen)]:
        again = [] if stage.rows[0] is FULL else [dataclasses.replace(FULL, name="full, for its time", tails=())]
        for row in (*again, *stage.rows):
            minutes = expected(Stage(stage.length, stage.documents, [row])) / threads / 60
            total += minutes
            tails = ", ".join(map(str, row.tails))
            rows.append(
                (f"{stage.length:,}", str(row.window or "-"), row.name, tails, str(stage.documents), f"{minutes:.1f}")
            )
    calibration = _calibration_seconds() / threads / 60
    count = str(CALIBRATION["documents"])
    rows.append((f"{CALIBRATION['length']:,}", "-", "calibration", "", count, f"{calibration:.1f}"))
    for length, windows in TEXTS.items():
        found = texts_of(length, chosen)
        minutes = 2.6 * windows * len(found) * seconds(Stage(length, 1, [FULL]), []) / threads / 60
        total += minutes
        rows.append((f"{length:,}", "-", f"perplexity of {len(found)}", "", str(windows), f"{minutes:.1f}"))
    return table(rows, left=4) + f"\n\nAbout {(total + calibration) / 60:.1f} hours on {threads} threads."


def expected(stage: Stage) -> float:
    asked = 4 if stage.length == 8192 else 5
    return seconds(stage, [(2 * asked, SCORED, 1), (6, 10, 5)])


def _calibration_seconds() -> float:
    """Return the expected seconds of both calibrations on one thread.

    The method nll ranks all 30 layers. The method greedy adds layers from the candidates, and exchanges one layer.
    """
    keep, pool = KEPT["half"], CALIBRATION["candidates"]
    choices = 30 + sum(pool - at for at in range(keep)) + 2 * keep + 33
    one = Stage(CALIBRATION["length"], CALIBRATION["documents"], [Row("", SwaaConfig(128), (CALIBRATION["tail"],))])
    return choices * seconds(one, [(2 * CALIBRATION["asked"], SCORED, 1), (CALIBRATION["asked"] + 1, 10, 3)])


def measure_quick(threads: int, asked: int = 3) -> dict[str, Any]:
    """Measure one length with few samples. Return the document.

    asked: as in `tasks.build`.
    """
    real, stage = Real(threads), quick()
    with Prompts(real.path) as prompts:
        documents = real.documents(stage.length, stage.documents, prompts, asked)
    with Journal(None, {}) as journal:
        measure_stage(stage, documents, real.load_row, journal, _say, threads)
        return _document(real, {stage.length: documents}, [stage], journal.records)


def measure_all(threads: int, committed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Measure everything that is missing in the journals. Return the document.

    committed: the document of an earlier run. A warning is printed if the texts of that run were different.

    After Ctrl-C, the document has only complete rows, and "complete" is false.
    """
    real = Real(threads)
    hashes = fingerprints(real.texts)
    if committed and committed["corpus"] != hashes:
        print(
            "This machine's texts differ from those of the committed results, and so will the figures.", file=sys.stderr
        )
    with Prompts(real.path) as prompts:
        documents = {length: real.documents(length, count, prompts) for length, count in DOCUMENTS.items()}
        source = {"docstrings": real.texts["docstrings"]}
        given = [CALIBRATION[name] for name in ("length", "documents")]
        calibrating = build(*given, prompts, source, CALIBRATION["asked"], CALIBRATION["part"])
        tokens = prompts.tokenize(real.texts["docstrings"])
    key = {"model": _sha256(real.path), "corpus": hashes, "asked": {n: digest(each) for n, each in documents.items()}}
    BUILD.mkdir(exist_ok=True)
    found: dict[str, tuple[list[int], float]] = {}
    texts: dict[int, list[dict[str, Any]]] = {}
    with _journal("answers", key) as journal:

        def measure(stages: Sequence[Stage]) -> None:
            for stage in stages:
                measure_stage(stage, documents[stage.length], real.load_row, journal, _say, threads)

        adapted = [
            dataclasses.replace(row, trained_as=real.adapters[row.adapter].sha256)
            for row in tuned()
            if row.adapter in real.adapters
        ]
        stages, complete = [*first_stages(), Stage(2048, DOCUMENTS[2048], adapted)], False
        with contextlib.suppress(KeyboardInterrupt):
            measure(stages)
            _calibrate(real, calibrating, key, found)
            chosen = {name: layers for name, (layers, _) in found.items()}
            later = later_stages(chosen)
            stages += later
            measure(later)
            for length in DOCUMENTS:
                texts[length] = _perplexity(real, length, tokens, chosen, key)
            complete = True
        document = _document(real, documents, stages, journal.records)
    calibration = {name: {"layers": layers, "loss": loss} for name, (layers, loss) in found.items()}
    lora = {name: adapter.training for name, adapter in real.adapters.items()}
    return document | {"calibration": calibration, "perplexity": texts, "lora": lora, "complete": complete}


def _calibrate(
    real: Real, documents: Sequence[Document], key: Mapping[str, Any], found: dict[str, tuple[list[int], float]]
) -> None:
    """Calibrate with each size and method.

    documents: documents that no stage uses.
    found: gets the chosen layers and the loss with these layers, by size and method.
    """
    cases = [document.case(question) for document in documents for question in document.questions]
    cases = [Case(f"{at}", case.prompt, case.answer) for at, case in enumerate(cases)]
    base = SwaaConfig(CALIBRATION["length"] // 8, SINKS, "none", True, CALIBRATION["tail"])
    key = {"model": key["model"], "cases": digest(documents), "settings": CALIBRATION}
    with _journal("calibration", key) as journal:
        for size, keep in KEPT.items():
            for method, candidates in (("greedy", CALIBRATION["candidates"]), ("nll", None)):
                settings = CalibrateSettings(method, keep, candidates)
                report = search(real.load, base, real.model.n_layers, cases, settings, journal=journal)
                finished(report.stopped)
                found[f"{size} {method}"] = (list(report.chosen), round(report.loss.loss, 4))


def _perplexity(
    real: Real, length: int, tokens: Sequence[int], chosen: Mapping[str, Sequence[int]], key: Mapping[str, Any]
) -> list[dict[str, Any]]:
    configs = {row.key: row.swaa for row in texts_of(length, chosen)}
    key = {**key, "configs": {name: config and config.to_dict() for name, config in configs.items()}}
    with _journal(f"perplexity-{length}", key) as journal:
        report = perplexity.measure(real.load, configs, tokens, length, windows=TEXTS[length], journal=journal)
    finished(report.stopped)
    names = ("windows", "tokens", "ppl", "kl", "kl_error", "nll_increase", "nll_increase_error", "same_top")
    return [{"row": row["config"]} | {name: row[name] for name in names} for row in report.rows()]


def _journal(name: str, key: dict[str, Any]) -> Journal:
    """Open a journal in build/. Each key has its own file, so no run meets the journal of another run."""
    return Journal(BUILD / f"real-{name}-{journal_digest(key)[:8]}.jsonl", key)


def _document(
    real: Real, documents: Mapping[int, Sequence[Document]], stages: Sequence[Stage], records: Sequence[Record]
) -> dict[str, Any]:
    """Return the raw results as plain JSON values. Rows that lack a document are left out."""
    times = ratios(records)
    rows, cells = [], []
    complete: dict[tuple[int, str], tuple[int, Row, list[Record]]] = {}
    for stage in stages:
        for row in stage.rows:
            answers = [answers_of(records, stage.length, row, document) for document in documents[stage.length]]
            if all(answers):
                complete[stage.length, row.key] = stage.length, row, answers
    for length, row, answered in complete.values():
        name = {"length": length, "row": row.key}
        swaa = row.swaa.to_dict() if row.swaa else None
        about = {
            "config": row.name,
            "window": row.window,
            "swaa": swaa,
            "prefill": times.get((length, row.key, row.identity)),
            "adapter": row.adapter,
        }
        rows.append(name | about | {"pairs": {str(tail): _pairs(row, tail, length, real) for tail in row.tails}})
        for tail in map(str, row.tails):
            found = [record["answers"][tail] for record in answered]
            for task in TASKS:
                own = [
                    [answer for answer, question in zip(answers, each.questions, strict=True) if question.task == task]
                    for answers, each in zip(found, documents[length], strict=True)
                ]
                nll, hits = ([[answer[at] for answer in answers] for answers in own] for at in (0, 1))
                cells.append(name | {"tail": int(tail), "task": task, "nll": nll, "hits": hits})
    asked = [
        {"length": length, "task": task, "scored": [[q.scored for q in d.questions if q.task == task] for d in each]}
        for length, each in documents.items()
        if any(length == row_length for row_length, _ in complete)
        for task in TASKS
    ]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=BUILD.parent, capture_output=True, text=True, check=False)
    settings = {"sinks": SINKS, "tails": TAILS, "cue": CUE, "scored": SCORED, "seed": SEED, "calibration": CALIBRATION}
    about = {"file": real.path.name, "layers": real.model.n_layers, "sha256": _sha256(real.path)}
    return {
        "model": about,
        "machine": machine(),
        "threads": sorted({record["threads"] for *_, answered in complete.values() for record in answered}),
        "commit": commit.stdout.strip(),
        "corpus": fingerprints(real.texts),
        "settings": settings,
        "rows": rows,
        "asked": asked,
        "cells": cells,
    }


def ratios(records: Sequence[Record]) -> dict[tuple[int, str, str], list[float]]:
    """Return each row's prefill speed-ups over full attention, one per document, by length, row and identity.

    Each row's time is compared with full attention's latest time on the document. Full attention ran shortly before.
    """
    found: dict[tuple[int, str, str], list[float]] = {}
    full: dict[tuple[int, str], float] = {}
    for record in records:
        if record["row"] == FULL.key:
            full[record["length"], record["document"]] = record["seconds"]
        base = full[record["length"], record["document"]]
        name = record["length"], record["row"], record["identity"]
        found.setdefault(name, []).append(round(base / record["seconds"], 3))
    return found


def _pairs(row: Row, tail: int, length: int, real: Real) -> float:
    """Return the query-key pairs that a prefill computes, as a fraction of full attention's pairs."""
    swaa = dataclasses.replace(row.swaa, tail_count=tail) if row.swaa else None
    return round(1 / bound(Line(0.0, 1.0), swaa, length, length, [1] * real.model.n_layers), 4)


def _say(record: Record) -> None:
    print(f"{record['length']:,} {record['row']} {record['document']}: {record['seconds']:.1f} s", file=sys.stderr)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
