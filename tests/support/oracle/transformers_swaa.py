"""SWAA in transformers held against the oracle: batches, padded on either side, and packed sequences.

check_batch("qwen3", RULE, "left", seed=1, train=False)
"""

import copy

import numpy as np
import torch

from support.models import tiny_model
from support.oracle.oracle import oracle_logits
from support.oracle.rule import Rule
from swaa_edge import SwaaConfig, hf

LAYERS = 4


#: FA, sliding, sliding with FA decode.
RULE = Rule(7, 3, (True, False, True, True), (True, False, False, True))


def config_of(rule: Rule, tail: int = 0) -> SwaaConfig:
    fa, decode = (
        [i for i, flag in enumerate(flags) if flag] for flags in ([not s for s in rule.sliding], rule.fa_decode)
    )
    return SwaaConfig(rule.window, rule.sinks, fa or "none", decode or False, tail)


def with_tail(generated: list[bool], tail: int) -> list[bool]:
    """The tokens of a sequence that see everything: generated ones, and those up to `tail` tokens before one."""
    return [any(generated[at : at + tail + 1]) for at in range(len(generated))]


def adapted(arch: str, rule: Rule = RULE, attention: str = "swaa", tail: int = 0):
    """A copy, so that the oracle's model keeps its own attention."""
    model = copy.deepcopy(tiny_model(arch, seed=8, layers=LAYERS))
    hf.apply(model, config_of(rule, tail), attention=attention)
    return model


def some_tokens(rng, count: int) -> list[int]:
    return rng.integers(6, 768, count).tolist()


def padded(sequences: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, sequences)) + 2
    rows, mask = [], []
    for tokens in sequences:
        fill = [0] * (width - len(tokens))
        rows.append(fill + tokens if side == "left" else tokens + fill)
        real = [1] * len(tokens)
        mask.append(fill + real if side == "left" else real + fill)
    return torch.tensor(rows), torch.tensor(mask)


def error_of(got: torch.Tensor, expected: np.ndarray) -> float:
    return np.abs(got.detach().float().cpu().numpy() - expected).max() / expected.std()


def check_batch(
    arch: str, rule: Rule, side: str, seed: int, train: bool, attention: str = "swaa", *,
    lengths: tuple[int, int] = (5, 60), device: str = "cpu", limit: float = 1e-4, tail: int = 0, turns: bool = False,
) -> None:  # fmt: skip
    """turns: each sequence has three generated tokens in every eleven, besides those of the answer at its end."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(*lengths, 3)
    sequences = [some_tokens(rng, n) for n in counts]
    prompts = [int(rng.integers(1, n + 1)) for n in counts]
    tokens, mask = (tensor.to(device) for tensor in padded(sequences, side))
    model = adapted(arch, rule, attention, tail).to(device).train(train)
    generated = hf.decode_mask(prompts, mask)
    if turns:
        generated |= mask.bool() & (mask.cumsum(1) % 11 < 3)
    with torch.set_grad_enabled(train):
        logits = model(tokens, attention_mask=mask, decode_mask=generated).logits
    plain = tiny_model(arch, seed=8, layers=LAYERS)
    for row, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        real = mask[row].bool()
        expected = oracle_logits(plain, sequence, with_tail(generated[row][real].tolist(), tail), rule)
        assert error_of(logits[row][real], expected) < limit, (row, prompt)


def check_packed(
    rule: Rule, counts: tuple[int, ...], prompts: tuple[int, ...], attention: str = "swaa", *,
    device: str = "cpu", limit: float = 1e-4, tail: int = 0,
) -> None:  # fmt: skip
    rng = np.random.default_rng(10)
    sequences = [some_tokens(rng, n) for n in counts]
    positions = torch.tensor([[p for s in sequences for p in range(len(s))]], device=device)
    flags = [[p >= n for s, n in zip(sequences, prompts, strict=True) for p in range(len(s))]]
    model = adapted("qwen3", rule, attention, tail).to(device)
    tokens = torch.tensor([[token for sequence in sequences for token in sequence]], device=device)
    asked = {"position_ids": positions, "decode_mask": torch.tensor(flags, device=device), "use_cache": False}
    with torch.no_grad():
        logits = model(tokens, **asked).logits[0]
    plain, start = tiny_model("qwen3", seed=8, layers=LAYERS), 0
    for sequence, prompt in zip(sequences, prompts, strict=True):
        generated = [p >= prompt for p in range(len(sequence))]
        expected = oracle_logits(plain, sequence, with_tail(generated, tail), rule)
        assert error_of(logits[start : start + len(sequence)], expected) < limit
        start += len(sequence)
