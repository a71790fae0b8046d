"""Trains LoRA adapters for docs/results-real.md on the model's own responses, under the SWAA mask.

    train(real_model(), corpus(), threads=2)
    trained(corpus())["fast-128"].gguf

The training documents have hidden facts, and no row is measured on these documents. For each document, the model
answers six questions under full attention (`swaa-edge distill`). The correct responses become one conversation per
document. `swaa-edge finetune` therefore reads a document only once per training step.

Everything is kept in build/real-lora-*/, so the same call resumes an interrupted run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from real.cells import tuned
from real.fetch import RealModel
from real.reading import finished
from real.tasks import FACTS
from swaa_edge.convert.lora_to_gguf import convert_adapter
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.finetune import Settings, distill, finetune
from swaa_edge.generate.prompts import asked
from swaa_edge.support.atomic import atomic_output
from swaa_edge.support.journal import digest
from swaa_edge.support.progress import progress_bar

BUILD = Path(__file__).resolve().parents[2] / "build"
#: Characters of a document (about 900 tokens), and the fraction of the document, from the start, that can have facts.
CHARACTERS, FAR = 3400, 0.8
#: Number of the first document in each text, and documents per text. Earlier documents are measured.
TEXTS = {"docstrings": 24, "debian": 48}
PER_TEXT = 24
#: Responses per question, and maximum tokens of a response. The model answers with one short sentence.
DISTILL = {"samples": 2, "max_tokens": 40, "seed": 71}
TRAIN = {
    "epochs": 2.0,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-4,
    "val_fraction": 0.1,
    "patience": 0,
    "seed": 71,
}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trained adapter.

    gguf: path of the adapter as a GGUF file.
    sha256: hash of this file.
    training: the content of its swaa_training.json.
    """

    gguf: Path
    sha256: str
    training: Mapping[str, Any]


def folder_of(texts: Mapping[str, str]) -> Path:
    """Return the folder of the adapters for these texts. Other texts or settings give another folder.

    texts: the texts of `corpus`.
    """
    settings = {
        "questions": _questions(texts),
        "distill": DISTILL,
        "finetune": dataclasses.asdict(Settings(**TRAIN)),
        "rows": [row.swaa.to_dict() for row in tuned()],
    }
    return BUILD / f"real-lora-{digest(settings)[:8]}"


def trained(texts: Mapping[str, str]) -> dict[str, Adapter]:
    """Return the adapters that are trained, by name. The names are those of the rows of `tuned`.

    texts: the texts of `corpus`.
    """
    found = {}
    for row in tuned():
        folder = folder_of(texts) / str(row.adapter)
        if (gguf := folder.with_suffix(".gguf")).exists():
            training = json.loads((folder / "swaa_training.json").read_text(encoding="utf-8"))
            found[str(row.adapter)] = Adapter(gguf, hashlib.sha256(gguf.read_bytes()).hexdigest(), training)
    return found


def train(model: RealModel, texts: Mapping[str, str], threads: int) -> None:
    """Train the adapters that are missing.

    texts: the texts of `corpus`.
    threads: CPU threads.
    """
    import torch

    torch.set_num_threads(threads)
    parent = folder_of(texts)
    parent.mkdir(parents=True, exist_ok=True)
    questions, responses, data = (parent / f"{name}.jsonl" for name in ("questions", "responses", "conversations"))
    _write(questions, _questions(texts))
    with progress_bar(True) as bar:
        if not responses.exists():
            engine = EngineSettings(n_threads=threads, n_gpu_layers=0)
            found = distill(model.q8_0, questions, responses, engine=engine, on_note=_say, on_progress=bar, **DISTILL)
            finished(found.stopped)
        _write(data, conversations(responses))
        for row in tuned():
            folder = parent / str(row.adapter)
            gguf = folder.with_suffix(".gguf")
            if gguf.exists():
                continue
            if not (folder / "adapter_config.json").exists():
                _say(f"training {row.adapter}")
                finetune(model.hf, data, folder, row.swaa, on_note=_say, on_progress=bar, **TRAIN)
            convert_adapter(model.hf, folder, gguf)


def _questions(texts: Mapping[str, str]) -> list[dict[str, str]]:
    return [record for name in TEXTS if name in texts for record in ask_about(name, texts[name])]


def ask_about(name: str, text: str) -> Iterator[dict[str, str]]:
    """Yield records for `distill`: documents made from `text` with hidden facts, and questions about the facts."""
    for number in range(TEXTS[name], TEXTS[name] + PER_TEXT):
        rng = random.Random(f"lora/{name}/{number}")
        sentences = re.split(r"(?<=[.!?])\s+", text[number * CHARACTERS : (number + 1) * CHARACTERS])[1:]
        facts = [(kind, rng.choice(kind.names), rng.choice(kind.values)) for kind in rng.sample(FACTS, len(FACTS))]
        for kind, who, value in facts:
            fact = f"{kind.lead.format(who)} {value}{kind.end}"
            sentences.insert(rng.randrange(1, int(len(sentences) * FAR)), fact)
        document = " ".join(sentences)
        for at, (kind, who, value) in enumerate(facts):
            question = kind.question.format(who)
            yield {"id": f"{name}/{number}/{at}", "prompt": document, "question": question, "answer": value}


def conversations(responses: Path) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield one record for `finetune` per document: a conversation with all kept responses."""
    records = [json.loads(line) for line in responses.read_text(encoding="utf-8").splitlines()]
    for _, about in itertools.groupby(records, lambda record: record["id"].rpartition("/")[0]):
        messages = []
        for record in about:
            question = record["question"] if messages else asked(record["prompt"], record["question"])
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": record["answer"].strip()},
            ]
        yield {"messages": messages}


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with atomic_output(path, force=True) as file:
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _say(what: object) -> None:
    print(what, file=sys.stderr)
