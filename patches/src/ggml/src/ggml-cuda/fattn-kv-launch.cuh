// KV block table in CUDA flash attention: what its kernels and launch_fattn call (see fattn-kv-blocks.cuh).
//
// Why: the kernels differ from upstream's only in where a KV tile lies. That is a template parameter, so that a kernel
// without a table is upstream's and takes no more registers.
//
// Use: fattn_kernel = FATTN_KV_KERNEL(dst, flash_attn_tile, DKQ, DV, ncols1, ncols2, use_logit_softcap);

#pragma once

#include "common.cuh"
#include "fattn-kv-blocks.cuh"

#include "ggml-kv-blocks.h"

#include <type_traits>

// The instance of a kernel for this op. Its last template parameter is whether it reads a table.
#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)
#define FATTN_KV_AVAILABLE 1
#define FATTN_KV_KERNEL(dst, kernel, ...) ((dst)->src[5] ? kernel<__VA_ARGS__, true> : kernel<__VA_ARGS__, false>)
#else
#define FATTN_KV_KERNEL(dst, kernel, ...) kernel<__VA_ARGS__, false>
#endif // !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

//
// device
//

// The mask of columns that have none: a row of zeros, for every query.
[[maybe_unused]] static __device__ uint4 fattn_kv_no_mask[FATTN_KV_BLOCK*sizeof(half)/sizeof(uint4)];

// Where the tile at column k lies; without a table the column is the row.
struct fattn_kv_place {
    int          row_K;
    int          row_V;
    int          col;
    int          stride_mask;
    const half * mask;
};

template <typename T_columns>
static __device__ __forceinline__ fattn_kv_place fattn_kv_place_at(
        const T_columns & columns, const int k, const half * mask, const int stride_mask) {
    if constexpr (std::is_same_v<T_columns, fattn_kv_columns>) {
        const fattn_kv_tile tile = fattn_kv_tile_at(columns, k);
        if (tile.col < 0) {
            return { tile.row_K, tile.row_V, 0, 0, (const half *) fattn_kv_no_mask };
        }
        return { tile.row_K, tile.row_V, tile.col, stride_mask, mask };
    } else {
        GGML_UNUSED(columns);
        return { k, k, k, stride_mask, mask };
    }
}

// The columns, in kernels with a table; in others, what upstream passes in their place.
template <bool kv_blocks, typename T>
static __device__ __forceinline__ auto fattn_kv_columns_or(T upstream, const int * lists_or_table, const int n_masked,
        const int n_cols, const int n_tiles, const int n_seqs, const int seq, const int tile) {
    if constexpr (kv_blocks) {
        GGML_UNUSED(upstream);
        return fattn_kv_columns_of(lists_or_table, n_masked, n_cols, n_tiles, n_seqs, seq, tile);
    } else {
        GGML_UNUSED_VARS(lists_or_table, n_masked, n_cols, n_tiles, n_seqs, seq, tile);
        return upstream;
    }
}

//
// host
//

// Elements of the f16 copy of K or V: only of the table's columns, if there is a table.
static inline int64_t ggml_cuda_fattn_kv_nelements(const ggml_tensor * op, const ggml_tensor * t) {
    return op->src[5] ? t->ne[0]*ggml_kv_blocks_n_cols(op)*t->ne[2]*t->ne[3] : ggml_nelements(t);
}

// Writes the rows of K or V that the table lists to dst, [ne[0], n_cols, ne[2], ne[3]], and sets its strides.
void ggml_cuda_fattn_kv_to_f16(const ggml_tensor * op, const ggml_tensor * t, half * dst,
        size_t & nb1, size_t & nb2, size_t & nb3, cudaStream_t stream);

// What the kernels receive as KV_max and ne31: lists for query tiles of ncols1, or the table itself where that is enough.
struct ggml_cuda_fattn_kv_args {
    const int * lists_or_table;
    int32_t     n_masked;
};

ggml_cuda_fattn_kv_args ggml_cuda_fattn_kv_list_blocks(const ggml_tensor * op, int ncols1, bool compact_K, bool compact_V,
        ggml_cuda_pool_alloc<int> & buffer, cudaStream_t stream);

// For get_proc_address: a function that returns whether the kernels read an op's table; null where none does.
void * ggml_cuda_fattn_kv_supports_proc();
