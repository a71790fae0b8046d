#!/usr/bin/env python3
"""Measure what each strategy of SWAA costs and brings on the demo model, and write docs/results.md.

python scripts/demo/results.py measure     # writes docs/results/demo.json; resumes an interrupted run
python scripts/demo/results.py write       # writes docs/results.md and its plot from it
python scripts/demo/results.py check       # fails if docs/results.md is stale
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "scripts")]  # where swaa_edge and this package lie

from demo.results_page import page, tuned_name
from swaa_edge import SwaaConfig
from swaa_edge.demo import ANSWER, CONTEXT, MODEL, SINKS, WINDOW

if TYPE_CHECKING:
    from demo.results_tune import Tuning
    from swaa_edge import SwaaLlama

DATA = ROOT / "docs" / "results" / "demo.json"
PAGE = ROOT / "docs" / "results.md"
#: Seeds: calibrate and distill see other questions than those of the table.
EVALUATED, CALIBRATED, LEARNED = 41, 42, 43
SAMPLES = 200
#: Documents per task for the training examples of an adapter; the configurations that get one.
DOCUMENTS = 120
TUNED = ("sinks + FA decode", "quarter 1::4", "all three")


def configurations(n_layers: int, chosen: Sequence[int]) -> dict[str, Any]:
    """Each strategy alone, each pair, all three, every periodic quarter, and the layers that calibrate chose."""

    def swaa(fa_layers: Any, sinks: int, fa_decode: bool) -> SwaaConfig:
        return SwaaConfig(WINDOW, sinks, fa_layers, fa_decode)

    quarters = {f"quarter {offset}::4": swaa(f"{offset}::4", SINKS, True) for offset in range(4)}
    return {
        "full": False,
        "naive": swaa("none", 0, False),
        "sinks": swaa("none", SINKS, False),
        "FA decode": swaa("none", 0, True),
        "interleaving": swaa("1::2", 0, False),
        "sinks + FA decode": swaa("none", SINKS, True),
        "sinks + interleaving": swaa("1::2", SINKS, False),
        "FA decode + interleaving": swaa("1::2", 0, True),
        "all three": swaa("1::2", SINKS, True),
        **quarters,
        "quarter calibrated": swaa(list(chosen), SINKS, True),
    }


def measure(samples: int, threads: int) -> None:
    """Calibrate, fine-tune, then ask every configuration the same questions; resumes an interrupted run."""
    from swaa_edge.support.machine import machine

    (ROOT / "build").mkdir(exist_ok=True)
    measured = _Measurement(samples, threads)
    calibrated = measured.calibrate()
    tuning = measured.tune(calibrated["greedy"].chosen)
    document = measured.evaluate(calibrated["greedy"].chosen, tuning)
    document |= {
        "calibration": {name: _calibration(found.to_dict()) for name, found in calibrated.items()},
        "model": {"file": MODEL.name, "sha256": _sha256(MODEL), "layers": measured.n_layers},
        "settings": {
            "context": CONTEXT,
            "prompt_tokens": CONTEXT - ANSWER,
            "window": WINDOW,
            "sinks": SINKS,
            "samples_per_task": samples,
            "seed": EVALUATED,
            "calibration_seed": CALIBRATED,
            "learned_seed": LEARNED,
            "threads": threads,
        },
        "machine": machine(),
    }
    DATA.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{DATA.relative_to(ROOT)} written; next: {Path(sys.argv[0]).name} write", file=sys.stderr)


class _Measurement:
    """The questions of all three steps, and the models they are asked."""

    def __init__(self, samples: int, threads: int) -> None:
        from swaa_edge.calibrate.cases import from_samples
        from swaa_edge.engine.settings import EngineSettings
        from swaa_edge.evaluate.prompts import Prompts
        from swaa_edge.evaluate.tasks import TASKS, TaskSettings, build
        from swaa_edge.files.model import read_model

        def questions(seed: int, count: int) -> list[Any]:
            lengths = (CONTEXT - ANSWER,)
            return build(TaskSettings(tuple(TASKS), lengths, samples=count, seed=seed, beyond=WINDOW), prompts)

        self.threads, self.engine = threads, EngineSettings(n_threads=threads, n_gpu_layers=0)
        self.n_layers = read_model(MODEL).n_layers
        self.models: dict[str, Path] = {}  # by the label of an adapter
        with Prompts(MODEL) as prompts:
            self.cases = from_samples(questions(CALIBRATED, 16), prompts)
            self.questions, self.documents = questions(EVALUATED, samples), questions(LEARNED, 2 * DOCUMENTS)
        prompts_hash = hashlib.sha256(b"".join(sample.prompt.tobytes() for sample in self.questions)).hexdigest()
        self.key = {"model": _sha256(MODEL), "samples": samples, "prompts": prompts_hash}

    def load(self, swaa: Any, n_ctx: int) -> SwaaLlama:
        model = self.models[swaa.adapter] if swaa and swaa.adapter else MODEL
        return self.engine.load(model, swaa=swaa, n_ctx=n_ctx)

    def calibrate(self) -> dict[str, Any]:
        """The reports by method."""
        from swaa_edge.calibrate.search import search
        from swaa_edge.calibrate.settings import CalibrateSettings
        from swaa_edge.support.journal import Journal

        base, keep = SwaaConfig(WINDOW, SINKS, "none", True), self.n_layers // 4
        with Journal(ROOT / "build" / "results-calibrate.jsonl", self.key) as journal:
            return {
                method: search(
                    self.load, base, self.n_layers, self.cases, CalibrateSettings(method, keep), journal=journal
                )
                for method in ("nll", "keep", "greedy")
            }

    def tune(self, chosen: Sequence[int]) -> Tuning:
        """Fine-tune the model for each of the configurations `TUNED`."""
        from demo.results_tune import Tuning

        tuning = Tuning(ROOT / "build" / "results-lora", self.documents, self.threads)
        configs = configurations(self.n_layers, chosen)
        for name in TUNED:
            self.models[tuned_name(name)] = tuning.model(name, configs[name])
        return tuning

    def evaluate(self, chosen: Sequence[int], tuning: Tuning) -> dict[str, Any]:
        """The document of `evaluate`, without its answers, and of the fine-tuning."""
        from demo.results_tune import SETTINGS
        from swaa_edge.evaluate.run import evaluate
        from swaa_edge.support.journal import Journal
        from swaa_edge.support.progress import progress_bar

        configs = configurations(self.n_layers, chosen)
        configs |= {tuned_name(name): dataclasses.replace(configs[name], adapter=tuned_name(name)) for name in TUNED}
        key = self.key | {"chosen": list(chosen), "tuned": [_sha256(model) for model in self.models.values()]}
        with Journal(ROOT / "build" / "results-eval.jsonl", key) as journal, progress_bar(True) as show:
            options = {"max_tokens": ANSWER, "journal": journal, "together": True, "on_progress": show}
            report = evaluate(self.load, configs, self.questions, **options)
        if report.stopped:
            sys.exit("stopped early; run the same command to resume")
        document = report.to_dict()
        answers = document.pop("answers")
        at_once = {name: _at_once(self.questions, answers, tuned_name(name)) for name in TUNED}
        settings = dataclasses.asdict(SETTINGS)
        tuned = {"data": tuning.counts, "settings": settings, "outcomes": tuning.outcomes, "at_once": at_once}
        return document | {"tuning": tuned}


def _at_once(questions: Sequence[Any], answers: Sequence[dict[str, Any]], name: str) -> float:
    """The fraction of direct questions whose response begins with the answer."""
    direct = {sample.id: sample.answers[0] for sample in questions if sample.style == "direct"}
    mine = [row for row in answers if row["config"] == name and row["sample"] in direct]
    return sum(row["reply"].strip().startswith(direct[row["sample"]]) for row in mine) / len(mine)


def _calibration(found: dict[str, Any]) -> dict[str, Any]:
    names = ("method", "keep", "chosen", "ranking", "full_loss", "sliding_loss", "chosen_loss", "samples")
    return {name: found[name] for name in names}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write() -> None:
    """Write the page and its plot."""
    from swaa_edge.evaluate.plot import plot_accuracy

    document = json.loads(DATA.read_text(encoding="utf-8"))
    PAGE.write_text(page(document), encoding="utf-8")
    plot_accuracy(document, DATA.with_name("accuracy.png"))


def check() -> None:
    """Fail if the page is stale."""
    if PAGE.read_text(encoding="utf-8") != page(json.loads(DATA.read_text(encoding="utf-8"))):
        sys.exit("docs/results.md is stale: python scripts/demo/results.py write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="measure | write | check")
    measuring = commands.add_parser("measure", help=measure.__doc__)
    measuring.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help="per task; default %(default)s")
    measuring.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all cores")
    commands.add_parser("write", help=write.__doc__)
    commands.add_parser("check", help=check.__doc__)
    given = vars(parser.parse_args())
    {"measure": measure, "write": write, "check": check}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
