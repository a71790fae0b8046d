"""The attention op by itself: random cases, their tensors, the result by definition, and the library's result.

A model's logits reveal little about one kernel. Here ggml's op is called without a model, for every cache type, head
size and mask that the kernels distinguish, and compared with the definition in double precision on the dequantized
cache.

    case = OpCase("q8_0", tokens=33); with Kernels(library_dir()) as ours: tensors = case.tensors(ours.quantize)
    error = nmse(ours.attend(case, tensors, threads=2), exact(case, tensors))
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, quants

from support.engine.protocol import ChildProcess

BLOCK = 256  # columns of a block of the block table
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
HEADS = ((40, 40), (64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (576, 512))
GROUPS = (1, 2, 4, 7, 16)
TOKENS = (1, 2, 3, 5, 8, 9, 17, 33, 75, 130)
COLUMNS = (1, 7, 63, 64, 65, 127, 255, 300, 513, 700)
BLOCKS = (1, 2, 5, 9)
MASKS = ("none", "one", "shared", "heads")
# Limits of a random case: flops of the op, values in its cache.
MAX_FLOPS, MAX_VALUES = 4e8, 4e6


@dataclass(frozen=True)
class OpCase:
    """One op.

    k, v: cache types. heads: KV heads, each with `group` query heads. columns: of K and V, unless a table of `blocks`
    blocks defines them. mask: per stream, "one" for all heads or one each ("heads"), or "shared" by all streams. blind:
    some rows see nothing. window: some rows see only the end. cells: "tokens", with the heads of a cell side by side as
    in llama.cpp's cache, or "heads", one after the other. v_in_k: V is the beginning of K's rows. large: values whose
    products overflow f16.
    """

    k: str = "f16"
    v: str = ""
    dk: int = 128
    dv: int = 128
    group: int = 2
    heads: int = 2
    tokens: int = 1
    columns: int = 300
    streams: int = 1
    blocks: int = 0
    mask: str = "one"
    blind: bool = False
    window: bool = False
    sinks: bool = False
    alibi: float = 0.0
    softcap: float = 0.0
    cells: str = "tokens"
    v_in_k: bool = False
    large: bool = False
    seed: int = 0

    def __str__(self) -> str:
        flags = [name for name in ("blind", "window", "sinks", "v_in_k", "large") if getattr(self, name)]
        flags += [f"{name}{getattr(self, name):g}" for name in ("alibi", "softcap") if getattr(self, name)]
        where = f"b{self.blocks}" if self.blocks else f"c{self.columns}"
        shape = f"d{self.dk}.{self.dv}-g{self.group}x{self.heads}-t{self.tokens}-{where}-s{self.streams}"
        return "-".join([self.k, self.v_type, shape, self.mask, *flags, self.cells, f"r{self.seed}"])

    @property
    def v_type(self) -> str:
        return self.v or self.k

    @property
    def n_columns(self) -> int:
        return self.blocks * BLOCK or self.columns

    @property
    def n_cells(self) -> int:
        return (self.blocks + 2) * BLOCK if self.blocks else self.columns

    @property
    def too_large(self) -> bool:
        per_cell = (self.dk + self.dv) * self.heads * self.streams
        flops = 2 * self.n_columns * per_cell * self.tokens * self.group
        return flops > MAX_FLOPS or self.n_cells * per_cell > MAX_VALUES

    def tensors(self, quantize: Callable[[str, np.ndarray], np.ndarray]) -> dict[str, np.ndarray | None]:
        """The op's inputs, from the seed alone.

        q float32 [S, T, H, DK]; k, v uint8 [S, cells, heads, bytes], or [S, heads, cells, bytes]; mask float16
        [S or 1, H or 1, T, columns]; sinks float32 [H]; table int32 [S, blocks]; None where the case has none.
        quantize(type, float32 [..., n]): the bytes of the last axis.
        """
        rng = np.random.default_rng(self.seed)
        n_heads = self.heads * self.group

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        lengths = (
            (1.0, 1e-4) if self.large else (0.5, 1.0, 2.0, 6.0)
        )  # of a row of Q: from flat weights to a single one
        q = normal(self.streams, self.tokens, n_heads, self.dk)
        q *= rng.choice(np.float32(lengths), (self.streams, self.tokens, n_heads, 1))
        cells = (self.n_cells, self.heads) if self.cells == "tokens" else (self.heads, self.n_cells)
        k, v = (normal(self.streams, *cells, n) for n in (self.dk, self.dv))
        if self.large:
            q, k, v = 60 * q, 60 * k, 100 + v
        made = {"q": q, "k": quantize(self.k, k), "v": None if self.v_in_k else quantize(self.v_type, v)}
        table = [rng.permutation(self.n_cells // BLOCK)[: self.blocks] for _ in range(self.streams)]
        made["table"] = np.array(table, np.int32) if self.blocks else None
        made["sinks"] = 3 * normal(n_heads) if self.sinks else None
        made["mask"] = None if self.mask == "none" else self._mask(rng)
        return made

    def _mask(self, rng: np.random.Generator) -> np.ndarray:
        n = self.n_columns
        if self.blocks > 1 and not self.blind:
            n -= BLOCK * rng.integers(0, self.blocks)  # columns beyond it are visible to all
        streams = 1 if self.mask == "shared" else self.streams
        shape = (streams, self.heads * self.group if self.mask == "heads" else 1, self.tokens, 1)
        column = np.arange(n)
        last = n - self.tokens + np.arange(self.tokens)[:, None] - rng.integers(0, 3, (*shape[:2], 1, 1))
        last = np.maximum(last, 0)
        first = np.zeros(shape, int)
        if self.window:
            first = rng.choice((0, n // 3, n - n // 4), shape)
        visible = (column <= last) & (column >= np.minimum(first, last))
        visible &= (rng.random(visible.shape) > 0.1) | (rng.random(shape) < 0.5)  # holes, in every other row
        if self.blind:
            rows = rng.random(shape) < 0.3
            rows.reshape(-1)[rng.integers(rows.size)] = True
            visible &= ~rows
        bias = np.minimum(last - column, 64) / 4 if self.alibi else 0.0
        return np.where(visible, -bias, -np.inf).astype(np.float16)


def deck(rng: random.Random, values: Sequence) -> Iterator:
    """The values endlessly, reshuffled each time all have been dealt, so that each occurs equally often."""
    while True:
        yield from rng.sample(values, len(values))


def random_cases(count: int) -> list[OpCase]:
    """`count` cases; each value of each field occurs equally often, in random combinations."""
    rng = random.Random("attention")
    flag = (False, True)
    fields = {
        "k": TYPES,
        "v": TYPES,
        "size": HEADS,
        "group": GROUPS,
        "heads": (1, 2, 3),
        "tokens": (*TOKENS, 1, 1, 2, 3),
        "columns": COLUMNS,
        "streams": (1, 1, 2, 3),
        "blocks": (0, 0, 0, 0, *BLOCKS),
        "mask": MASKS,
        "blind": (False, *flag),
        "window": flag,
        "cells": ("tokens", "heads"),
        "sinks": (False, *flag),
        "alibi": (0.0, 0.0, 8.0),
        "softcap": (0.0, 0.0, 20.0),
        "mixed": (False, *flag),
        "v_in_k": flag,
    }
    decks = {name: deck(rng, values) for name, values in fields.items()}
    return [_case(i, {name: next(values) for name, values in decks.items()}, decks) for i in range(count)]


def _case(seed: int, drawn: dict, decks: dict[str, Iterator]) -> OpCase:
    mixed, (dk, dv) = drawn.pop("mixed"), drawn.pop("size")
    whole_blocks = dk % 32 == 0  # other head sizes only fit types without blocks
    for name in ("k", "v"):
        while not whole_blocks and drawn[name] not in ("f32", "f16", "bf16"):
            drawn[name] = next(decks[name])
    if not mixed:
        drawn["v"] = ""
    drawn["v_in_k"] &= dk == 576 and not drawn["v"]
    if drawn["mask"] == "none":
        drawn |= {"blocks": 0, "blind": False, "window": False, "alibi": 0.0}
    case = OpCase(dk=dk, dv=dv, seed=seed, **drawn)
    for smaller in ({"heads": 1}, {"streams": 1}, {"blocks": min(case.blocks, 2), "columns": min(case.columns, 127)}):
        if case.too_large:
            case = replace(case, **smaller)
    return case


def dequantized(kind: str, raw: np.ndarray) -> np.ndarray:
    """The float64 values of the bytes [..., n]."""
    return quants.dequantize(raw, GGMLQuantizationType[kind.upper()]).astype(np.float64)


def exact(case: OpCase, tensors: dict[str, np.ndarray | None]) -> np.ndarray:
    """Attention by its definition, in double precision: float64 [S, T, H, DV]."""
    k = dequantized(case.k, tensors["k"])
    v = k[..., : case.dv] if case.v_in_k else dequantized(case.v_type, tensors["v"])
    if case.cells == "tokens":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    q, mask, sinks = tensors["q"].astype(np.float64), tensors["mask"], tensors["sinks"]
    n_heads = case.heads * case.group
    out = np.zeros((case.streams, case.tokens, n_heads, case.dv))
    for s, h in itertools.product(range(case.streams), range(n_heads)):
        rows = np.arange(case.n_columns)
        if case.blocks:
            rows = tensors["table"][s][rows // BLOCK] * BLOCK + rows % BLOCK
        scores = q[s, :, h] @ k[s, h // case.group, rows].T * scale(case)
        if case.softcap:
            scores = case.softcap * np.tanh(scores / case.softcap)
        if mask is not None:
            part = mask[s % mask.shape[0], h % mask.shape[1]].astype(np.float64)
            scores[:, : part.shape[1]] += slope(case, h) * part
        top = scores.max(1, keepdims=True)
        if sinks is not None:
            top = np.maximum(top, sinks[h])
        weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
        total = weights.sum(1, keepdims=True)
        if sinks is not None:
            total += np.exp(sinks[h] - top)
        out[s, :, h] = weights @ v[s, h // case.group, rows] / np.where(total > 0, total, 1.0)
    return out


def rounded_to_8_bits(case: OpCase, tensors: dict[str, np.ndarray | None]) -> dict[str, np.ndarray | None]:
    """The tensors with Q in blocks of 32 as the products with 8-bit K use it: integers up to 127, times a scale."""
    q = tensors["q"].reshape(-1, 32)
    largest = np.abs(q).max(axis=1, keepdims=True)
    times = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    rounded = np.rint(q * times) * (largest / np.float32(127))
    return tensors | {"q": rounded.astype(np.float32).reshape(tensors["q"].shape)}


def sees_nothing(case: OpCase, tensors: dict[str, np.ndarray | None]) -> np.ndarray:
    """Rows for which the mask hides every column: bool [S, T, H]."""
    shape, mask = (case.streams, case.heads * case.group, case.tokens), tensors["mask"]
    if mask is None or mask.shape[-1] < case.n_columns:
        return np.zeros(shape, bool).swapaxes(1, 2)
    return np.broadcast_to(np.isneginf(mask).all(-1), shape).swapaxes(1, 2)


def without_table(case: OpCase, tensors: dict[str, np.ndarray | None]) -> tuple[OpCase, dict[str, np.ndarray | None]]:
    """The same op over the rows that the table lists, for kernels that read none."""
    if not case.blocks:
        return case, tensors
    columns = np.arange(case.n_columns)
    rows = tensors["table"][:, columns // BLOCK] * BLOCK + columns % BLOCK
    axis = 1 if case.cells == "tokens" else 2
    gathered = dict(tensors, table=None)
    for name in ("k", "v"):
        if tensors[name] is not None:
            gathered[name] = np.stack([x.take(r, axis - 1) for x, r in zip(tensors[name], rows, strict=True)])
    mask = tensors["mask"]
    if mask is not None:
        gathered["mask"] = np.pad(mask, [(0, 0)] * 3 + [(0, case.n_columns - mask.shape[-1])])
    return replace(case, blocks=0, columns=case.n_columns), gathered


def scale(case: OpCase) -> float:
    """The factor of q.k, in the precision of the op's parameter."""
    return float(np.float32(case.dk**-0.5))


def slope(case: OpCase, head: int) -> float:
    """ALiBi's factor: a geometric series over the largest power of two of heads, every other step for the rest."""
    if not case.alibi:
        return 1.0
    whole = 2 ** ((case.heads * case.group).bit_length() - 1)
    step = head + 1 if head < whole else head - whole + 0.5
    return 2.0 ** (-case.alibi * step / whole)


def nmse(got: np.ndarray, expected: np.ndarray) -> float:
    """Squared error divided by the squares of the expected values; infinite if a value is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    error, size = np.sum((got - expected) ** 2), np.sum(expected**2)
    return float(error / size) if size else float("inf") if error else 0.0


class Kernels(ChildProcess):
    """A child process that runs the op with the library of one folder. own: with our kernels, else upstream's."""

    module = "support.engine.attention_child"

    def __init__(self, library: Path, own: bool = True):
        super().__init__(library)
        self.own = own

    def command(self) -> tuple[list[str], dict[str, str]]:
        return [str(self.library.resolve())], {"GGML_CPU_FATTN": str(int(self.own))}

    def quantize(self, kind: str, values: np.ndarray) -> np.ndarray:
        """Quantize float32 [..., n] to the type's uint8 [..., bytes of a row]."""
        return self.request("quantize", kind, values)["raw"]

    def attend(self, case: OpCase, tensors: dict, threads: int, runs: int = 1) -> list[np.ndarray]:
        """The op's result in each of `runs` runs: float32 [S, T, H, DV]."""
        return self.request("attend", asdict(case) | {"scale": scale(case)}, tensors, threads, runs)["out"]

    def supports(self, case: OpCase, tensors: dict) -> bool:
        """Whether the CPU backend takes the op."""
        return self.request("attend", asdict(case) | {"scale": scale(case)}, tensors, 1, 1)["supported"]
