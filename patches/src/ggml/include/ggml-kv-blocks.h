// KV block table of ggml_flash_attn_ext: attention over a list of live KV blocks.
//
// Why: under a sliding window a ubatch needs only the cells of the sinks and of the window. A table
// (src[5] of the op) names the live blocks of 256 K/V rows, so that mask, conversion of K/V, scheduling
// and arithmetic cost O(live blocks) instead of O(cache), for any cell layout. Term and idea are those of
// paged attention (Kwon et al., 2023).
//
// Use: op = ggml_flash_attn_ext(ctx, q, k, v, mask, ...); ggml_flash_attn_ext_set_kv_blocks(op, table);
//
//   table  I32 [n_blocks, 1, 1, n_stream]   block numbers, each in [0, ne[1] of K / 256)
//   mask   F16 [n_masked*256, n_q, *, *]    compact: one column per row of the first n_masked <= n_blocks blocks
//   K, V   as without a table; column c of stream s reads row table[c/256, s]*256 + c%256
//
// Columns past the mask's width are visible to every query: the past of a causal layer needs no mask. An entry
// that only pads the table may repeat any valid block, below columns that are wholly masked.

#pragma once

#include "ggml.h"
#include "ggml-backend.h"

#define GGML_KV_BLOCK_SIZE 256

// A backend whose kernels read the table declares it, op by op, by a function of this name in its get_proc_address.
#define GGML_KV_BLOCKS_PROC "ggml_backend_supports_kv_blocks"

#ifdef __cplusplus
extern "C" {
#endif

typedef bool (*ggml_backend_supports_kv_blocks_t)(const struct ggml_tensor * op);

// Attach a table to a flash attention op that has a mask over its first columns.
GGML_API void ggml_flash_attn_ext_set_kv_blocks(struct ggml_tensor * op, struct ggml_tensor * table);

// False for a flash attention op with a table on a device whose kernels would ignore it (they would read
// past the end of the compact mask); true for everything else.
GGML_API bool ggml_backend_dev_supports_kv_blocks(ggml_backend_dev_t dev, const struct ggml_tensor * op);

// Number of columns that the op attends over, masked ones included.
static inline int64_t ggml_kv_blocks_n_cols(const struct ggml_tensor * op) {
    return op->src[5] ? op->src[5]->ne[0]*GGML_KV_BLOCK_SIZE : op->src[1]->ne[1];
}

// Number of leading columns that have a mask, if the op has one.
static inline int64_t ggml_kv_blocks_n_masked_cols(const struct ggml_tensor * op) {
    return op->src[5] ? op->src[3]->ne[0] : op->src[1]->ne[1];
}

// Entries of one stream, or NULL without a table.
static inline const int32_t * ggml_kv_blocks_of_stream(const struct ggml_tensor * op, int64_t stream) {
    const struct ggml_tensor * table = op->src[5];
    return table ? (const int32_t *) ((const char *) table->data + stream*table->nb[3]) : NULL;
}

// K/V row behind a column.
static inline int64_t ggml_kv_blocks_row(const int32_t * blocks, int64_t col) {
    return blocks ? (int64_t) blocks[col/GGML_KV_BLOCK_SIZE]*GGML_KV_BLOCK_SIZE + col%GGML_KV_BLOCK_SIZE : col;
}

#ifdef __cplusplus
}
#endif
