"""Measures the figures of docs/results.md: calibrates, fine-tunes and evaluates.

    document = measure(samples=200, threads=2)      # python scripts/demo/results.py measure

The steps correspond to commands:

- `calibrate` chooses layers.
- `distill` collects responses under full attention.
- `finetune` trains.
- `convert --lora` merges and quantizes.
- `eval` evaluates all configurations on the same questions.

Results are kept in build/, so a finished step is not repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.results_page import tuned_name
from demo.tokenizer import PRE_TOKENIZER, QUANTIZED, tokenizer_of
from swaa_edge import SwaaConfig, SwaaLlama
from swaa_edge.calibrate.cases import from_samples
from swaa_edge.calibrate.report import Report
from swaa_edge.calibrate.search import search
from swaa_edge.calibrate.settings import CalibrateSettings
from swaa_edge.config import FULL_ATTENTION, Configuration
from swaa_edge.demo import ANSWER, CONTEXT, MODEL, SINKS, WINDOW
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.engine.tokenizer import open_vocabulary
from swaa_edge.evaluate.facts import STYLES
from swaa_edge.evaluate.run import evaluate
from swaa_edge.evaluate.samples import Sample
from swaa_edge.evaluate.tasks import TASKS, TaskSettings, build
from swaa_edge.files.model import read_model
from swaa_edge.finetune import Settings, distill, finetune
from swaa_edge.finetune.responses import write_lines
from swaa_edge.generate.prompts import Prompts
from swaa_edge.support.journal import Journal, digest
from swaa_edge.support.machine import machine
from swaa_edge.support.progress import progress_bar

BUILD = Path(__file__).resolve().parents[2] / "build"
#: Seeds. `calibrate` and `distill` see other questions than `eval`.
EVALUATED, CALIBRATED, LEARNED = 41, 42, 43
#: Number of training documents per task, and the configurations that get an adapter.
DOCUMENTS = 120
TUNED = ("sinks + FA decode", "quarter 1::4", "all three")
#: Style of all responses. Under FA decode, only tokens after the prompt see the whole prompt. So the adapter learns to
#: answer in a sentence, even if the question asks for the answer alone.
SPOKEN = "spoken"
SETTINGS = dataclasses.asdict(
    Settings(
        batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_steps=40,
        val_fraction=0.04,
        eval_steps=20,
        patience=0,
        bf16=True,
    )
)


def configurations(chosen: Sequence[int]) -> dict[str, Configuration]:
    """Return the configurations to evaluate, by name.

    The first are full attention, a bare window, and each combination of strategies. Five more keep full attention in a
    quarter of the layers. Four of the five use every fourth layer, from different offsets. The last uses the layers in
    `chosen`.
    """
    parts: dict[str, dict[str, Any]] = {
        "sinks": {"sink_count": SINKS},
        "FA decode": {"fa_decode": True},
        "interleaving": {"fa_layers": "1::2"},
    }
    configs: dict[str, Configuration] = {"full": FULL_ATTENTION}
    for names in (names for count in range(4) for names in itertools.combinations(parts, count)):
        name = {0: "naive", 3: "all three"}.get(len(names), " + ".join(names))
        configs[name] = SwaaConfig(WINDOW, **{key: value for part in names for key, value in parts[part].items()})
    quarters = {f"{offset}::4": f"{offset}::4" for offset in range(4)} | {"calibrated": list(chosen)}
    return configs | {f"quarter {name}": SwaaConfig(WINDOW, SINKS, layers, True) for name, layers in quarters.items()}


def measure(samples: int, threads: int) -> dict[str, Any]:
    """Calibrate, fine-tune, and evaluate every configuration on `samples` questions per task. Return the document."""
    engine, n_layers = EngineSettings(n_threads=threads, n_gpu_layers=0), read_model(MODEL).n_layers
    models: dict[str, Path] = {}  # by the label of an adapter

    def load(swaa: Configuration, n_ctx: int) -> SwaaLlama:
        model = models[swaa.adapter] if swaa and swaa.adapter else MODEL
        return engine.load(model, swaa=swaa, n_ctx=n_ctx)

    def questions(seed: int, count: int) -> list[Sample]:
        lengths = (CONTEXT - ANSWER,)
        return build(TaskSettings(tuple(TASKS), lengths, samples=count, seed=seed, beyond=WINDOW), prompts)

    with Prompts(MODEL) as prompts:
        cases = from_samples(questions(CALIBRATED, 16), prompts)
        asked, documents = questions(EVALUATED, samples), questions(LEARNED, 2 * DOCUMENTS)
    hashed = hashlib.sha256(b"".join(sample.prompt.tobytes() for sample in asked)).hexdigest()
    key = {"model": _sha256(MODEL), "samples": samples, "prompts": hashed}
    BUILD.mkdir(exist_ok=True)
    base = SwaaConfig(WINDOW, SINKS, "none", True)
    with Journal(BUILD / "results-calibrate.jsonl", key) as journal:
        calibrated = {
            method: search(load, base, n_layers, cases, CalibrateSettings(method, n_layers // 4), journal=journal)
            for method in ("nll", "keep", "greedy")
        }
    chosen = calibrated["greedy"].chosen
    configs = configurations(chosen)
    tuning = Tuning(BUILD / "results-lora", documents, engine)
    for name in TUNED:
        label = tuned_name(name)
        models[label] = tuning.model(name, configs[name])
        configs[label] = dataclasses.replace(configs[name], adapter=label)
    key |= {"chosen": list(chosen), "tuned": [_sha256(model) for model in models.values()]}
    with Journal(BUILD / "results-eval.jsonl", key) as journal, progress_bar(True) as show:
        report = evaluate(load, configs, asked, max_tokens=ANSWER, journal=journal, together=True, on_progress=show)
    if report.stopped:
        sys.exit("stopped early; run the same command to resume")
    document = report.to_dict()
    answers = document.pop("answers")
    at_once = {name: _at_once(asked, answers, tuned_name(name)) for name in TUNED}
    return document | {
        "calibration": {name: _calibration(found) for name, found in calibrated.items()},
        "tuning": {
            "data": tuning.counts,
            "settings": SETTINGS,
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


def _at_once(questions: Sequence[Sample], answers: Sequence[dict[str, Any]], name: str) -> float:
    """Return the fraction of direct questions whose response begins with the answer."""
    direct = {sample.id: sample.answers[0] for sample in questions if sample.style == "direct"}
    mine = [row for row in answers if row["config"] == name and row["sample"] in direct]
    return sum(row["reply"].strip().startswith(direct[row["sample"]]) for row in mine) / len(mine)


def _calibration(report: Report) -> dict[str, Any]:
    found = report.to_dict()
    names = ("method", "keep", "chosen", "ranking", "full_loss", "sliding_loss", "chosen_loss", "samples")
    return {name: found[name] for name in names}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Tuning:
    """Fine-tunes the demo model for one configuration after another.

    The model answers the spoken question about each document. A correct response becomes the training example for both
    questions about the document.

    samples: samples of the retrieval tasks, in the styles "direct" and "spoken".
    """

    def __init__(self, folder: Path, samples: Sequence[Sample], engine: EngineSettings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._base = folder, _hf_directory(folder / MODEL.stem)
        self._data, self.counts = self._examples(samples, engine)
        #: Training outcomes by configuration.
        self.outcomes: dict[str, dict[str, Any]] = {}

    def model(self, name: str, swaa: SwaaConfig) -> Path:
        """Fine-tune the demo model under `swaa`. Return the path of the GGUF file."""
        from swaa_edge.convert import hf

        key = {"swaa": swaa.to_dict(), "data": self._data.name, "settings": SETTINGS}
        folder = self._folder / f"adapter-{digest(key)}"
        target, summary = folder.with_suffix(".gguf"), folder.with_suffix(".json")
        if not (target.is_file() and summary.is_file()):
            with progress_bar(True) as show:
                outcome = finetune(self._base, self._data, folder, swaa, force=True, on_progress=show, **SETTINGS)
            target.unlink(missing_ok=True)
            hf.convert(self._base, target, outtype="f16", quantize=QUANTIZED, lora=folder, pre=PRE_TOKENIZER)
            kept = outcome.to_dict()
            del kept["model"], kept["output"], kept["swaa"]
            summary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        self.outcomes[name] = json.loads(summary.read_text(encoding="utf-8"))
        return target

    def _examples(self, samples: Sequence[Sample], engine: EngineSettings) -> tuple[Path, dict[str, Any]]:
        """Return the path of the training examples, and the counts of kept and dropped responses."""
        questions, asked = _questions(samples)
        key = digest({"questions": questions, "max_tokens": ANSWER})
        source, responses, file = (self._folder / f"{kind}-{key}.jsonl" for kind in ("questions", "responses", "data"))
        summary = file.with_suffix(".json")
        if not (file.is_file() and summary.is_file()):
            source.write_text(write_lines(questions), encoding="utf-8")
            settings = {"temperature": 0.0, "max_tokens": ANSWER, "scorer": "in-order"}
            with progress_bar(True) as show:
                found = distill(MODEL, source, responses, engine=engine, force=True, on_progress=show, **settings)
            if found.stopped:
                sys.exit(f"stopped early ({found.stopped}); run the same command to resume")
            kept = found.collected
            lines = [line | {"question": question} for line in kept.lines for question in asked[line["id"]]]
            file.write_text(write_lines(lines), encoding="utf-8")
            summary.write_text(json.dumps(kept.to_dict() | {"lines": len(lines)}) + "\n", encoding="utf-8")
        return file, json.loads(summary.read_text(encoding="utf-8"))


def _hf_directory(folder: Path) -> Path:
    """Convert the shipped GGUF file to a Hugging Face model directory."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if not (folder / "model.safetensors").is_file():
        tokenizer = tokenizer_of(MODEL)
        recipe = json.loads((MODEL.parent / "train-recipe.json").read_text(encoding="utf-8"))
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        shape = {"vocab_size": len(tokenizer), **special, **recipe["model"]}
        # transformers can't read the head size from a GGUF file, and can't save a model that was read from a GGUF file.
        read = Qwen3ForCausalLM.from_pretrained(MODEL.parent, gguf_file=MODEL.name, config=Qwen3Config(**shape))
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
        model.load_state_dict(read.state_dict())
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def _questions(samples: Sequence[Sample]) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Return a record with the spoken question per document, and {record id: questions in both styles}."""
    records: list[dict[str, Any]] = []
    asked: dict[str, list[str]] = {}
    with Prompts(MODEL) as prompts, open_vocabulary(MODEL) as vocabulary:
        for sample in samples:
            name = sample.id.rpartition("/")[0]
            asked.setdefault(name, []).append(sample.question)
            if sample.style == SPOKEN:
                head, tail = prompts.around(sample.question)
                document = vocabulary.detokenize(list(sample.prompt[head : len(sample.prompt) - tail])).decode()
                answers = list(sample.answers)
                records.append({"id": name, "prompt": document, "question": sample.question, "answer": answers})
    assert all(len(questions) == len(STYLES) for questions in asked.values())
    return records, asked
