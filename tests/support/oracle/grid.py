"""Random cases of SWAA on tiny models, and how they are fed to the engine.

A case is one line of text, so that a failure can be run again by pasting it:

    qwen3/4 W31 S4 T9 s1011 d0100 f16 table b512 u97 t1 p300+4,33+2 unified auto r17

architecture/layers, window, sinks, tail if any, sliding and FA-decode flags per layer, KV type, policy, n_batch,
n_ubatch, threads, prompt+decode tokens per sequence, one cache for all sequences or a stream each, decode boundaries
(found by the engine or set), seed of tokens and schedule.

Use: `case = Case.parse(line)` or `random_case(17)`; `schedule(case).steps` are what `Engine.run` takes.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from support.oracle.rule import Rule

VOCAB = 768
MAX_PROMPT = 1400
# Approximate total of the prompts of a case: the oracle's time grows with it.
MAX_ROWS = 1400
# Under half-precision noise random routers flip experts in a few rows, so these are judged by percentiles.
MOE = ("qwen3moe", "mixtral")
# A KV type of blocks of 32 can't hold rows that 32 doesn't divide; these have heads of 80.
NO_Q8 = ("stablelm",)
# (architecture, layers). The architectures that the converter supports officially have two depths.
POOL = (
    ("llama", 2),
    ("llama", 4),
    ("mistral", 3),
    ("mistral", 5),
    ("qwen2", 2),
    ("qwen2", 4),
    ("qwen3", 3),
    ("qwen3", 4),
    ("qwen3moe", 2),
    ("qwen3moe", 3),
    ("phi3", 3),
    ("granite", 4),
    ("olmo2", 3),
    ("gemma", 2),
    ("glm4", 3),
    ("stablelm", 3),
    ("starcoder2", 3),
    ("smollm3", 4),
    ("mixtral", 2),
)

_LINE = re.compile(
    r"(?P<arch>\w+)/(?P<layers>\d+) W(?P<window>\d+) S(?P<sinks>\d+)( T(?P<tail>\d+))? s(?P<sliding>[01]+) "
    r"d(?P<fa_decode>[01]+) (?P<kv>\w+) (?P<policy>\w+) b(?P<n_batch>\d+) u(?P<n_ubatch>\d+) t(?P<threads>\d+) "
    r"p(?P<sequences>[\d+,]+) (?P<cache>unified|streams) (?P<boundary>auto|explicit) r(?P<seed>\d+)"
)


def round_up(n: int) -> int:
    """To whole blocks of 256 cells, as llama.cpp does; written down here once more, for independence."""
    return -(-n // 256) * 256


@dataclass(frozen=True)
class Case:
    """One case; sliding and fa_decode are strings of 0 and 1, sequences is (prompt, decode) token counts."""

    arch: str
    layers: int
    window: int
    sinks: int
    tail: int
    sliding: str
    fa_decode: str
    kv: str
    policy: str
    n_batch: int
    n_ubatch: int
    threads: int
    sequences: tuple[tuple[int, int], ...]
    cache: str
    boundary: str
    seed: int

    def __str__(self) -> str:
        lengths = ",".join(f"{prompt}+{decode}" for prompt, decode in self.sequences)
        tail = f" T{self.tail}" if self.tail else ""
        return (
            f"{self.arch}/{self.layers} W{self.window} S{self.sinks}{tail} s{self.sliding} d{self.fa_decode} {self.kv} "
            f"{self.policy} b{self.n_batch} u{self.n_ubatch} t{self.threads} p{lengths} {self.cache} {self.boundary} "
            f"r{self.seed}"
        )

    @staticmethod
    def parse(line: str) -> Case:
        """The case a line describes; ValueError if it isn't one."""
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"not a case: {line!r}; see the docstring of support/oracle/grid.py")
        fields = match.groupdict(default="0")
        for name in ("layers", "window", "sinks", "tail", "n_batch", "n_ubatch", "threads", "seed"):
            fields[name] = int(fields[name])
        pairs = [pair.split("+") for pair in fields["sequences"].split(",")]
        fields["sequences"] = tuple((int(prompt), int(decode)) for prompt, decode in pairs)
        return Case(**fields)

    @property
    def rule(self) -> Rule:
        return Rule.of(self.window, self.sinks, self.sliding, self.fa_decode)

    @property
    def overrides(self) -> dict:
        """The overrides that give an unannotated file this case's configuration."""
        return self.rule.overrides

    @property
    def settings(self) -> dict:
        """The engine's settings, with a context just large enough."""
        lengths = [prompt + decode for prompt, decode in self.sequences]
        unified = self.cache == "unified"
        return {
            "n_ctx": round_up(sum(lengths)) if unified else round_up(max(lengths)) * len(lengths),
            "n_batch": self.n_batch,
            "n_ubatch": self.n_ubatch,
            "sequences": len(lengths),
            "threads": self.threads,
            "kv": self.kv,
            "flash_attn": self.policy != "dense",
            "unified": unified,
            "policy": self.policy,
        }


@dataclass
class Schedule:
    """How a case is fed: per sequence tokens, decode flags and decode boundary (none: AUTO), and the batches."""

    tokens: list[list[int]]
    is_decode: list[list[bool]]
    boundaries: list[int]
    batches: list[list[tuple]]

    @property
    def steps(self) -> list[tuple]:
        return [("decode_from", *pair) for pair in enumerate(self.boundaries)] + [("decode", b) for b in self.batches]


def schedule(case: Case) -> Schedule:
    """The case's tokens and batches, from its seed alone. A batch holds any mix of sequences.

    auto: a sequence with a single token in the batch is decoding, as AUTO defines; there is no tail.
    explicit: each sequence has its decode boundary, so chunks of a prompt may have one token and drafts several.
    """
    rng = random.Random(case.seed)
    n = len(case.sequences)
    tokens = [[rng.randrange(6, VOCAB) for _ in range(p + d)] for p, d in case.sequences]
    explicit, boundaries = case.boundary == "explicit", [max(p - case.tail, 0) for p, _ in case.sequences]
    fed = Schedule(tokens, [[] for _ in range(n)], boundaries if explicit else [], [])
    greedy = rng.random() < 0.7  # whole batches, as a caller would cut a prompt; else chunks of any size
    done = [0] * n
    while remaining := [s for s in range(n) if done[s] < len(fed.tokens[s])]:
        in_prompt = {s: done[s] < case.sequences[s][0] for s in remaining}
        if len(remaining) > 1 and rng.random() < 0.3:
            remaining = rng.sample(remaining, rng.randrange(1, len(remaining)))
        rng.shuffle(remaining)
        room, counts = case.n_batch, {}
        for k, s in enumerate(remaining):
            left = case.sequences[s][0] - done[s] if in_prompt[s] else len(fed.tokens[s]) - done[s]
            drafted = rng.choice((1, 1, 2, 3)) if explicit else 1
            limit = min(left, room - (len(remaining) - 1 - k), case.n_batch if in_prompt[s] else drafted)
            if limit < 1:
                continue
            counts[s] = limit if greedy or not in_prompt[s] else rng.randrange(1, limit + 1)
            room -= counts[s]
        parts = []
        for s, count in counts.items():
            fed.is_decode[s] += [
                i >= boundaries[s] if explicit else count == 1 for i in range(done[s], done[s] + count)
            ]
            parts.append([(fed.tokens[s][i], i, (s,), True) for i in range(done[s], done[s] + count)])
            done[s] += count
        if rng.random() < 0.5:
            batch = [entry for part in parts for entry in part]
        else:  # the sequences' tokens alternate
            batch = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
        fed.batches.append(batch)
    return fed


def random_case(seed: int) -> Case:
    """Case number `seed` of the grid, with windows, sinks and lengths biased towards edge cases."""
    rng = random.Random(f"grid {seed}")
    arch, layers = rng.choice(POOL)
    policy = rng.choice(("table", "table", "table", "table", "copy", "copy", "dense"))
    if policy == "dense":
        # Without flash attention V can't be quantized; f32 there is the sharpest comparison of all.
        kv = rng.choice(("f32", "f16"))
    else:
        kv = "f16" if arch in NO_Q8 else rng.choice(("f16", "f16", "q8_0"))
    window = rng.choice((1, 2, 7, 31, 64, 255, 256, 257, 512, rng.randint(1, 700)))
    sinks = rng.choice((0, 0, 1, 4, 64, 255, 256, 257, 300))
    n_batch = rng.choice((32, 97, 256, 512, 512, 1024))
    n_ubatch = min(n_batch, rng.choice((16, 32, 64, 97, 128, 512, 512)))
    boundary = rng.choice(("auto", "explicit", "explicit"))
    tail = rng.choice((0, 0, 1, 2, 16, 64, 255, 257, rng.randint(1, 500)))
    sequences, room = [], MAX_ROWS
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        edge = rng.choice(
            (window - 1, window, window + 1, window + sinks + 1, n_batch + 1, n_ubatch + 1, 256, 257, 513)
        )
        # The engine leaves out blocks only if the cache is longer than a batch can see.
        prompt = rng.choice(
            (edge, edge, rng.randint(1, 400), rng.randint(600, MAX_PROMPT), rng.randint(800, MAX_PROMPT))
        )
        sequences.append((min(max(prompt, 1), MAX_PROMPT, room), rng.choice((0, 1, 3, 12))))
        room = max(room - prompt, 40)
    if arch in MOE and sum(map(sum, sequences)) < 300:  # a percentile needs rows
        sequences[0] = (rng.randint(300, 800), sequences[0][1])
    return Case(
        arch,
        layers,
        window,
        sinks,
        tail if boundary == "explicit" else 0,
        "".join(rng.choice("0111") for _ in range(layers)),
        rng.choice(("0" * layers, "1" * layers, "".join(rng.choice("01") for _ in range(layers)))),
        kv,
        policy,
        n_batch,
        n_ubatch,
        rng.choice((1, 1, 1, 2)),
        tuple(sequences),
        rng.choice(("unified", "streams")),
        boundary,
        seed,
    )
