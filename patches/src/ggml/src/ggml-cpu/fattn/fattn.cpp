// Flash attention on the CPU: which ops are taken, how they are cut into tasks, and the merge (see fattn.h).

#include "fattn.h"
#include "fattn-op.h"
#include "fattn-quants.h"
#include "fattn-rows.h"

#include <cfloat>
#include <cmath>
#include <cstdlib>

static bool is_readable(const ggml_tensor * kv) {
    switch (kv->type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16: return kv->nb[0] == ggml_type_size(kv->type);
        default:             return kv->nb[0] == ggml_type_size(kv->type) && ggml_get_type_traits(kv->type)->to_float;
    }
}

fattn_op::fattn_op(const ggml_tensor * op)
    : q(op->src[0]), k(op->src[1]), v(op->src[2]), mask(op->src[3]),
      sinks(op->src[4] ? (const float *) op->src[4]->data : nullptr), dst(const_cast<ggml_tensor *>(op)),
      DK(k->ne[0]), DV(v->ne[0]), n_q(q->ne[1]), n_head(q->ne[2]), n_head_kv(k->ne[2]), n_stream(q->ne[3]),
      n_cols(ggml_kv_blocks_n_cols(op)), n_masked(mask ? ggml_kv_blocks_n_masked_cols(op) : 0),
      group(n_head/std::max<int64_t>(n_head_kv, 1)),
      scale(ggml_get_op_params_f32(op, 0)), max_bias(ggml_get_op_params_f32(op, 1)),
      softcap(ggml_get_op_params_f32(op, 2)) {
    if (softcap != 0.0f) {
        scale /= softcap;
    }
}

float fattn_op::slope(int64_t head) const {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const int64_t n = (int64_t) 1 << (int) floorf(log2f((float) n_head)); // heads of the first geometric series
    return head < n ? powf(2.0f, -max_bias*(head + 1)/n) : powf(2.0f, -max_bias/2.0f*(2*(head - n) + 1)/n);
}

fattn_tasks::fattn_tasks(const fattn_op & op, int n_threads) {
    // Several tasks per thread, since threads are not equally fast.
    const int64_t n_ideal = n_threads == 1 ? 1 : 4*n_threads;
    const int64_t n_tiles = std::max<int64_t>(op.n_tiles(), 1);
    int64_t splits;

    decode = op.group*op.n_q <= FATTN_DECODE_ROWS;
    if (decode) {
        // A range of columns for all KV heads reads memory in order. With too few tiles for n_ideal ranges, KV heads
        // are divided among tasks as well.
        const int64_t blocks = std::min(op.n_head_kv, (n_ideal + n_tiles*op.n_stream - 1)/(n_tiles*op.n_stream));
        block    = (op.n_head_kv + blocks - 1)/blocks;
        n_blocks = (op.n_head_kv + block - 1)/block;
        splits   = n_ideal/(n_blocks*op.n_stream);
        scratch  = fattn_decode_scratch(op, block);
        map      = 0;
    } else {
        // Q and O of a task should stay in the L2 cache. Fewer rows only where threads would idle, and then ranges of
        // columns.
        int64_t rows = std::min<int64_t>(512, std::max<int64_t>(64, 131072/(op.DK + op.DV)));
        for (;; rows /= 2) {
            n_blocks = (op.n_q*op.group + rows - 1)/rows;
            block    = (op.n_q + n_blocks - 1)/n_blocks;
            n_blocks = (op.n_q + block - 1)/block;
            if (rows <= 64 || n_blocks*op.n_head_kv*op.n_stream >= n_ideal) {
                break;
            }
        }
        splits  = n_ideal/(n_blocks*op.n_head_kv*op.n_stream);
        scratch = fattn_tile_scratch(op, block);
        map     = op.mask && op.mask->ne[2] == 1 ? fattn_map_rows(op)*(op.n_masked/FATTN_TILE + 1) : 0;
    }
    splits      = std::min(n_tiles, std::max<int64_t>(1, splits));
    tiles_split = (n_tiles + splits - 1)/splits;
    n_splits    = (n_tiles + tiles_split - 1)/tiles_split;
    n_tasks     = op.n_stream*n_splits*n_blocks*(decode ? 1 : op.n_head_kv);
    partial     = decode || n_splits > 1 ? fattn_padded(op.DV + 2) : 0;
}

int64_t fattn_map_rows(const fattn_op & op) {
    return op.mask->ne[3]*((op.n_q + FATTN_MAP_TOKENS - 1)/FATTN_MAP_TOKENS);
}

void fattn_map_mask(const fattn_op & op, int64_t row, uint8_t * map) {
    const int64_t per_stream = (op.n_q + FATTN_MAP_TOKENS - 1)/FATTN_MAP_TOKENS;
    const int64_t stream = row/per_stream;
    const int64_t t0     = row % per_stream*FATTN_MAP_TOKENS;
    const int64_t t1     = std::min(t0 + FATTN_MAP_TOKENS, op.n_q);
    const int64_t n      = std::min(op.n_masked, op.n_cols);
    const int64_t width  = op.n_masked/FATTN_TILE + 1;
    memset(map + row*width, 0, width);
    for (int64_t t = t0; t < t1; ++t) {
        for (int64_t col = 0; col < n; col += FATTN_TILE) {
            const ggml_fp16_t * m = op.mask_row(stream, 0, t, col);
            const int64_t end = std::min<int64_t>(FATTN_TILE, n - col);
            uint16_t not_inf = 0, not_zero = 0; // bits in which some value differs from -INFINITY, from 0
            for (int64_t i = 0; i < end; ++i) {
                not_inf  |= m[i] ^ 0xFC00;
                not_zero |= m[i] & 0x7FFF;
            }
            map[row*width + col/FATTN_TILE] |=
                !not_zero ? FATTN_MASK_CLEAR : !not_inf ? FATTN_MASK_HIDES : FATTN_MASK_MIXED;
        }
    }
}

uint8_t fattn_mask_of(const fattn_op & op, const uint8_t * map, int64_t stream, int64_t t0, int64_t n_t, int64_t tile) {
    if (!op.mask || tile*FATTN_TILE >= op.n_masked) {
        return FATTN_MASK_CLEAR;
    }
    if (!map) {
        return FATTN_MASK_MIXED; // a mask for each head
    }
    const int64_t per_stream = (op.n_q + FATTN_MAP_TOKENS - 1)/FATTN_MAP_TOKENS;
    const int64_t width = op.n_masked/FATTN_TILE + 1;
    const uint8_t * rows = map + stream % op.mask->ne[3]*per_stream*width + tile;
    uint8_t bits = 0;
    for (int64_t r = t0/FATTN_MAP_TOKENS; r <= (t0 + n_t - 1)/FATTN_MAP_TOKENS; ++r) {
        bits |= rows[r*width];
    }
    return bits;
}

// A row of the output: its partial results over the ranges of columns, in order, and the sink's logit.
static void merge(const fattn_op & op, const fattn_tasks & tasks, int64_t row, float * partials) {
    const int64_t token  = row % op.n_q;
    const int64_t head   = row/op.n_q % op.n_head;
    const int64_t stream = row/op.n_q/op.n_head;

    float m = op.sinks ? std::max(op.sinks[head], -FLT_MAX) : -FLT_MAX; // finite, or differences would be NaN
    for (int64_t i = 0; i < tasks.n_splits; ++i) {
        m = std::max(m, *fattn_partial_at(op, tasks, partials, i, row).m);
    }
    float * out = op.out_row(stream, head, token);
    memset(out, 0, op.DV*sizeof(float));
    float l = op.sinks ? expf(op.sinks[head] - m) : 0.0f;
    for (int64_t i = 0; i < tasks.n_splits; ++i) {
        const fattn_partial part = fattn_partial_at(op, tasks, partials, i, row);
        l += *part.l*expf(*part.m - m);
    }
    if (l == 0.0f) {
        return; // no visible column
    }
    for (int64_t i = 0; i < tasks.n_splits; ++i) {
        const fattn_partial part = fattn_partial_at(op, tasks, partials, i, row);
        const float weight = expf(*part.m - m)/l;
        if (weight == 0.0f) {
            continue;
        }
        for (int64_t d = 0; d < op.DV; ++d) {
            out[d] += weight*part.O[d];
        }
    }
}

template <class Row> static void row_to_float(const char * from, int64_t ne, float * out) {
    const Row row(from);
    constexpr int step = Row::N*VF_W;
    int64_t i = 0;
    for (; i + step <= ne; i += step) {
        vf x[Row::N];
        row.load(x, i);
        for (int j = 0; j < Row::N; ++j) {
            vf_store(out + i + j*VF_W, x[j]);
        }
    }
    if (i < ne) { // only rows without blocks have a rest
        vf_store_part(out + i, row.part(i, ne - i), ne - i);
    }
}

void fattn_to_float(const ggml_tensor * kv, const char * rows, int n_rows, int64_t ne, float * out, int64_t ld) {
    for (int r = 0; r < n_rows; ++r, rows += kv->nb[1], out += ld) {
        switch (kv->type) {
            case GGML_TYPE_F32:    row_to_float<row_f32 >(rows, ne, out); break;
            case GGML_TYPE_F16:    row_to_float<row_f16 >(rows, ne, out); break;
            case GGML_TYPE_BF16:   row_to_float<row_bf16>(rows, ne, out); break;
            case GGML_TYPE_Q8_0:   blocks_to_float<block_q8_0  >(rows, ne, out); break;
            case GGML_TYPE_Q4_0:   blocks_to_float<block_q4_0  >(rows, ne, out); break;
            case GGML_TYPE_Q4_1:   blocks_to_float<block_q4_1  >(rows, ne, out); break;
            case GGML_TYPE_Q5_0:   blocks_to_float<block_q5_0  >(rows, ne, out); break;
            case GGML_TYPE_Q5_1:   blocks_to_float<block_q5_1  >(rows, ne, out); break;
            case GGML_TYPE_IQ4_NL: blocks_to_float<block_iq4_nl>(rows, ne, out); break;
            default:               ggml_get_type_traits(kv->type)->to_float(rows, out, ne);
        }
    }
}

bool ggml_fattn_cpu_takes(const ggml_tensor * op) {
    static const bool off = [] { const char * s = getenv("GGML_CPU_FATTN"); return s && strcmp(s, "0") == 0; }();
    if (off) {
        return false;
    }
    const ggml_tensor * q = op->src[0];
    const ggml_tensor * k = op->src[1];
    const ggml_tensor * v = op->src[2];
    const bool same_shape = k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3];
    return same_shape && q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && is_readable(k) && is_readable(v) &&
        q->ne[2] % k->ne[2] == 0 && q->ne[3] % k->ne[3] == 0;
}

size_t ggml_fattn_cpu_work_size(const ggml_tensor * tensor, int n_threads) {
    if (!ggml_fattn_cpu_takes(tensor)) {
        return 0;
    }
    const fattn_op op(tensor);
    size_t floats = 0, bytes = 0;
    for (int n = 1; n <= n_threads; ++n) { // a graph may run on fewer threads than it was planned for
        const fattn_tasks tasks(op, n);
        floats = std::max(floats, n*tasks.scratch + tasks.partials(op));
        bytes  = std::max(bytes, tasks.map);
    }
    return 64 + floats*sizeof(float) + bytes;
}

void ggml_fattn_cpu_compute(const ggml_compute_params * params, ggml_tensor * tensor) {
    const fattn_op   op(tensor);
    const fattn_tasks tasks(op, params->nth);

    float   * work     = (float *) (((uintptr_t) params->wdata + 63)/64*64);
    float   * scratch  = work + params->ith*tasks.scratch;
    float   * partials = work + params->nth*tasks.scratch;
    uint8_t * map      = (uint8_t *) (partials + tasks.partials(op));
    GGML_ASSERT(map + tasks.map <= (uint8_t *) params->wdata + params->wsize);

    if (tasks.map > 0) {
        for (int64_t row = params->ith; row < fattn_map_rows(op); row += params->nth) {
            fattn_map_mask(op, row, map);
        }
    }
    // Each thread's first task is fixed; the counter hands out the others.
    const bool counted = tasks.n_tasks > params->nth;
    if (counted && params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    if (counted || tasks.map > 0) {
        ggml_barrier(params->threadpool);
    }
    const auto take_task = [&]() -> int64_t {
        return counted ? ggml_threadpool_chunk_add(params->threadpool, 1) : tasks.n_tasks;
    };
    for (int64_t t = params->ith, next; t < tasks.n_tasks; t = next) {
        if (tasks.decode) {
            next = take_task(); // before this one runs, which prefetches it
            fattn_decode_task(op, tasks, t, next, scratch, partials);
        } else {
            fattn_tile_task(op, tasks, t, scratch, tasks.map > 0 ? map : nullptr, partials);
            next = take_task();
        }
    }
    if (tasks.partial > 0) {
        ggml_barrier(params->threadpool);
        for (int64_t row = params->ith; row < op.n_rows(); row += params->nth) {
            merge(op, tasks, row, partials);
        }
    }
}
