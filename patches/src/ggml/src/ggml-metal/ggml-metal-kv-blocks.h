// KV block table of ggml_flash_attn_ext on Metal: the host's side.
//
// Why: kernels and host code see only columns. With a table there are n_blocks*256 of them, whatever the size of the
// cache; so the host takes the number of K and V rows from here, and everything derived from it (grid, simdgroups,
// scratch for the F16 copy, tuning) follows. In the kernels KV_BLOCKS_ROW (ggml-metal-impl.h) gives the row of a column,
// once per tile. Only listed rows are dequantized to F16, in the order of the columns, so that the attention on them
// needs no table.
//
// Use: const ggml_metal_kv_cols kv(op); GGML_TENSOR_LOCALS(int32_t, ne1, kv.k(), ne); // ne11: columns

#pragma once

#include "ggml-kv-blocks.h"
#include "ggml-metal-impl.h"

static_assert(OP_FLASH_ATTN_EXT_NKVB == GGML_KV_BLOCK_SIZE, "kernels and table must agree on the size of a block");
// so a tile lies in one block, has a mask as a whole or not at all, and the last tile is whole: it needs no padding
static_assert(GGML_KV_BLOCK_SIZE % OP_FLASH_ATTN_EXT_NCPSG     == 0, "a tile must not straddle two blocks");
static_assert(GGML_KV_BLOCK_SIZE % OP_FLASH_ATTN_EXT_VEC_NCPSG == 0, "a tile must not straddle two blocks");

// Shapes of K and V as the kernels see them: ne[1] counts columns. Strides are those of the tensors.
struct ggml_metal_kv_cols {
    struct shape {
        int64_t ne[GGML_MAX_DIMS];
    };

    shape    ks;
    shape    vs;
    bool     has_table;
    uint64_t nb_table; // bytes of a stream in the table

    explicit ggml_metal_kv_cols(const ggml_tensor * op)
        : has_table(op->src[5] != nullptr), nb_table(op->src[5] ? op->src[5]->nb[3] : 0) {
        for (int i = 0; i < GGML_MAX_DIMS; ++i) {
            ks.ne[i] = op->src[1]->ne[i];
            vs.ne[i] = op->src[2]->ne[i];
        }
        if (has_table) {
            ks.ne[1] = ggml_kv_blocks_n_cols(op);
            vs.ne[1] = ks.ne[1];
        }
    }

    const shape * k() const { return &ks; }
    const shape * v() const { return &vs; }
};

// Whatever supports_op accepts also works with a table, which changes which rows are read, not how.
inline bool ggml_metal_supports_kv_blocks(const struct ggml_tensor * op) {
    GGML_UNUSED(op);
    return true;
}
