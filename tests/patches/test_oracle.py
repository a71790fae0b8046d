"""The oracle against references that need no oracle, and the engine against the oracle over a grid of random cases.

pytest tests/patches/test_oracle.py                                          all
pytest tests/patches/test_oracle.py -k case17-                               one case of the grid
SWAA_CASE="qwen3/4 W31 S4 ..." pytest tests/patches/test_oracle.py -k given  a case by its line, as a failure prints it
SWAA_GRID_CASES=40 pytest tests/patches/test_oracle.py -k grid               the first 40 cases only

How a case is fed is in support/oracle/grid.py; how it is measured and judged, in support/oracle/verdict.py.
"""

import os
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from support.models import FAMILIES, tiny_model
from support.oracle import oracle, verdict
from support.oracle.grid import MOE, POOL, Case, random_case, schedule
from support.oracle.oracle import oracle_logits
from support.oracle.rule import Rule

GRID_SIZE = 240
REQUIRED_SIZE = 200
MOE_F16 = ("qwen3moe", "f16")
GRID = [random_case(seed) for seed in range(int(os.environ.get("SWAA_GRID_CASES", GRID_SIZE)))]


# The oracle itself. None of this needs the engine.


def test_visible_as_written_down():
    # W 2, S 1, five tokens of which the last two were generated; rows are queries, columns keys.
    rule = Rule(2, 1, (True, True, False), (False, True, False))
    positions, is_decode = torch.arange(5), torch.tensor([False, False, False, True, True])
    table = ["".join("x" if seen else "." for seen in row) for row in oracle.visible(positions, is_decode, rule, 0)]
    assert table == ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]
    table = ["".join("x" if seen else "." for seen in row) for row in oracle.visible(positions, is_decode, rule, 1)]
    assert table == ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]
    assert torch.equal(oracle.visible(positions, is_decode, rule, 2), torch.ones(5, 5).tril().bool())


def allowed(p: int, j: int, decode: bool, rule: Rule, layer: int) -> bool:
    """The rule of the design for one pair, in words that Python shares with it."""
    if j > p:
        return False
    if not rule.sliding[layer]:
        return True
    return p - j < rule.window or j < rule.sinks or (rule.fa_decode[layer] and decode)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 1), (4, 0), (4, 3), (13, 2), (40, 1), (2, 40)])
def test_visible_is_the_rule_pair_by_pair(window, sinks):
    rng = np.random.default_rng(window)
    rule = Rule(window, sinks, (True, True, False, False), (False, True, False, True))
    positions = np.arange(30) + 5  # a sequence whose beginning was removed
    decode = rng.random(30) < 0.3
    for layer in range(4):
        seen = oracle.visible(torch.tensor(positions), torch.tensor(decode), rule, layer)
        for q, p in enumerate(positions):
            for k, j in enumerate(positions):
                assert bool(seen[q, k]) == allowed(p, j, decode[q], rule, layer), (layer, p, j)


@pytest.mark.parametrize("arch", FAMILIES)
def test_full_rule_is_the_models_own_attention(arch):
    model = tiny_model(arch, seed=3, layers=2)
    tokens = np.random.default_rng(3).integers(6, 768, 50).tolist()
    ours = oracle_logits(model, tokens, [False] * 50, Rule.full(2))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(ours - theirs).max() < 1e-4 * theirs.std()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "glm4"])
def test_one_pass_is_the_step_by_step_definition(arch):
    # A KV cache fed chunk by chunk and token by token, its mask built pair by pair: what an engine does.
    model = tiny_model(arch, seed=4, layers=3)
    rule = Rule(7, 2, (True, False, True), (True, False, False))
    tokens = np.random.default_rng(4).integers(6, 768, 40).tolist()
    chunks = [
        (0, 20, False),
        (20, 21, False),
        (21, 33, False),
        *[(i, i + 1, True) for i in range(33, 38)],
        (38, 40, True),
    ]
    cache, rows, is_decode = DynamicCache(), [], []
    for start, end, decode in chunks:
        masks = [
            torch.tensor([[allowed(p, j, decode, rule, layer) for j in range(end)] for p in range(start, end)])
            for layer in range(3)
        ]
        rows.append(oracle.forward_with(model, tokens[start:end], masks, torch.arange(start, end), cache))
        is_decode += [decode] * (end - start)
    stepwise = torch.cat(rows).numpy()
    at_once = oracle_logits(model, tokens, is_decode, rule)
    assert np.abs(stepwise - at_once).max() < 1e-4 * at_once.std()


def test_the_oracle_tells_rules_apart():
    # If the mask didn't reach a layer, the comparisons with the engine would compare full attention with itself.
    model = tiny_model("qwen3", seed=5, layers=3)
    tokens = np.random.default_rng(5).integers(6, 768, 60).tolist()
    is_decode = [False] * 50 + [True] * 10
    right = Rule(9, 2, (True, False, True), (True, False, False))
    logits = oracle_logits(model, tokens, is_decode, right)
    for wrong in (
        replace(right, window=10),
        replace(right, window=8),
        replace(right, sinks=3),
        replace(right, sinks=1),
        replace(right, sliding=(True, True, True)),
        replace(right, sliding=(True, False, False)),
        replace(right, fa_decode=(False, False, False)),
        replace(right, fa_decode=(True, False, True)),
    ):
        error = np.abs(oracle_logits(model, tokens, is_decode, wrong) - logits).max() / logits.std()
        assert error > 5 * verdict.WORST_F16, wrong


# The judge.


def test_what_is_too_far():
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((400, 50)).astype(np.float32)
    is_decode = np.arange(400) >= 380
    case = GRID[0]
    dense, f16, q8, moe = (
        replace(case, arch=arch, kv=kv) for arch, kv in (("llama", "f32"), ("llama", "f16"), ("llama", "q8_0"), MOE_F16)
    )

    def verdicts(change) -> list[bool]:
        got = logits.copy()
        change(got)
        figures = verdict.compare(logits, got, is_decode)
        plain = replace(figures, worst=0.2, p95=0.12, kl=1e-3)
        return [not verdict.problems(c, figures, plain) for c in (dense, f16, q8, moe)]

    def one_row(by, row=200):
        def change(got):
            got[row, 3] += by

        return change

    assert verdicts(one_row(0.0)) == [True, True, True, True]
    assert verdicts(one_row(0.02)) == [False, True, True, True]
    assert verdicts(one_row(0.2)) == [False, False, True, True]
    assert verdicts(one_row(0.5)) == [False, False, False, True]
    assert verdicts(one_row(float("nan"))) == [False] * 4
    # A mixture of experts may lose a few rows, but neither a tenth of all nor the decode tokens.
    assert verdicts(one_row(0.5, slice(0, 40))) == [False] * 4
    assert verdicts(one_row(0.5, slice(385, 400))) == [False] * 4


# The grid's own honesty.


def test_a_case_is_its_line():
    for case in GRID:
        assert Case.parse(str(case)) == case


@pytest.mark.parametrize("case", GRID[:60], ids=lambda case: f"case{case.seed}")
def test_a_schedule_feeds_each_token_once_and_in_order(case):
    fed = schedule(case)
    seen = defaultdict(list)
    for batch in fed.batches:
        assert 1 <= len(batch) <= case.n_batch
        counts = defaultdict(int)
        for _, _, (seq,), _ in batch:
            counts[seq] += 1
        for token, position, (seq,), _ in batch:
            assert token == fed.tokens[seq][position]
            assert fed.is_decode[seq][position] == (
                position >= fed.boundaries[seq] if fed.boundaries else counts[seq] == 1
            )
            seen[seq].append(position)
    assert [seen[s] for s in range(len(fed.tokens))] == [list(range(p + d)) for p, d in case.sequences]


def test_the_grid_covers_what_it_should():
    grid = [random_case(seed) for seed in range(GRID_SIZE)]
    assert len(grid) >= REQUIRED_SIZE
    assert {(case.arch, case.layers) for case in grid} == set(POOL)
    assert {case.arch for case in grid} == set(FAMILIES)
    for field, values in {
        "window": (1, 2, 255, 256, 257),
        "sinks": (0, 1, 255, 256, 257, 300),
        "kv": ("f16", "f32", "q8_0"),
        "policy": ("table", "copy", "dense"),
        "cache": ("unified", "streams"),
        "boundary": ("auto", "explicit"),
        "tail": (0, 1, 16, 64),
    }.items():
        for value in values:
            assert sum(getattr(case, field) == value for case in grid) >= 10, (field, value)
    edges = {length - case.window for case in grid for length, _ in case.sequences}
    assert {-1, 0, 1} <= edges
    for wanted in (
        lambda c: c.window < c.n_ubatch,
        lambda c: any(length == c.n_batch + 1 for length, _ in c.sequences) and c.boundary == "explicit",
        lambda c: len(c.sequences) > 1 and c.cache == "unified",
        lambda c: len(c.sequences) > 1 and c.cache == "streams",
        lambda c: "0" in c.sliding and "1" in c.sliding,
        lambda c: "0" in c.fa_decode and "1" in c.fa_decode,
        lambda c: max(length for length, _ in c.sequences) > 1200,
        lambda c: c.tail > c.n_ubatch and "1" in c.fa_decode,
        lambda c: c.tail and len(c.sequences) > 1 and c.cache == "unified" and "1" in c.fa_decode,
        lambda c: c.tail and len(c.sequences) > 1 and c.cache == "streams" and "1" in c.fa_decode,
    ):
        assert sum(map(wanted, grid)) >= 5
    assert sum(map(leaves_blocks_out, grid)) >= 60


def leaves_blocks_out(case: Case) -> bool:
    """Whether some prefill batch sees, by the rule alone, less than half of a long cache."""
    cells = max(length for length, _ in case.sequences)
    return "1" in case.sliding and cells > 768 and case.window + case.sinks + case.n_ubatch < cells / 2


# The engine against the oracle.

measured: dict[str, list[tuple[Case, verdict.Figures, verdict.Figures | None]]] = defaultdict(list)


@pytest.mark.native
@pytest.mark.parametrize("case", GRID, ids=lambda case: f"case{case.seed}-{str(case).replace(' ', '_')}")
def test_grid(engine, zoo, case):
    judge(engine, zoo, case)


@pytest.mark.native
@pytest.mark.skipif("SWAA_CASE" not in os.environ and "CI" not in os.environ, reason="SWAA_CASE names no case")
def test_given_case(engine, zoo):
    judge(engine, zoo, Case.parse(os.environ.get("SWAA_CASE", str(GRID[0]))))


def judge(engine, zoo, case):
    figures, plain = verdict.measure(engine, zoo, case), verdict.yardstick(engine, zoo, case)
    measured[f"{case.kv}{' experts' if case.arch in MOE else ''}"].append((case, figures, plain))
    found = verdict.problems(case, figures, plain)
    assert not found, f"{'; '.join(found)}\n  SWAA_CASE={str(case)!r}\n  {figures}\n  full attention: {plain}"


# Would it fail? The engine gets a configuration that is wrong by one, the oracle the right one.

SENSITIVE = [
    Case.parse(line)
    for line in (
        "llama/4 W31 S4 T5 s1011 d1001 f16 table b512 u97 t1 p900+12 unified explicit r1",
        "qwen3/4 W256 S257 T100 s1101 d0101 f16 copy b256 u64 t1 p700+8,300+12 streams explicit r2",
        "qwen2/2 W64 S255 T1 s11 d01 q8_0 table b512 u128 t1 p600+12 unified explicit r3",
        "mistral/3 W257 S1 T0 s111 d010 f32 dense b512 u512 t1 p500+4,400+4 unified explicit r4",
        "qwen3moe/2 W2 S3 T40 s11 d10 f16 table b512 u512 t1 p500+200 unified explicit r5",
    )
]


def flipped(text: str, i: int) -> str:
    return text[:i] + "10"[int(text[i])] + text[i + 1 :]


def mutants(case: Case) -> dict[str, Case]:
    """Configurations that are wrong by one, by name; none that means the same."""
    found = {
        "window one more": replace(case, window=case.window + 1),
        "window one less": replace(case, window=case.window - 1),
        "sinks one more": replace(case, sinks=case.sinks + 1),
        "sinks one less": replace(case, sinks=case.sinks - 1),
    }
    for i in range(case.layers):
        found[f"layer {i} slides or not"] = replace(case, sliding=flipped(case.sliding, i))
        if case.sliding[i] == "1":
            found[f"layer {i} decodes otherwise"] = replace(case, fa_decode=flipped(case.fa_decode, i))
    return found


@pytest.mark.native
@pytest.mark.parametrize("case", SENSITIVE, ids=lambda case: f"{case.arch}-{case.kv}-{case.policy}")
def test_mutation_is_noticed(engine, zoo, case):
    fed = schedule(case)
    expected, flags = verdict.expected_rows(zoo, case, fed), verdict.decode_flags(fed)
    plain = verdict.yardstick(engine, zoo, case)

    def problems(given: Case, fed=fed) -> list[str]:
        return verdict.problems(
            case, verdict.compare(expected, verdict.engine_rows(engine, zoo, given, fed), flags), plain
        )

    assert not problems(case)
    unnoticed = [name for name, wrong in mutants(case).items() if not problems(wrong)]
    # Each of these two changes one row of a sequence, and rows of experts are judged by percentiles.
    one_row = (
        {}
        if case.arch in MOE
        else {
            "tail one more": [position - 1 for position in fed.boundaries],
            "tail one less": [position + 1 for position in fed.boundaries],
        }
    )
    for name, boundaries in (
        one_row
        | {
            "no decode tokens": [2**31 - 1 for _ in fed.boundaries],
            "no prompt tokens": [0 for _ in fed.boundaries],
            "all of the last sequence": [fed.boundaries[-1] for _ in fed.boundaries],
        }
    ).items():
        if boundaries != fed.boundaries and not problems(case, replace(fed, boundaries=boundaries)):
            unnoticed.append(name)
    assert not unnoticed


@pytest.mark.native
def test_grid_figures(engine, capsys):
    """Print the figures of the cases above, largest of each kind; not a check of its own but of their number."""
    lines = ["", "distance from the oracle, in standard deviations of its logits (largest over the cases)"]
    for kind, found in sorted(measured.items()):
        figures = [f for _, f, _ in found]
        line = f"  {kind:12s} {len(found):4d} cases {sum(f.rows for f in figures):7d} rows"
        line += "".join(f"  {name} {max(getattr(f, name) for f in figures):.2g}" for name in ("worst", "p95", "kl"))
        if kind.startswith("q8_0"):
            line += "  as parts of full attention's:"
            for name in ("worst", "p95"):
                line += f" {name} {max(getattr(f, name) / getattr(p, name) for _, f, p in found):.2f}"
        lines.append(line)
    with capsys.disabled():
        print("\n".join(lines), flush=True)
    count = sum(map(len, measured.values()))
    if len(GRID) == GRID_SIZE and count >= GRID_SIZE - 1:
        assert count >= REQUIRED_SIZE
