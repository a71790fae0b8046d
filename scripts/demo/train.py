#!/usr/bin/env python3
"""Train the demo model from scratch: a small Qwen3 that retrieves over its whole context of 2,048 tokens.

    python scripts/demo/train.py            # build/demo-model; resumes an interrupted run
    python scripts/demo/train.py --install  # then: writes the quantized model to swaa_edge/models

Training needs torch, transformers and the text of demo/text.py, and takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "scripts")]  # where swaa_edge and this package lie

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from demo.data import TAGS, Data, Mix
from demo.text import sources, training_text
from demo.tokenizer import PRE_TOKENIZER, QUANTIZED, make_tokenizer

#: Name of the trained model's directory. The converter also gives the model this name.
NAME = "swaa-edge-demo"
CONTEXT = 2048
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
SEED = 1
#: (steps, tokens per sequence, tokens per batch). Short sequences come first: steps are cheap, and answers are near.
CURRICULUM = (
    (300, 64, 4096),
    (150, 128, 4096),
    (150, 256, 4096),
    (150, 512, 8192),
    (150, 1024, 8192),
    (250, 2048, 8192),
)
PEAK_RATE, WARMUP, HORIZON, DECAY = 2e-3, 100, 1700, 800
SAVED_EVERY = 100
#: Number of a head's fastest rotating dimensions. These dimensions distinguish neighbours.
FAST = 4
#: How many tokens each head of the first layer initially looks back. 1 and 2 lead from a value to the name, in a fact
#: or in JSON. 3 leads from the start of an answer to the subject of the question, or 5 with two subjects.
LOOK_BACK = (1, 2, 3, 5)


def look_back(model: Qwen3ForCausalLM) -> None:
    """Initialize each head of the first layer to look a fixed number of tokens back.

    Retrieval needs a pair of heads ("induction heads", arXiv 2209.11895). One head copies a nearby earlier token into
    each position. A head in a later layer searches for the copied token. Neither head is useful alone, so with random
    weights both form late in the training.

    This function provides the first head. Every embedding gets a constant component. The query and key projections read
    the constant component. RoPE's own angles rotate the query back. All weights remain trainable.
    """
    attention, size = model.model.layers[0].self_attn, MODEL["head_dim"]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1
        attention.q_proj.weight *= 0.1
        attention.k_proj.weight *= 0.1
        for head in range(MODEL["num_key_value_heads"]):
            attention.k_proj.weight[head * size : head * size + FAST, 0] = 1.0
        angles = MODEL["rope_theta"] ** (-2 * torch.arange(FAST) / size)
        for head, back in enumerate(LOOK_BACK):
            query = torch.zeros(size)
            query[:FAST] = torch.cos(back * angles)
            query[size // 2 : size // 2 + FAST] = -torch.sin(back * angles)
            rows = slice(head * size, (head + 1) * size)
            attention.q_proj.weight[rows, 0] = query
        # Scores reach 4 x sqrt(head_dim), so one token gets nearly all of the attention.
        attention.q_norm.weight.fill_(2.0)
        attention.k_norm.weight.fill_(2.0)


def lessons(step: int) -> Mix:
    """Return the mix of training sequences.

    Copying (one look-up) comes first, then linked facts (two look-ups), then documents.
    """
    if step < 150:
        return Mix(1.0, 0.0, 0.0)
    if step < 300:
        return Mix(0.2, 0.8, 0.0)
    if step < 400:
        return Mix(0.1, 0.2, 0.6)
    return Mix(0.03, 0.05, 0.15)


def rate(step: int) -> float:
    """Return the learning rate: linear warm-up, a cosine over `HORIZON` steps, and linear decay after step `DECAY`."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / (HORIZON - WARMUP)
    value = PEAK_RATE * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
    total = sum(steps for steps, *_ in CURRICULUM)
    return value * min(1.0, max(0.02, (total - step) / (total - DECAY)))


def loss_of(model, tokens, weights, tags, values):
    """Return the weighted loss, the loss on prose in nats per token, and the counts.

    The counts have the shape [2, tags]: answers and correct answers.
    """
    hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
    targets, weights, tags = tokens[:, 1:], weights[:, 1:], tags[:, 1:]
    counted = weights > 0
    targets, weights, tags = targets[counted], weights[counted], tags[counted]
    logits = model.lm_head(hidden[counted])
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    with torch.no_grad():
        answers = (weights >= 1) & values[targets]
        correct = answers & (logits.argmax(-1) == targets)
        counts = torch.stack([torch.bincount(tags[chosen], minlength=len(TAGS)) for chosen in (answers, correct)])
        prose = losses[weights < 1]
    return (losses * weights).sum() / weights.sum(), prose.mean().item() if len(prose) else None, counts


class Training:
    """Trains the demo model. The model, the optimizers and the data's state are saved in `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.log, self.state = folder, folder / "log.jsonl", folder / "state.pt"
        folder.mkdir(parents=True, exist_ok=True)
        text = training_text()
        self.tokenizer = make_tokenizer(text)
        torch.manual_seed(seed)
        special = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        self.model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(self.tokenizer), **special, **MODEL))
        look_back(self.model)
        matrices, others = [], []
        for name, parameter in self.model.named_parameters():
            (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
        self.optimizers = [
            torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.data = Data(self.tokenizer, text, seed)
        self.values = torch.zeros(len(self.tokenizer), dtype=torch.bool)
        self.values[list(self.data.numbers)] = True
        self.step = 0
        self._started = time.time() - (self._resume() if self.state.exists() else 0.0)

    def _resume(self) -> float:
        saved = torch.load(self.state, weights_only=False)
        self.model.load_state_dict(saved["model"])
        for optimizer, kept in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.data.rng.setstate(saved["random"])
        self.step = saved["step"]
        logged = self.log.read_text().splitlines() if self.log.exists() else []
        lines = [line for line in logged if json.loads(line)["step"] < self.step]
        self.log.write_text("".join(f"{line}\n" for line in lines))
        return saved["seconds"]

    def save(self) -> None:
        saved = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": self.data.rng.getstate(),
            "step": self.step,
            "seconds": time.time() - self._started,
        }
        part = self.state.with_suffix(".part")
        torch.save(saved, part)
        part.replace(self.state)

    def run(self) -> None:
        """Run the remaining steps. Log every 25 steps, and save the state every 100 steps."""
        steps = [(length, batch) for count, length, batch in CURRICULUM for _ in range(count)]
        total = torch.zeros(2, len(TAGS))
        while self.step < len(steps):
            length, batch = steps[self.step]
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = rate(self.step)
            tokens, weights, tags = self.data.batch(length, batch // length, lessons(self.step))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, prose, counts = loss_of(self.model, tokens, weights, tags, self.values)
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            total += counts
            self.step += 1
            if self.step % 25 == 0 or self.step == len(steps):
                self._note(length, loss.item(), prose, norm.item(), total)
                total.zero_()
            if self.step % SAVED_EVERY == 0 or self.step == len(steps):
                self.save()
        self.model.save_pretrained(self.folder / NAME)
        self.tokenizer.save_pretrained(self.folder / NAME)

    def _note(self, length: int, loss: float, prose: float | None, norm: float, total: torch.Tensor) -> None:
        line = {
            "step": self.step - 1,
            "length": length,
            "loss": round(loss, 4),
            "prose": None if prose is None else round(prose, 3),
            "norm": round(norm, 3),
            "seconds": round(time.time() - self._started, 1),
            "right": {tag: round((correct / n).item(), 3) for tag, n, correct in zip(TAGS, *total, strict=True) if n},
        }
        with self.log.open("a") as file:
            for place in (file, sys.stdout):
                print(json.dumps(line), file=place, flush=True)


def install(folder: Path) -> None:
    """Convert and quantize the trained model. Write the model, the log and the recipe to the package."""
    from swaa_edge.convert import hf
    from swaa_edge.demo import MODEL as TARGET

    TARGET.parent.mkdir(exist_ok=True)
    TARGET.unlink(missing_ok=True)
    hf.convert(folder / NAME, TARGET, outtype="f16", quantize=QUANTIZED, pre=PRE_TOKENIZER)
    shutil.copy(folder / "log.jsonl", TARGET.parent / "train-log.jsonl")
    recipe = {
        "seed": SEED,
        "model": MODEL,
        "curriculum": [dict(zip(("steps", "tokens", "batch_tokens"), stage, strict=True)) for stage in CURRICULUM],
        "rate": {"peak": PEAK_RATE, "warmup": WARMUP, "horizon": HORIZON, "decay": DECAY},
        "look_back": LOOK_BACK,
        "text": sources(),
    }
    (TARGET.parent / "train-recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = ROOT / "build" / "demo-model"
    parser.add_argument("--output", type=Path, default=output, metavar="DIR", help="output folder")
    parser.add_argument(
        "--install", action="store_true", help="only quantize the trained model and write it to swaa_edge/models"
    )
    args = parser.parse_args()
    if args.install:
        install(args.output)
    else:
        Training(args.output, SEED).run()


if __name__ == "__main__":
    main()
