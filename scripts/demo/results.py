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
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "scripts")]  # where swaa_edge and this package lie

from demo.results_page import page, tuned_name
from swaa_edge import SwaaConfig
from swaa_edge.demo import ANSWER, CONTEXT, MODEL, SINKS, WINDOW

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
    from demo.results_tune import SETTINGS, Tuning
    from swaa_edge import SwaaLlama
    from swaa_edge.calibrate.cases import from_samples
    from swaa_edge.calibrate.search import search
    from swaa_edge.evaluate.prompts import Prompts
    from swaa_edge.evaluate.run import evaluate
    from swaa_edge.evaluate.tasks import TASKS, TaskSettings, build
    from swaa_edge.files.model import read_model
    from swaa_edge.support.journal import Journal
    from swaa_edge.support.machine import machine

    models = {}  # by the label of an adapter

    def load(swaa: Any, n_ctx: int) -> SwaaLlama:
        model = models[swaa.adapter] if swaa and swaa.adapter else MODEL
        return SwaaLlama(
            str(model),
            swaa=swaa,
            n_ctx=n_ctx,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            verbose=False,
        )

    def asked(seed: int, count: int) -> list[Any]:
        return build(TaskSettings(tuple(TASKS), (CONTEXT - ANSWER,), samples=count, seed=seed, beyond=WINDOW), prompts)

    n_layers = read_model(MODEL).n_layers
    build_folder = ROOT / "build"
    build_folder.mkdir(exist_ok=True)
    with Prompts(MODEL) as prompts:
        cases = from_samples(asked(CALIBRATED, 16), prompts)
        questions = asked(EVALUATED, samples)
        learned = asked(LEARNED, 2 * DOCUMENTS)
    read = hashlib.sha256(b"".join(sample.prompt.tobytes() for sample in questions)).hexdigest()
    key = {"model": _sha256(MODEL), "samples": samples, "prompts": read}
    with Journal(build_folder / "results-calibrate.jsonl", key) as journal:
        base = SwaaConfig(WINDOW, SINKS, "none", True)
        methods = {
            method: search(load, base, n_layers, cases, keep=n_layers // 4, method=method, journal=journal)
            for method in ("nll", "keep", "greedy")
        }
    chosen = methods["greedy"].chosen
    configs = configurations(n_layers, chosen)
    tuning = Tuning(build_folder / "results-lora", learned, threads)
    for name in TUNED:
        label = tuned_name(name)
        models[label] = tuning.model(name, configs[name])
        configs[label] = dataclasses.replace(configs[name], adapter=label)
    made = [_sha256(model) for model in models.values()]
    with Journal(build_folder / "results-eval.jsonl", key | {"chosen": list(chosen), "tuned": made}) as journal:
        report = evaluate(
            load, configs, questions, max_tokens=ANSWER, journal=journal, together=True, on_progress=_show
        )
    print(file=sys.stderr)
    if report.stopped:
        sys.exit("stopped early; run the same command to resume")
    document = report.to_dict()
    answers = document.pop("answers")
    at_once = {name: _at_once(questions, answers, tuned_name(name)) for name in TUNED}
    document |= {
        "calibration": {name: _calibration(found.to_dict()) for name, found in methods.items()},
        "tuning": {
            "data": tuning.counts,
            "settings": dataclasses.asdict(SETTINGS),
            "outcomes": tuning.outcomes,
            "at_once": at_once,
        },
        "model": {"file": MODEL.name, "sha256": key["model"], "layers": n_layers},
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


def _at_once(questions: Sequence[Any], answers: Sequence[dict[str, Any]], name: str) -> float:
    """The fraction of direct questions whose response begins with the answer."""
    direct = {sample.id: sample.answers[0] for sample in questions if sample.style == "direct"}
    mine = [row for row in answers if row["config"] == name and row["sample"] in direct]
    return sum(row["reply"].strip().startswith(direct[row["sample"]]) for row in mine) / len(mine)


def _calibration(found: dict[str, Any]) -> dict[str, Any]:
    names = ("method", "keep", "chosen", "ranking", "full_loss", "sliding_loss", "chosen_loss", "samples")
    return {name: found[name] for name in names}


def _show(at: Any) -> None:
    print(f"\r{at.text}   ", end="", file=sys.stderr, flush=True)


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
