"""The index arithmetic by which the CUDA kernels find the columns of a query tile, against a definition in numpy.

The functions under test are the kernels' own (patches/src/ggml/src/ggml-cuda/fattn-kv-blocks.cuh), compiled for the
host. The kernels' loops over them (tiles, stream-k ranges, parallel blocks) are written here a second time.
"""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from support import ROOT

HEADERS = ROOT / "patches/src/ggml/src/ggml-cuda"
BLOCK = 256


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler is needed"
    path = tmp_path_factory.mktemp("index") / "index.so"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [compiler, "-std=c++17", "-O1", *warnings, "-shared", "-fPIC", f"-I{HEADERS}"]
    subprocess.run([*command, str(ROOT / "tests/support/cuda/index.cpp"), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.plan_size.restype = loaded.row_of_column.restype = ctypes.c_int64
    return loaded


def pointer(array):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


class Case:
    """A window over a fragmented cache: table [n_seqs, n_blocks], who sees what [n_seqs, n_queries, n_cols]."""

    def __init__(self, rng):
        self.n_seqs = int(rng.integers(1, 4))
        self.n_queries = int(rng.choice([1, 2, 7, 16, 33, 97, 130]))
        self.n_blocks = int(rng.integers(1, 12))
        self.n_masked = int(rng.integers(1, self.n_blocks + 1))  # blocks under the mask
        self.ncols1 = int(rng.choice([1, 2, 8, 16, 64]))
        self.n_tiles = -(-self.n_queries // self.ncols1)
        self.n_cols = self.n_blocks * BLOCK
        self.table = np.stack([rng.permutation(40)[: self.n_blocks] for _ in range(self.n_seqs)]).astype(np.int32)
        window, sinks = int(rng.integers(1, 700)), int(rng.choice([0, 1, 100, 257]))
        columns = np.arange(self.n_masked * BLOCK)
        position = (columns[-1] - self.n_queries + 1 + np.arange(self.n_queries))[None, :, None]
        seen = (columns <= position) & ((position - columns < window) | (columns < sinks))
        seen = np.repeat(seen, self.n_seqs, 0)
        if self.n_queries > 3:
            seen[:, 3] = False  # sees nothing under the mask
        seen[:, :, (self.n_masked - 1) * BLOCK :] &= rng.integers(2) == 1  # at times the last block only pads
        free = np.ones((self.n_seqs, self.n_queries, self.n_cols - seen.shape[2]), bool)
        self.seen = np.concatenate([seen, free], 2)
        self.compact = {"K": bool(rng.integers(2)), "V": bool(rng.integers(2))}

    def seen_by_tile(self, seq, tile):
        return self.seen[seq, tile * self.ncols1 : (tile + 1) * self.ncols1].any(0)

    def row(self, seq, column, which):
        if self.compact[which]:
            return column
        return int(self.table[seq, column // BLOCK]) * BLOCK + column % BLOCK

    def plan(self, lib):
        plan = np.full(lib.plan_size(self.n_blocks, self.n_tiles, self.n_seqs) + 8, -7, np.int32)
        for seq in range(self.n_seqs):
            row_K, row_V = (None if self.compact[which] else self.table[seq] for which in "KV")
            for tile in range(self.n_tiles):
                live = self.seen_by_tile(seq, tile).reshape(-1, BLOCK).any(1).astype(np.uint8)
                sizes = self.n_blocks, self.n_masked, self.n_tiles, self.n_seqs, seq, tile
                lib.write_list(pointer(plan), pointer(row_K), pointer(row_V), pointer(live), *sizes)
        assert (plan[-8:] == -7).all(), "written past the plan's size"
        assert (plan[:-8] != -7).all(), "part of the plan was not written"
        return plan


def place(lib, case, plan_or_table, n_masked, seq, tile, k):
    out = np.zeros(3, np.int32)
    lib.tile_at(pointer(out), pointer(plan_or_table), n_masked, case.n_cols, case.n_tiles, case.n_seqs, seq, tile, k)
    return out.tolist()


def split(rng, iter_k, n_tiles):
    """Ranges (tile, k from, k to) of the CUDA blocks, as stream-k cuts them."""
    total = iter_k * n_tiles
    blocks = int(rng.integers(1, total + 1))
    for block in range(blocks):
        k, stop = block * total // blocks, (block + 1) * total // blocks
        while k < stop:
            end = min(stop, k - k % iter_k + iter_k)
            yield k // iter_k, k % iter_k, k % iter_k + end - k
            k = end


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_every_visible_column_is_visited_once(lib, seed, width):
    rng = np.random.default_rng([seed, width])
    case = Case(rng)
    plan = case.plan(lib)
    iter_k = case.n_cols // width
    visits = np.zeros((case.n_seqs, case.n_tiles, case.n_cols), int)
    for index, k_from, k_to in split(rng, iter_k, case.n_seqs * case.n_tiles):
        seq, tile = divmod(index, case.n_tiles)
        n_live = lib.n_live(pointer(plan), 0, case.n_cols, case.n_tiles, case.n_seqs, seq, tile)
        share = np.array([k_from, k_to], np.int32)
        lib.share(pointer(share), n_live // width, iter_k)
        assert (share[0] == 0) == (k_from == 0) and 0 <= share[0] < share[1] <= iter_k
        if n_live:  # no one gets more than its part, rounded up
            assert share[1] - share[0] <= max(1, -(-(k_to - k_from) * (n_live // width) // iter_k))
        for k in range(*share):
            row_K, row_V, col = place(lib, case, plan, 0, seq, tile, k * width)
            columns = np.arange(width) + (col if col >= 0 else 0)
            if col < 0:
                inside = [c for c in range(case.n_masked * BLOCK, case.n_cols, width) if case.row(seq, c, "K") == row_K]
                assert len(inside) == 1
                columns = np.arange(inside[0], inside[0] + width)
            else:
                assert col + width <= case.n_masked * BLOCK
            assert row_K == case.row(seq, int(columns[0]), "K")
            assert row_V == case.row(seq, int(columns[0]), "V")
            assert len({int(c) // BLOCK for c in columns}) == 1
            if k * width < n_live:
                visits[seq, tile, columns] += 1
            else:
                assert not case.seen_by_tile(seq, tile)[columns].any()
    assert visits.max() <= 1
    for seq in range(case.n_seqs):
        for tile in range(case.n_tiles):
            seen = case.seen_by_tile(seq, tile)
            assert (visits[seq, tile][seen] == 1).all()
            # and no block is visited in vain
            assert (visits[seq, tile].reshape(-1, BLOCK).any(1) == seen.reshape(-1, BLOCK).any(1)).all()


@pytest.mark.parametrize("seed", range(20))
def test_without_a_plan_the_table_is_read_in_order(lib, seed):
    case = Case(np.random.default_rng(seed))
    case.compact = {"K": False, "V": False}
    n_masked = case.n_masked * BLOCK
    table = np.ascontiguousarray(case.table)
    for seq in range(case.n_seqs):
        sizes = case.n_cols, case.n_tiles, case.n_seqs, seq, 0
        assert lib.n_live(pointer(table), n_masked, *sizes) == case.n_cols
        for k in range(0, case.n_cols, 32):
            row = case.row(seq, k, "K")
            assert place(lib, case, table, n_masked, seq, 0, k) == [row, row, k if k < n_masked else -1]


def test_copied_rows_and_mask_values(lib):
    rng = np.random.default_rng(5)
    table = rng.integers(0, 1 << 14, 9).astype(np.int32)
    for column in range(0, 9 * BLOCK, 37):
        assert lib.row_of_column(pointer(table), column) == int(table[column // BLOCK]) * BLOCK + column % BLOCK
    assert lib.block_size() == BLOCK
    inf = np.inf
    for low, high, visible in [(-inf, -inf, 0), (0, -inf, 1), (-inf, -65504, 1), (-0.5, -0.25, 1), (0, 0, 1)]:
        pair = np.array([low, high], np.float16).view(np.uint32)[0]
        assert bool(lib.is_visible(ctypes.c_uint32(int(pair)))) == bool(visible)
