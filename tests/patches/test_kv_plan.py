"""Which KV blocks a ubatch needs, and their masks, against the rule by brute force over every token and cell.

The functions under test are the library's own (patches/src/src/llama-swaa-plan.cpp, llama-swaa-mask.cpp), compiled here
without a model or a graph. What a token sees through table and mask must be what the rule shows it, cell by cell.

    pytest tests/patches/test_kv_plan.py
"""

import ctypes
import itertools
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
OURS = ROOT / "patches" / "src"
UPSTREAM = ROOT / "vendor" / "llama.cpp"
BLOCK = 256
STEP = 4  # blocks, in which a table grows past its usual length
WINDOW, MIXED, CAUSAL = range(3)
NONE, SOME, ALL = range(3)


class Settings(ctypes.Structure):
    """As in kv_plan.cpp."""

    _sizes = ("window", "sinks", "n_stream", "n_kv", "n_seqs", "n_pos")
    _flags = ("dense", "has_ring", "fa_decode", "swa_decode", "causal_table", "reserve")
    _fields_ = tuple((name, ctypes.c_int32) for name in (*_sizes, *_flags))


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler is needed"
    if not UPSTREAM.is_dir():
        pytest.skip("vendor/llama.cpp is not there; `make setup` makes it")
    path = tmp_path_factory.mktemp("plan") / "plan.so"
    sources = [
        Path(__file__).with_name("kv_plan.cpp"),
        OURS / "src/llama-swaa-plan.cpp",
        OURS / "src/llama-swaa-mask.cpp",
    ]
    includes = [f"-I{OURS / folder}" for folder in ("src", "ggml/include")]
    includes += [f"-isystem{UPSTREAM / folder}" for folder in ("src", "include", "ggml/include")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS", "-shared", "-fPIC"]
    # Neither NDEBUG nor a library: a symbol of a model, context or graph would be undefined.
    subprocess.run([compiler, *flags, *includes, *map(str, sources), "-Wl,--no-undefined", "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.plan_new.restype = ctypes.c_void_p
    loaded.plan_same_graph.restype = ctypes.c_bool
    return loaded


@dataclass(frozen=True)
class Columns:
    n_blocks: int
    n_masked: int
    table: bool
    blocks: np.ndarray  # [n_stream, n_blocks], none without a table
    n_live: np.ndarray  # [n_stream]


@dataclass(frozen=True)
class Ubatch:
    """Tokens and the cells that hold their past, themselves included.

    pos, seq, decode [n_tokens], stream by stream; cells [n_stream, n_kv], the position or -1; owners [n_stream, n_kv],
    one bit for each sequence that a cell belongs to.
    """

    pos: np.ndarray
    seq: np.ndarray
    decode: np.ndarray
    cells: np.ndarray
    owners: np.ndarray
    window: int
    sinks: int = 0
    fa_decode: bool = True
    swa_decode: bool = True
    causal_table: bool = True
    dense: bool = False
    has_ring: bool = False
    reserve: bool = False
    n_seqs: int = 0  # for a reservation, whose sequences have no numbers

    @property
    def n_stream(self):
        return len(self.cells)

    @property
    def n_kv(self):
        return self.cells.shape[1]

    def rule(self, kind):
        """bool [n_tokens, n_kv]: what each token sees of its stream's cells, by the definition."""
        stream = np.arange(len(self.pos)) * self.n_stream // len(self.pos)
        j, p = self.cells[stream], self.pos[:, None]
        mine = self.owners[stream] >> self.seq[:, None] & 1 == 1
        everything = {WINDOW: np.zeros_like(self.decode), MIXED: self.decode, CAUSAL: np.ones_like(self.decode)}[kind]
        near = (p - j < self.window) | (j < self.sinks) | everything[:, None]
        return (j >= 0) & mine & (j <= p) & near


class Planned:
    """What the library makes of a ubatch."""

    def __init__(self, lib, ubatch):
        self.lib, self.ubatch = lib, ubatch
        n_seqs = ubatch.n_seqs or len(set(ubatch.seq.tolist()))
        settings = Settings(
            ubatch.window, ubatch.sinks, ubatch.n_stream, ubatch.n_kv, n_seqs, 1, ubatch.dense, ubatch.has_ring,
            ubatch.fa_decode, ubatch.swa_decode, ubatch.causal_table, ubatch.reserve,
        )  # fmt: skip
        arrays = [np.ascontiguousarray(a, np.int32) for a in (ubatch.pos, ubatch.seq, ubatch.decode, ubatch.cells)]
        arrays.append(np.ascontiguousarray(ubatch.owners, np.uint32))
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in arrays]
        self.handle = ctypes.c_void_p(lib.plan_new(ctypes.byref(settings), len(ubatch.pos), *pointers))
        about = (ctypes.c_int32 * 3)()
        lib.plan_about(self.handle, about)
        self.active, self.decode, self.wiring = bool(about[0]), about[1], about[2]

    def __del__(self):
        self.lib.plan_free(self.handle)

    def columns(self, kind):
        shape = (ctypes.c_int32 * 5)()
        blocks, n_live = ctypes.POINTER(ctypes.c_int32)(), ctypes.POINTER(ctypes.c_uint32)()
        self.lib.plan_columns(self.handle, kind, shape, ctypes.byref(blocks), ctypes.byref(n_live))
        n_blocks, n_masked, table, n_entries, n_streams = shape
        entries = np.array(blocks[:n_entries], int).reshape(-1, n_blocks) if n_entries else np.zeros((0, n_blocks), int)
        return Columns(n_blocks, n_masked, bool(table), entries, np.array(n_live[:n_streams], int))

    def mask(self, kind, half=False, alibi=False):
        """[n_tokens, n_masked * 256]"""
        shape = (len(self.ubatch.pos), self.columns(kind).n_masked * BLOCK)
        mask = np.full(shape, 7, np.float16 if half else np.float32)
        self.lib.plan_mask(self.handle, kind, half, alibi, mask.ctypes.data_as(ctypes.c_void_p))
        return mask

    def same_graph(self, other):
        return self.lib.plan_same_graph(self.handle, other.handle)

    def seen(self, kind):
        """int [n_tokens, n_kv]: through how many columns each token sees each cell of its stream."""
        columns, mask = self.columns(kind), self.mask(kind)
        assert set(np.unique(mask)) <= {0.0, -np.inf}
        assert np.array_equal(self.mask(kind, half=True), mask)
        n_tokens = len(mask)
        visible = np.ones((n_tokens, columns.n_blocks * BLOCK), bool)  # columns without a mask
        visible[:, : mask.shape[1]] = mask == 0
        seen = np.zeros((n_tokens, self.ubatch.n_kv), int)
        for token in range(n_tokens):
            rows = np.arange(columns.n_blocks * BLOCK)
            if columns.table:
                entries = columns.blocks[token * self.ubatch.n_stream // n_tokens]
                rows = entries[rows // BLOCK] * BLOCK + rows % BLOCK
            np.add.at(seen[token], rows[visible[token]], 1)
        return seen


def check(lib, ubatch):
    """Every kind of columns shows each token what the rule does, through no more blocks than needed."""
    planned = Planned(lib, ubatch)
    some, every = bool(ubatch.decode.any()), bool(ubatch.decode.all())
    assert planned.decode == (ALL if every else SOME if some else NONE)
    assert planned.active == bool((ubatch.pos >= ubatch.window + ubatch.sinks).any())
    needed = {
        WINDOW: planned.active and (ubatch.swa_decode or (ubatch.fa_decode and not some)),
        MIXED: planned.active and ubatch.fa_decode and some and not every,
        CAUSAL: planned.active and ubatch.causal_table and not ubatch.dense and not every,
    }
    for kind, need in needed.items():
        columns = planned.columns(kind)
        if not need:
            assert columns.n_blocks == 0
            continue
        rule = ubatch.rule(kind)
        if columns.n_blocks:
            assert np.array_equal(planned.seen(kind), rule), f"kind {kind}"
        check_blocks(ubatch, columns, rule, kind)
    return planned


def check_blocks(ubatch, columns, rule, kind):
    n_blocks = ubatch.n_kv // BLOCK
    by_stream = rule.reshape(ubatch.n_stream, -1, n_blocks, BLOCK)
    live = by_stream.any((1, 3))  # [n_stream, n_blocks]
    before = replace(ubatch, pos=ubatch.pos - 1).rule(CAUSAL).reshape(by_stream.shape)  # of a token, without itself
    past = before.all((1, 3)) if kind == CAUSAL else np.zeros_like(live)
    n_unmasked = past.sum(1).min()
    n_masked = live.sum(1) - n_unmasked  # by stream
    tokens = len(ubatch.pos) // ubatch.n_stream
    if kind == CAUSAL:
        length = max(n_masked.max(), -(-(tokens - 1) // BLOCK) + 1)
        nothing = n_unmasked == 0 or length >= n_blocks
        assert (columns.n_blocks == 0) == nothing
        if nothing:
            return  # upstream's mask
        assert columns.table
    else:
        usual = usual_length(ubatch, tokens)
        length = usual if n_masked.max() <= usual else -(-n_masked.max() // STEP) * STEP
        assert columns.table == (length < n_blocks and not ubatch.dense)
        if not columns.table:
            assert columns.n_blocks == columns.n_masked == n_blocks
            return
    assert (columns.n_masked, columns.n_blocks) == (length, length + n_unmasked)
    assert columns.n_live.tolist() == n_masked.tolist()
    for s, entries in enumerate(columns.blocks):
        listed = np.concatenate([entries[: n_masked[s]], entries[length:]])
        assert sorted(listed) == np.flatnonzero(live[s]).tolist()  # none missing, none twice, none in vain
        assert kind == CAUSAL or (np.diff(entries[: n_masked[s]]) > 0).all()
        assert not entries[n_masked[s] : length].any()  # padding


def usual_length(ubatch, tokens):
    """Blocks of sequences without gaps: sink tokens and window of each, and the tokens of the ubatch."""
    sequences = len(set(ubatch.seq.tolist())) if ubatch.n_stream == 1 else 1
    window = -(-(ubatch.window - 1) // BLOCK) + 1
    return sequences * (-(-ubatch.sinks // BLOCK) + window) + -(-tokens // BLOCK)


def straight(window, sinks, past, tokens, *, n_kv=0, decode=False, **settings):
    """One sequence in the order of its positions: `past` tokens, then those of the ubatch."""
    end = past + tokens
    n_kv = n_kv or -(-end // BLOCK) * BLOCK
    cells = np.where(np.arange(n_kv) < end, np.arange(n_kv), -1)[None]
    pos = np.arange(past, end)
    return Ubatch(pos, 0 * pos, np.full(tokens, decode), cells, (cells >= 0).astype(int), window, sinks, **settings)


@pytest.mark.parametrize("window", [1, 2, 255, 256, 257, 600])
@pytest.mark.parametrize("edge", [-1, 0, 1])
def test_edges_of_the_window(lib, window, edge):
    """The oldest key of the window is the last one of a block, the first of the next, or one further."""
    query = 5 * BLOCK + edge + window - 2  # sees from 5 * BLOCK - 1 + edge on
    planned = check(lib, straight(window, 0, query, 1, n_kv=16 * BLOCK))
    blocks = planned.columns(WINDOW).blocks[0]
    assert blocks[0] == (5 if edge == 1 else 4)
    mask = planned.mask(WINDOW)[0]
    assert (mask == 0).sum() == window
    seen = planned.seen(WINDOW)[0]
    assert [seen[query - distance] for distance in (window - 1, window, window + 1)] == [1, 0, 0]


@pytest.mark.parametrize("sinks", [0, 1, 255, 256, 257, 600])
def test_sink_tokens_over_several_blocks(lib, sinks):
    planned = check(lib, straight(300, sinks, 3000, 7))
    listed = planned.columns(WINDOW).blocks[0][: planned.columns(WINDOW).n_live[0]]
    assert [b for b in listed if b < 10] == list(range(-(-sinks // BLOCK)))


@pytest.mark.parametrize("tokens", [1, 2, 255, 256, 257, 512])
def test_one_graph_serves_a_whole_prefill(lib, tokens):
    """Wherever in its blocks the ubatch starts, the window's shape is that of the reserved graph."""
    settings = {"n_kv": 4096, "causal_table": False}
    plans = [Planned(lib, straight(400, 300, past, tokens, **settings)) for past in range(1024, 1300, 5)]
    assert all(planned.same_graph(plans[0]) for planned in plans)
    reserved = Planned(lib, straight(400, 300, 0, tokens, reserve=True, n_seqs=1, **settings))
    assert reserved.same_graph(plans[0])
    assert reserved.columns(WINDOW).blocks.size == 0


def test_a_causal_layer_masks_the_ubatch_alone(lib):
    planned = check(lib, straight(100, 4, 2000, 64))
    causal = planned.columns(CAUSAL)
    # 2000 is in block 7; the blocks before it are every token's past
    assert (causal.n_blocks, causal.n_masked) == (9, 2)
    assert causal.blocks[0].tolist() == [7, 8, *range(7)]
    assert np.isneginf(planned.mask(CAUSAL)[0, 2001 - 7 * BLOCK :]).all()


@pytest.mark.parametrize(
    "n_kv, has_ring, blocks", [(4096, False, (16, 2)), (4096, True, (16, 4)), (512, False, (0, 0))]
)
def test_a_reserved_causal_layer(lib, n_kv, has_ring, blocks):
    """It masks its own blocks, and beside a ring all that may be seen before the window hides anything."""
    one = straight(700, 100, 0, 200, n_kv=n_kv, reserve=True, has_ring=has_ring, n_seqs=1)
    columns = Planned(lib, one).columns(CAUSAL)
    assert (columns.n_blocks, columns.n_masked) == blocks
    several = Planned(lib, replace(one, n_seqs=3))
    assert several.columns(CAUSAL).n_blocks == 0  # they share a stream: upstream's mask


def test_nothing_is_hidden_yet(lib):
    planned = check(lib, straight(100, 28, 0, 128))
    assert not planned.active
    assert check(lib, straight(100, 28, 0, 129)).active


def test_dense_columns_are_the_cache(lib):
    columns = check(lib, straight(10, 2, 1000, 30, dense=True)).columns(WINDOW)
    assert (columns.n_blocks, columns.n_masked, columns.table) == (5, 5, False)


@pytest.mark.parametrize("kinds", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("decoding", [0, 1, 3])
def test_decode_tokens(lib, kinds, decoding):
    """Of three sequences with one token each, some decode."""
    ubatch = layout(np.random.default_rng(1), "shuffled", sequences=3, tokens=1, length=900, window=50, sinks=3)
    decode = np.arange(3) < decoding
    fa_decode, swa_decode, causal_table = kinds
    check(lib, replace(ubatch, decode=decode, fa_decode=fa_decode, swa_decode=swa_decode, causal_table=causal_table))


def layout(rng, kind, *, sequences, tokens, length, window, sinks, streams=False, shared=0):
    """Several sequences of up to `length` tokens, the last `tokens` of each in the ubatch.

    kind: "straight" one after the other; "interleaved" token by token; "shuffled" in any order, with free cells;
    "ring": what is left in a ring that new tokens went around. shared: leading cells that belong to all sequences.
    """
    lengths = [int(rng.integers(max(tokens, shared + tokens), length + 1)) for _ in range(sequences)]
    held = []  # (position, bits) of the cells of each sequence
    for s, n in enumerate(lengths):
        first = n - tokens - window if kind == "ring" else 0
        own = [p for p in range(n) if (p >= first or p < sinks) and p >= shared]
        held.append([(p, 1 << s) for p in own])
    everyone = (1 << sequences) - 1
    groups = held if streams else [[(p, everyone) for p in range(shared)], *held]
    if not streams:
        if kind == "interleaved":
            groups = [groups[0], [cell for row in itertools.zip_longest(*groups[1:]) for cell in row if cell]]
        groups = [list(itertools.chain(*groups))]
    room = max(map(len, groups))
    n_kv = -(-(room + int(rng.integers(0, 600))) // BLOCK) * BLOCK
    cells, owners = np.full((len(groups), n_kv), -1), np.zeros((len(groups), n_kv), int)
    for s, group in enumerate(groups):
        at = np.arange(len(group))
        if kind == "shuffled":
            at = rng.permutation(n_kv)[: len(group)]
        elif kind == "ring":
            at = (at + int(rng.integers(n_kv))) % n_kv
        cells[s, at], owners[s, at] = np.array(group).T
    pos = np.concatenate([np.arange(n - tokens, n) for n in lengths])
    seq = np.repeat(np.arange(sequences), tokens)
    decode = np.repeat(rng.random(sequences) < 0.5, tokens)
    if not streams and rng.integers(2):
        order = rng.permutation(len(pos))
        pos, seq, decode = pos[order], seq[order], decode[order]
    return Ubatch(pos, seq, decode, cells, owners, window, sinks)


@pytest.mark.parametrize("kind", ["straight", "interleaved", "shuffled", "ring"])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_random_layouts(lib, kind, streams, seed):
    rng = np.random.default_rng([seed, streams, len(kind)])
    for _ in range(6):
        ubatch = layout(
            rng, kind,
            sequences=int(rng.integers(1, 5)),
            tokens=int(rng.choice([1, 2, 40, 130])),
            length=int(rng.choice([200, 700, 1500])),
            window=int(rng.choice([1, 31, 255, 256, 257, 600])),
            sinks=int(rng.choice([0, 1, 4, 256, 300])),
            streams=streams,
            shared=0 if streams or kind == "ring" else int(rng.choice([0, 0, 60])),
        )  # fmt: skip
        check(lib, ubatch)


def test_alibi_is_the_distance(lib):
    ubatch = straight(20, 2, 700, 5, n_kv=2048)
    planned = Planned(lib, ubatch)
    visible, mask = planned.mask(WINDOW) == 0, planned.mask(WINDOW, alibi=True)
    entries = planned.columns(WINDOW).blocks[0]
    column = np.arange(mask.shape[1])
    distance = ubatch.pos[:, None] - (entries[column // BLOCK] * BLOCK + column % BLOCK)
    assert np.array_equal(mask[visible], -distance[visible].astype(np.float32))
    assert np.isneginf(mask[~visible]).all()


def test_wirings_are_distinct(lib):
    """Graphs whose layers read different inputs have different numbers, within the range that two are packed into."""
    found = {}
    for fa_decode, swa_decode, causal_table, dense, decoding in itertools.product(*[[False, True]] * 4, [0, 1, 2]):
        ubatch = layout(np.random.default_rng(2), "interleaved", sequences=2, tokens=1, length=1200, window=10, sinks=0)
        kinds = {"fa_decode": fa_decode, "swa_decode": swa_decode, "causal_table": causal_table, "dense": dense}
        planned = Planned(lib, replace(ubatch, decode=np.arange(2) < decoding, **kinds))
        inputs = tuple((planned.columns(kind).n_blocks > 0, planned.columns(kind).table) for kind in range(3))
        found.setdefault((planned.active, planned.decode, inputs), set()).add(planned.wiring)
    numbers = [number for group in found.values() for number in group]
    assert len(numbers) == len(set(numbers)) == len(found)
    assert all(0 < number < lib.plan_wirings() for number in numbers)
