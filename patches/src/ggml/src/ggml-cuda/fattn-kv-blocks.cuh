// KV block table in CUDA flash attention: where the columns of a query tile lie.
//
// Why: K, V and mask of a column are in different places (see ggml-kv-blocks.h), and a query tile sees only some blocks
// of 256 columns. The index arithmetic is here, without CUDA, so that a host test runs the same code as the kernels.
//
// A query tile's blocks are either the table itself or a list of entries that the kernel fattn_kv_list_blocks writes.
//
// Use, in a kernel: columns = fattn_kv_columns_of(...); for the tile at column k < columns.n_live:
//                   at = fattn_kv_place_at(columns, k, mask, stride_mask);
//                   rows at.row_K.., at.mask[j*at.stride_mask + at.col ..]

#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__MUSACC__)
#define FATTN_KV_FUNC static __host__ __device__ __forceinline__
#else
#define FATTN_KV_FUNC static inline
#endif

// Columns per block: GGML_KV_BLOCK_SIZE, which fattn-kv-blocks.cu compares. A KV tile must not straddle two blocks.
#define FATTN_KV_BLOCK 256

// One block of a list. Where the block has no mask, col is negative.
struct alignas(16) fattn_kv_entry {
    int32_t row_K;
    int32_t row_V;
    int32_t col;
    int32_t unused;
};

// The columns that a query tile visits, in the order in which it does.
struct fattn_kv_columns {
    const int32_t * list; // the stream's row of the table, or the tile's entries
    int32_t n_masked;     // with the table: columns under the mask; with entries: 0
    int32_t n_live;       // columns to visit; the others are masked for every query of the tile
};

struct fattn_kv_tile {
    int32_t row_K;
    int32_t row_V;
    int32_t col; // of the mask; negative: visible to every query
};

// The lists in memory: entries[n_seqs*n_tiles][n_blocks], then the number of live blocks of each list.
FATTN_KV_FUNC int64_t fattn_kv_lists_size(const int n_blocks, const int n_tiles, const int n_seqs) { // in int32_t
    return (int64_t) n_seqs*n_tiles*(n_blocks*(sizeof(fattn_kv_entry)/sizeof(int32_t)) + 1);
}

FATTN_KV_FUNC int64_t fattn_kv_list_offset(const int n_blocks, const int n_tiles, const int seq, const int tile) {
    return ((int64_t) seq*n_tiles + tile)*n_blocks*(int64_t)(sizeof(fattn_kv_entry)/sizeof(int32_t));
}

FATTN_KV_FUNC int64_t fattn_kv_count_offset(
        const int n_blocks, const int n_tiles, const int n_seqs, const int seq, const int tile) {
    return fattn_kv_list_offset(n_blocks, n_tiles, n_seqs, 0) + (int64_t) seq*n_tiles + tile;
}

// lists_or_table: lists if n_masked == 0, otherwise a contiguous table [n_cols/256, n_seqs] with n_masked columns under
// the mask.
FATTN_KV_FUNC fattn_kv_columns fattn_kv_columns_of(const int32_t * lists_or_table, const int n_masked, const int n_cols,
        const int n_tiles, const int n_seqs, const int seq, const int tile) {
    const int n_blocks = n_cols / FATTN_KV_BLOCK;
    if (n_masked > 0) {
        return { lists_or_table + (int64_t) seq*n_blocks, n_masked, n_cols };
    }
    return {
        lists_or_table + fattn_kv_list_offset(n_blocks, n_tiles, seq, tile),
        0,
        lists_or_table[fattn_kv_count_offset(n_blocks, n_tiles, n_seqs, seq, tile)]*FATTN_KV_BLOCK,
    };
}

FATTN_KV_FUNC fattn_kv_tile fattn_kv_tile_at(const fattn_kv_columns & columns, const int k) {
    const int block  = k / FATTN_KV_BLOCK;
    const int inside = k % FATTN_KV_BLOCK;
    if (columns.n_masked > 0) {
        const int row = columns.list[block]*FATTN_KV_BLOCK + inside;
        return { row, row, k < columns.n_masked ? k : -1 };
    }
    const fattn_kv_entry entry = ((const fattn_kv_entry *) columns.list)[block];
    return { entry.row_K + inside, entry.row_V + inside, entry.col < 0 ? -1 : entry.col + inside };
}

// The entry of a column block. table_K, table_V: the stream's row of the table, or null if K (or V) is a compact copy
// in column order.
FATTN_KV_FUNC fattn_kv_entry fattn_kv_entry_of(
        const int32_t * table_K, const int32_t * table_V, const int n_masked_blocks, const int block) {
    return {
        (table_K ? table_K[block] : block)*FATTN_KV_BLOCK,
        (table_V ? table_V[block] : block)*FATTN_KV_BLOCK,
        block < n_masked_blocks ? block*FATTN_KV_BLOCK : -1,
        0,
    };
}

// Place of a block in its list: live blocks from the front, in order, the others from the back.
FATTN_KV_FUNC int fattn_kv_place_in_list(
        const bool live, const int block, const int n_live_before, const int n_blocks) {
    return live ? n_live_before : n_blocks - 1 - (block - n_live_before);
}

// Does a pair of f16 mask values make a column visible? -INFINITY is 0xFC00.
FATTN_KV_FUNC bool fattn_kv_is_visible(const uint32_t mask_pair) {
    return mask_pair != 0xFC00FC00u;
}

// The row that is copied to a compact row.
FATTN_KV_FUNC int64_t fattn_kv_row_of_column(const int32_t * table, const int col) {
    return (int64_t) table[col / FATTN_KV_BLOCK]*FATTN_KV_BLOCK + col % FATTN_KV_BLOCK;
}
