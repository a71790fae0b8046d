"""The oracle with a memory: K and V of each token stay as they were computed when it was evaluated.

support/oracle/oracle.py computes a history in one pass, which is correct as long as nothing is removed, moved or
copied. Here every token that was ever evaluated is an entry: its K before RoPE and its V, per layer. A sequence is a
list of (entry, position); new tokens attend to it under the rule of the design, and every cache operation only changes
the list.

Use: `pool = EntryPool(model, rule); logits, entries = pool.evaluate([Part(past=(), tokens=(5, 9), start=0)])`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from support.oracle.oracle import attention_modules, forward_with, visible
from support.oracle.rule import Rule


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one sequence. past: its (entry, position) so far; start: the first token's position."""

    past: Sequence[tuple[int, int]]
    tokens: Sequence[int]
    start: int
    is_decode: bool = False


class EntryPool:
    """All entries of one model under one rule. Keys and values are float32 [layers, entries, kv heads, head size]."""

    def __init__(self, model, rule: Rule):
        self.model, self.rule = model, rule
        config = model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layers = len(attention_modules(model))
        shape = (self.layers, 1024, config.num_key_value_heads, head)
        self.keys, self.values, self.count = torch.empty(shape), torch.empty(shape), 0
        cos, sin = self._angles(torch.tensor([0]))
        if cos.shape[-1] != head or not (cos == 1).all() or sin.any():
            raise ValueError("this model doesn't rotate whole heads, or scales them too")

    def evaluate(self, parts: Sequence[Part]) -> tuple[list[np.ndarray], list[list[int]]]:
        """Evaluate the parts, which do not see each other, in one pass.

        Returns per part its logits, float32 [tokens, vocab], and its new entries.
        """
        entries = torch.tensor([entry for part in parts for entry, _ in part.past], dtype=torch.long)
        kept = torch.tensor([position for part in parts for _, position in part.past], dtype=torch.long)
        new = torch.cat([torch.arange(len(part.tokens)) + part.start for part in parts])
        tokens = [token for part in parts for token in part.tokens]
        cache = DynamicCache()
        if len(kept):
            keys, values = self.rotate(self.keys[:, entries], kept), self.values[:, entries]
            for layer in range(self.layers):
                cache.update(keys[layer].transpose(0, 1)[None], values[layer].transpose(0, 1)[None], layer)
        logits = forward_with(self.model, tokens, self._masks(parts, len(kept)), new, cache).numpy()
        first = self._append(cache, new)
        out, made, row = [], [], 0
        for part in parts:
            end = row + len(part.tokens)
            out.append(logits[row:end])
            made.append(list(range(first + row, first + end)))
            row = end
        return out, made

    def rotate(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """RoPE for keys [layers, n, heads, head size] at positions [n]; negative positions undo it."""
        cos, sin = (x[:, None] for x in self._angles(positions))
        half = keys.shape[-1] // 2
        return keys * cos + torch.cat((-keys[..., half:], keys[..., :half]), dim=-1) * sin

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.model.model.rotary_emb(torch.zeros(1), positions[None])
        return cos[0], sin[0]

    def _masks(self, parts: Sequence[Part], n_past: int) -> list[torch.Tensor]:
        """Per layer bool [new tokens, past and new tokens]; columns: every part's past, then every part's tokens."""
        made: dict[tuple[bool, bool], torch.Tensor] = {}
        masks = []
        rows = sum(len(part.tokens) for part in parts)
        for layer, flags in enumerate(zip(self.rule.sliding, self.rule.fa_decode, strict=True)):
            if flags not in made:
                mask, column, row = torch.zeros(rows, n_past + rows, dtype=torch.bool), 0, 0
                for part in parts:
                    old, n = len(part.past), len(part.tokens)
                    positions = [position for _, position in part.past] + [part.start + i for i in range(n)]
                    decode = torch.full((old + n,), part.is_decode)
                    seen = visible(torch.tensor(positions), decode, self.rule, layer)[old:]
                    mask[row : row + n, column : column + old] = seen[:, :old]
                    mask[row : row + n, n_past + row : n_past + row + n] = seen[:, old:]
                    column, row = column + old, row + n
                made[flags] = mask
            masks.append(made[flags])
        return masks

    def _append(self, cache, positions: torch.Tensor) -> int:
        """Store the last len(positions) rows of the cache; returns the first one's entry."""
        n, first = len(positions), self.count
        while first + n > self.keys.shape[1]:
            self.keys = torch.cat((self.keys, torch.empty_like(self.keys)), dim=1)
            self.values = torch.cat((self.values, torch.empty_like(self.values)), dim=1)
        keys = torch.stack([layer.keys[0, :, -n:].transpose(0, 1) for layer in cache.layers])
        self.keys[:, first : first + n] = self.rotate(keys, -positions)
        self.values[:, first : first + n] = torch.stack([x.values[0, :, -n:].transpose(0, 1) for x in cache.layers])
        self.count += n
        return first
