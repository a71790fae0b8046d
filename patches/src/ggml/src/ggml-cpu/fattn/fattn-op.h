// The op in the terms of the CPU attention kernels, how it is cut into tasks, and what the kernels share.
//
// Why: both kernels, for few rows and for many, take the same op and leave the same partial results to one merge.
//
//   const fattn_op op(tensor); const fattn_tasks tasks(op, n_threads);
//   fattn_decode_task(op, tasks, t, ...) for each t < tasks.n_tasks, from any thread, then the merge
//
// The letters of the online softmax are those of FlashAttention (Dao et al., 2022). Per query row:
//
//   S      scores of some columns, scaled, capped and masked
//   m      largest score so far; m_new: with those of this step
//   P      weights e^(S - m_new)
//   l      sum of the weights so far
//   O      sum of weight * V so far, not divided by l
//   alpha  e^(m - m_new): rescales l and O when the maximum rises
//   beta   e^(base - m_new), where weights are taken relative to another base than m_new: P = beta * e^(S - base)

#pragma once

#include "ggml-impl.h"
#include "ggml-kv-blocks.h"

#include <algorithm>
#include <cstring>

constexpr int FATTN_DECODE_ROWS = 8; // most query rows per KV head for the decode kernel
constexpr int FATTN_TILE = 64;       // KV columns of a tile; divides a block of the KV block table
static_assert(GGML_KV_BLOCK_SIZE % FATTN_TILE == 0, "a tile must not straddle two blocks");

// The op's tensors and numbers. A "row" is one query token of one head.
struct fattn_op {
    const ggml_tensor * q;     // F32 [DK, n_q, n_head, n_stream]
    const ggml_tensor * k;     // [DK, cells, n_head_kv, n_stream_kv]
    const ggml_tensor * v;     // [DV, cells, n_head_kv, n_stream_kv]
    const ggml_tensor * mask;  // F16 [n_masked, n_q, 1 or n_head, 1 or n_stream], or NULL
    const float       * sinks; // [n_head], logits of attention sinks, or NULL
    ggml_tensor       * dst;   // F32 [DV, n_head, n_q, n_stream]

    int64_t DK, DV, n_q, n_head, n_head_kv, n_stream, n_cols, n_masked;
    int64_t group;             // query heads per KV head
    float   scale, max_bias, softcap;

    explicit fattn_op(const ggml_tensor * op);

    int64_t n_rows()   const { return n_q*n_head*n_stream; }
    int64_t row(int64_t stream, int64_t head, int64_t token) const { return (stream*n_head + head)*n_q + token; }
    int64_t n_tiles()  const { return (n_cols + FATTN_TILE - 1)/FATTN_TILE; }

    const float * q_row(int64_t stream, int64_t head, int64_t token) const {
        return (const float *) ((const char *) q->data + token*q->nb[1] + head*q->nb[2] + stream*q->nb[3]);
    }
    float * out_row(int64_t stream, int64_t head, int64_t token) const {
        return (float *) ((char *) dst->data + ((stream*n_q + token)*n_head + head)*dst->nb[1]);
    }
    // First of the K/V rows behind columns [col, end of the tile).
    const char * rows_of(const ggml_tensor * kv, int64_t stream, int64_t head_kv, int64_t col) const {
        const int64_t s = stream/(n_stream/kv->ne[3]);
        const int64_t r = ggml_kv_blocks_row(ggml_kv_blocks_of_stream(dst, s), col);
        return (const char *) kv->data + r*kv->nb[1] + head_kv*kv->nb[2] + s*kv->nb[3];
    }
    // NULL where the column, and with it its tile, has no mask.
    const ggml_fp16_t * mask_row(int64_t stream, int64_t head, int64_t token, int64_t col) const {
        if (!mask || col >= n_masked) {
            return nullptr;
        }
        const char * row = (const char *) mask->data + token*mask->nb[1] + (head % mask->ne[2])*mask->nb[2] +
            (stream % mask->ne[3])*mask->nb[3];
        return (const ggml_fp16_t *) row + col;
    }
    float slope(int64_t head) const; // of ALiBi; 1 without it
};

// How the op is cut into tasks; a pure function of the op and the number of threads.
struct fattn_tasks {
    bool    decode;
    int64_t n_splits;    // ranges of KV tiles
    int64_t tiles_split; // tiles per range; the last range may have fewer
    int64_t n_blocks;    // decode: blocks of KV heads; otherwise blocks of tokens, for each KV head
    int64_t block;       // KV heads, or tokens, per block; the last block may have fewer
    int64_t n_tasks;
    size_t  scratch;     // floats per thread
    size_t  partial;     // floats per row and split: O, m, l; 0 where a task finishes its rows
    size_t  map;         // bytes of the map of the mask; 0 without one

    fattn_tasks(const fattn_op & op, int n_threads);

    size_t partials(const fattn_op & op) const { return n_splits*op.n_rows()*partial; } // floats
};

// Of one row and split. Without a visible column: m = -INFINITY, l = 0, O = 0.
struct fattn_partial {
    float * m;
    float * l;
    float * O; // [DV]
};

inline fattn_partial fattn_partial_at(
        const fattn_op & op, const fattn_tasks & tasks, float * partials, int64_t split, int64_t row) {
    float * p = partials + (split*op.n_rows() + row)*tasks.partial;
    return { p + op.DV, p + op.DV + 1, p };
}

// What the mask does to a tile of some tokens. For more tokens, the bits of each are or-ed.
enum : uint8_t {
    FATTN_MASK_CLEAR = 1, // adds 0 everywhere
    FATTN_MASK_HIDES = 2, // adds -INFINITY everywhere
    FATTN_MASK_MIXED = 3,
};

// Byte [stream of the mask][tokens / FATTN_MAP_TOKENS][tile] of the map. The mask is read once, row by row, for all
// heads; without the map each task would gather its tiles from all over the mask.
constexpr int64_t FATTN_MAP_TOKENS = 8;
void    fattn_map_mask(const fattn_op & op, int64_t row_of_map, uint8_t * map); // fills one row of the map
int64_t fattn_map_rows(const fattn_op & op);
uint8_t fattn_mask_of (const fattn_op & op, const uint8_t * map, int64_t stream, int64_t t0, int64_t n_t, int64_t tile);

// K or V rows as floats, ld apart.
void fattn_to_float(const ggml_tensor * kv, const char * rows, int n_rows, int64_t ne, float * out, int64_t ld);

// Task t; t_next: the thread's next one, whose first rows are prefetched at the end. scratch: tasks.scratch floats.
void fattn_decode_task(
        const fattn_op & op, const fattn_tasks & tasks, int64_t t, int64_t t_next, float * scratch, float * partials);
void fattn_tile_task(
        const fattn_op & op, const fattn_tasks & tasks, int64_t t, float * scratch, const uint8_t * map,
        float * partials);

int64_t fattn_decode_scratch(const fattn_op & op, int64_t n_heads); // floats, for tasks of up to n_heads KV heads
int64_t fattn_tile_scratch(const fattn_op & op, int64_t n_tokens);  // floats, for tasks of up to n_tokens

inline size_t fattn_padded(size_t n) { return (n + 15)/16*16; } // floats, to whole cache lines

// Prefetches what is read next, `ahead` bytes on. A head's values are a short piece of each row of the KV cache, so
// to the hardware's prefetcher the walk looks like jumps from page to page.
inline void fattn_fetch(const char * p, ptrdiff_t ahead, int bytes) {
#if defined(__GNUC__)
    for (int b = 0; b < bytes; b += 64) {
        __builtin_prefetch(p + ahead + b, 0, 2); // into the L2 cache: L1 is too small
    }
#else
    GGML_UNUSED(p);
    GGML_UNUSED(ahead);
    GGML_UNUSED(bytes);
#endif
}

inline bool fattn_all_masked(const ggml_fp16_t * mask, int n) {
    uint16_t differ = 0;
    for (int i = 0; i < n; ++i) {
        differ |= mask[i] ^ 0xFC00; // -INFINITY
    }
    return differ == 0;
}

inline void fattn_scale(float * x, int64_t n, float by) {
    for (int64_t i = 0; i < n; ++i) {
        x[i] *= by;
    }
}
