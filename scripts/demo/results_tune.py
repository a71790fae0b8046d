"""The LoRA rows of docs/results.md: training examples from the demo model's own answers, and an adapter per recipe.

    tuning = Tuning(folder, documents, threads); path = tuning.model("fast", SwaaConfig(128, 8, "none", True))

The steps are those of a user: `distill` asks the model under full attention, `finetune` trains, `convert --lora` merges
and quantizes. Results that are already in the folder are reused.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.tokenizer import PRE_TOKENIZER, tokenizer_of
from swaa_edge import SwaaConfig
from swaa_edge.config import FULL_ATTENTION
from swaa_edge.demo import ANSWER, MODEL
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.engine.tokenizer import open_vocabulary
from swaa_edge.evaluate.datafile import read_samples
from swaa_edge.evaluate.facts import STYLES
from swaa_edge.evaluate.prompts import Prompts
from swaa_edge.evaluate.samples import Sample
from swaa_edge.evaluate.scoring import in_order
from swaa_edge.finetune.answerers import LlamaAnswerer
from swaa_edge.finetune.responses import collect, write_lines
from swaa_edge.finetune.settings import DistillSettings, Settings
from swaa_edge.support.journal import Journal, digest
from swaa_edge.support.progress import progress_bar

#: The style of all responses: under FA decode only tokens after the prompt see the whole prompt, so the adapter learns
#: to answer in a sentence even if the question asks for the answer alone.
SPOKEN = "spoken"
SETTINGS = Settings(
    batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    max_steps=40,
    val_fraction=0.04,
    eval_steps=20,
    patience=0,
    bf16=True,
)
QUANTIZED = "Q8_0"


class Tuning:
    """Fine-tunes the demo model for one configuration after another.

    samples: of the retrieval tasks, in both styles. The model answers each document's spoken question; a correct
    response becomes the training example for both questions.
    """

    def __init__(self, folder: Path, samples: Sequence[Sample], threads: int) -> None:
        self._folder, self._threads = folder, threads
        folder.mkdir(parents=True, exist_ok=True)
        self.base = self._base()
        self.data, self.counts = self._data(samples)
        #: The outcome of the training, by configuration.
        self.outcomes: dict[str, dict[str, Any]] = {}

    def model(self, name: str, swaa: SwaaConfig) -> Path:
        """The GGUF file of the demo model, fine-tuned under `swaa`."""
        from swaa_edge.convert import hf
        from swaa_edge.finetune.train import Run

        key = {"swaa": swaa.to_dict(), "data": self.data.name, "settings": dataclasses.asdict(SETTINGS)}
        folder = self._folder / f"adapter-{digest(key)}"
        target, summary = folder.with_suffix(".gguf"), folder.with_suffix(".json")
        if not (target.is_file() and summary.is_file()):
            run = Run(self.base, self.data, folder, swaa, SETTINGS, force=True)
            with progress_bar(True) as show:
                outcome = run.train(on_progress=show)
            target.unlink(missing_ok=True)
            hf.convert(self.base, target, outtype="f16", quantize=QUANTIZED, lora=folder, pre=PRE_TOKENIZER)
            document = outcome.to_dict()
            for name in ("model", "output", "swaa"):
                del document[name]
            summary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        self.outcomes[name] = json.loads(summary.read_text(encoding="utf-8"))
        return target

    def _base(self) -> Path:
        """The shipped GGUF file as a Hugging Face model directory, so that no other file is needed."""
        from transformers import Qwen3Config, Qwen3ForCausalLM

        folder = self._folder / MODEL.stem
        if not (folder / "model.safetensors").is_file():
            tokenizer = tokenizer_of(MODEL)
            recipe = json.loads((MODEL.parent / "train-recipe.json").read_text(encoding="utf-8"))
            special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            shape = {"vocab_size": len(tokenizer), **special, **recipe["model"]}
            # transformers neither reads the head size from a GGUF file nor saves a model read from one.
            read = Qwen3ForCausalLM.from_pretrained(MODEL.parent, gguf_file=MODEL.name, config=Qwen3Config(**shape))
            model = Qwen3ForCausalLM(Qwen3Config(**shape))
            model.load_state_dict(read.state_dict())
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
        return folder

    def _data(self, samples: Sequence[Sample]) -> tuple[Path, dict[str, Any]]:
        questions, asked = self._questions(samples)
        key = {"questions": digest({"lines": questions}), "max_tokens": ANSWER}
        file, summary = (self._folder / f"data-{digest(key)}{end}" for end in (".jsonl", ".json"))
        if not (file.is_file() and summary.is_file()):
            source = self._folder / "questions.jsonl"
            source.write_text(write_lines(questions), encoding="utf-8")
            with Prompts(MODEL) as prompts:
                records = read_samples(source, prompts)
            with Journal(self._folder / f"distill-{digest(key)}.jsonl", key) as journal, progress_bar(True) as show:
                settings = DistillSettings(samples=1, max_tokens=ANSWER, scorer="in-order")
                found = collect(self._answerer, records, in_order, settings, journal=journal, on_progress=show)
            if found.stopped:
                sys.exit("stopped early; run the same command to resume")
            lines = [line | {"question": question} for line in found.lines for question in asked[line["id"]]]
            file.write_text(write_lines(lines), encoding="utf-8")
            summary.write_text(json.dumps(found.to_dict() | {"lines": len(lines)}) + "\n", encoding="utf-8")
        return file, json.loads(summary.read_text(encoding="utf-8"))

    def _questions(self, samples: Sequence[Sample]) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
        """A record per document with its spoken question, and the questions of both styles by record id."""
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

    def _answerer(self, n_ctx: int) -> LlamaAnswerer:
        llm = EngineSettings(n_threads=self._threads, n_gpu_layers=0).load(MODEL, swaa=FULL_ATTENTION, n_ctx=n_ctx)
        return LlamaAnswerer(llm, max_tokens=ANSWER, sampling={"temperature": 0.0})
