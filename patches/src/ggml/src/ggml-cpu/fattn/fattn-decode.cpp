// Attention of few query rows: split-KV, one pass over K and V for all the query heads that share them.
//
// Why: decode reads the whole cache for one token, so the time is that of reading it once. A task takes a range of
// KV tiles and walks it in the order of memory, a step of columns at a time, of those head by head, since a cell's heads
// lie side by side: first the scores of all heads, then the weights of all rows, then the outputs, so that what one row
// has to wait for, another one fills. Meanwhile the next step is fetched. K/V in f32, f16, bf16 or q8_0 are read as they
// are, other types are converted a step at a time.
//
// Use: fattn.cpp calls fattn_decode_task() when a KV head has at most FATTN_DECODE_ROWS query rows.

#include "fattn.h"
#include "fattn-decode-float.h"
#include "fattn-decode-q8.h"
#include "fattn-plan.h"
#include "fattn-quants.h"

#include <cfloat>
#include <type_traits>

namespace {

constexpr int ROWS = FATTN_REGISTERS >= 32 ? 4 : 2; // query rows of a micro-kernel
constexpr int STEP = 64; // columns at a time: what two steps of all heads hold stays in the second-level cache
static_assert(FATTN_TILE % STEP == 0, "a step must not straddle two tiles");

// f(R, r) for the query rows [r, r + R), R being known at compile time: ROWS of them, at last fewer.
template <class F> void in_blocks(int n_rows, F f) {
    for (int r = 0; r < n_rows; r += ROWS) {
        switch (std::min(ROWS, n_rows - r)) {
            case 1: f(std::integral_constant<int, 1>(), r); break;
            case 2: f(std::integral_constant<int, 2>(), r); break;
            case 3: f(std::integral_constant<int, std::min(3, ROWS)>(), r); break;
            case 4: f(std::integral_constant<int, ROWS>(), r); break;
        }
    }
}

// A row's scores of a step, scaled, capped and masked, -INFINITY from n on. Returns the largest.
float finish_scores(const fattn_op & op, float * s, int n, const ggml_fp16_t * mask, float slope) {
    vf top = vf_set1(-INFINITY);
    for (int i = 0; i < STEP; i += VF_W) {
        const int rest = std::max(0, std::min(VF_W, n - i));
        vf x = vf_mul(vf_load(s + i), vf_set1(op.scale));
        if (op.softcap != 0.0f) {
            x = vf_mul(vf_tanh(x), vf_set1(op.softcap));
        }
        if (mask && rest > 0) {
            x = vf_fma(vf_set1(slope), rest < VF_W ? row_f16(mask).part(i, rest) : vf_load_f16(mask + i), x);
        }
        vf_store(s + i, x);
        if (rest < VF_W) {
            std::fill(s + i + rest, s + i + VF_W, -INFINITY);
            x = vf_load(s + i);
        }
        top = vf_max(top, x);
    }
    return vf_hmax(top);
}

// s = e^(s - from), 0 for -INFINITY. Returns the sum.
float exponentials(float * s, float from) {
    vf sum = vf_zero();
    for (int i = 0; i < STEP; i += VF_W) {
        const vf e = vf_exp(vf_sub(vf_load(s + i), vf_set1(from)));
        vf_store(s + i, e);
        sum = vf_add(sum, e);
    }
    return vf_sum(sum);
}

bool visible(const fattn_op & op, int64_t stream, int64_t head, int64_t n_heads, int64_t col, int n) {
    for (int64_t h = head; h < head + n_heads; ++h) {
        for (int64_t t = 0; t < op.n_q; ++t) {
            const ggml_fp16_t * m = op.mask_row(stream, h, t, col);
            if (!m || !fattn_all_masked(m, n)) {
                return true;
            }
        }
    }
    return false;
}

bool in_floats(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}
bool k_as_q8_0(const fattn_op & op) { return FATTN_INT && fattn_like_q8_0(op.k->type); }
bool v_as_q8_0(const fattn_op & op) { return FATTN_INT && fattn_v_in_16_bits(op); }

// A query row of a task.
struct row_of_task {
    const float       * q;
    const ggml_fp16_t * mask; // of the first column, or NULL
    float               slope;
};

// What a task keeps beside its partial results. Floats, in the order of memory; rows are those of all its KV heads.
struct workspace {
    row_of_task * row;
    float * s;       // [row][STEP], scores and then weights
    float * most;    // [row], the largest score so far
    float * sum;     // [row], of the weights so far
    float * top;     // [row], the largest score of a step
    float * from;    // [row], weights of a step are e^(score - from)
    float * times;   // [row], and are to be multiplied by this
    float * shrink;  // [row], as what is there already by this
    float * query;   // k_as_q8_0: [row], rounded
    float * rows;    // [STEP rows of K or V], where they can't be read as they are
    float * halves;  // 16 bits: 2 of [blocks of K or V][STEP], the scales of two heads
    float * scales;  // [blocks of V][STEP], those of V
    float * largest; // [blocks of V], of those
    float * unit;    // [ROWS][blocks of V]
    float * weight;  // 16 bits: [ROWS][blocks of V][STEP]
    int64_t size;

    workspace(const fattn_op & op, int64_t n_heads, float * at) {
        const int64_t widest = std::max(op.DK, op.DV);
        const auto take = [&](size_t n) { float * p = at + size; size += fattn_padded(n); return p; };
        const int64_t n_rows = n_heads*op.group*op.n_q;
        size = 0;
        row    = (row_of_task *) take(n_rows*sizeof(row_of_task)/sizeof(float));
        s      = take(n_rows*STEP);
        most   = take(n_rows);
        sum    = take(n_rows);
        top    = take(n_rows);
        from   = take(n_rows);
        times  = take(n_rows);
        shrink = take(n_rows);
        query  = rows = halves = scales = largest = unit = weight = nullptr;
        if (!in_floats(op.k->type) || !in_floats(op.v->type)) {
            rows = take(STEP*widest);
        }
#if FATTN_INT
        query   = take(n_rows*q8_block::floats(op.DK));
        halves  = take(2*(widest/QK8_0)*STEP/2);
        scales  = take(op.DV/QK8_0*STEP);
        largest = take(op.DV/QK8_0);
        unit    = take(ROWS*(op.DV/QK8_0));
        weight  = take(ROWS*(op.DV/QK8_0)*STEP/2);
#endif
    }
};

// n rows where they can be read: nb bytes apart, the same rows of the next columns `ahead` bytes on.
struct rows_at { const char * p; size_t nb; int n; ptrdiff_t ahead; };

void fetch_rows(const ggml_tensor * kv, rows_at rows, int64_t ne) {
    for (int c = 0; c < rows.n; ++c) {
        fattn_fetch(rows.p + c*rows.nb, rows.ahead, ggml_row_size(kv->type, ne));
    }
}

rows_at rows_as_f32(const ggml_tensor * kv, rows_at from, int64_t ne, float * to) {
    fetch_rows(kv, from, ne);
    fattn_to_float(kv, from.p, from.n, ne, to, ne);
    return { (const char *) to, ne*sizeof(float), from.n, 0 };
}

template <class K> void scores_in_floats(rows_at k, int n_rows, const float * const * q, int64_t dk, float * s) {
    in_blocks(n_rows, [&](auto R, int r) { dots<K, R.value>(k.p, k.nb, k.n, q + r, dk, s + r*STEP, STEP, k.ahead); });
}
template <class V> void outputs_in_floats(rows_at v, int n_rows, const float * p, int64_t dv, float * o, int64_t ldo) {
    in_blocks(n_rows, [&](auto R, int r) { sums_of_row<V, R.value>(v.p, v.nb, v.n, p + r*STEP, STEP, dv, o + r*ldo, ldo, v.ahead); });
}

fattn_ahead nothing; // stays so

// Whether the rows of all heads are read as they are and lie side by side, so that they can be fetched in runs.
bool in_runs(const fattn_op & op, const ggml_tensor * kv) {
    return (kv == op.k ? k_as_q8_0(op) : v_as_q8_0(op)) && kv->type == GGML_TYPE_Q8_0 && (kv->nb[2] <= kv->nb[1] || kv->ne[2] == 1);
}

#if FATTN_INT
// At least VF_W rows can be read there.
rows_at rows_as_q8_0(const ggml_tensor * kv, rows_at from, int64_t ne, float * to) {
    if (kv->type == GGML_TYPE_Q8_0 && from.n >= VF_W) {
        return from;
    }
    fetch_rows(kv, from, ne);
    const size_t nb = ne/QK8_0*sizeof(block_q8_0);
    for (int c = 0; c < from.n; ++c) {
        fattn_as_q8_0(kv->type, from.p + c*from.nb, ne, (block_q8_0 *) ((char *) to + c*nb));
    }
    for (int c = from.n; c < VF_W; ++c) {
        memset((char *) to + c*nb, 0, nb);
    }
    return { (const char *) to, nb, from.n, 0 };
}

// For the further rows of a head; what goes along went with the first.
q8_along no_more(const q8_along & along) { return { along.scales, q8_scales(), &nothing }; }

void scores_in_integers(rows_at k, const q8_along & along, int n_rows, const float * query, int64_t dk, float * s) {
    in_blocks(n_rows, [&](auto R, int r) {
        const q8_block * rounded = (const q8_block *) (query + r*q8_block::floats(dk));
        q8_dots<R.value, STEP>(k.p, k.nb, std::max(k.n, VF_W), rounded, dk/QK8_0, s + r*STEP, r == 0 ? along : no_more(along));
    });
}
void outputs_in_integers(rows_at v, const q8_along & along, int n_rows, const workspace & work, const float * p, const float * times, int64_t dv,
        float * o, int64_t ldo) {
    q8_largest<STEP>(along.scales, dv/QK8_0, work.scales, work.largest);
    in_blocks(n_rows, [&](auto R, int r) {
        int16_t * w = (int16_t *) work.weight;
        q8_weights<STEP>(p + r*STEP, times + r, R.value, work.scales, work.largest, dv/QK8_0, w, work.unit);
        q8_sums_of_row<R.value, STEP>(v.p, v.nb, v.n, w, work.unit, dv/QK8_0, o + r*ldo, ldo, r == 0 ? along : no_more(along));
    });
}
#endif

// s[r][c]: the query rows q[r], rounded ones from `query` on, times rows of K
void scores(const fattn_op & op, const workspace & work, rows_at k, const q8_along & along, int n_rows, const float * const * q, const float * query,
        float * s) {
    switch (op.k->type) {
        case GGML_TYPE_F32:  return scores_in_floats<row_f32 >(k, n_rows, q, op.DK, s);
        case GGML_TYPE_F16:  return scores_in_floats<row_f16 >(k, n_rows, q, op.DK, s);
        case GGML_TYPE_BF16: return scores_in_floats<row_bf16>(k, n_rows, q, op.DK, s);
        default: break;
    }
#if FATTN_INT
    if (k_as_q8_0(op)) {
        return scores_in_integers(rows_as_q8_0(op.k, k, op.DK, work.rows), along, n_rows, query, op.DK, s);
    }
#endif
    GGML_UNUSED(query);
    GGML_UNUSED(along);
    scores_in_floats<row_f32>(rows_as_f32(op.k, k, op.DK, work.rows), n_rows, q, op.DK, s);
}

// o[r] += times[r] * p[r][c] * v[c] over rows of V; p is 0 behind them, times 1 unless v_as_q8_0
void outputs(const fattn_op & op, const workspace & work, rows_at v, const q8_along & along, int n_rows, const float * p, const float * times,
        float * o, int64_t ldo) {
    switch (op.v->type) {
        case GGML_TYPE_F32:  return outputs_in_floats<row_f32 >(v, n_rows, p, op.DV, o, ldo);
        case GGML_TYPE_F16:  return outputs_in_floats<row_f16 >(v, n_rows, p, op.DV, o, ldo);
        case GGML_TYPE_BF16: return outputs_in_floats<row_bf16>(v, n_rows, p, op.DV, o, ldo);
        default: break;
    }
#if FATTN_INT
    if (v_as_q8_0(op)) {
        return outputs_in_integers(rows_as_q8_0(op.v, v, op.DV, work.rows), along, n_rows, work, p, times, op.DV, o, ldo);
    }
#endif
    GGML_UNUSED(times);
    GGML_UNUSED(along);
    outputs_in_floats<row_f32>(rows_as_f32(op.v, v, op.DV, work.rows), n_rows, p, op.DV, o, ldo);
}

// What a task reads: columns [c0, c1) of the KV heads [h0, h1).
struct range {
    int64_t stream, h0, h1, c0, c1;

    range(const fattn_op & op, const fattn_plan & plan, int64_t t)
        : stream(t/plan.n_blocks/plan.n_splits), h0(t % plan.n_blocks*plan.block), h1(std::min(h0 + plan.block, op.n_head_kv)),
          c0(t/plan.n_blocks % plan.n_splits*plan.tiles_split*FATTN_TILE), c1(std::min(c0 + plan.tiles_split*FATTN_TILE, op.n_cols)) {}
};

} // namespace

int64_t fattn_decode_scratch(const fattn_op & op, int64_t n_heads) { return workspace(op, n_heads, nullptr).size; }

void fattn_decode_task(const fattn_op & op, const fattn_plan & plan, int64_t t, int64_t next, float * scratch, float * partials) {
    const range now(op, plan, t), then(op, plan, std::min(next, plan.n_tasks - 1));
    const int64_t stream = now.stream, split = t/plan.n_blocks % plan.n_splits;
    const int64_t h0 = now.h0, h1 = now.h1, c0 = now.c0, c1 = now.c1;
    const int     n_rows = op.group*op.n_q;  // of a KV head
    const int     all    = (h1 - h0)*n_rows;

    const workspace work(op, plan.block, scratch);
    std::fill(work.most, work.most + fattn_padded(all), -INFINITY);
    std::fill(work.top,  work.top  + fattn_padded(all), -INFINITY);
    memset(work.sum, 0, all*sizeof(float));
    float * const o = fattn_partial_at(op, plan, partials, split, op.row(stream, h0*op.group, 0)).o; // rows follow each other
    for (int r = 0; r < all; ++r) {
        memset(o + r*plan.partial, 0, op.DV*sizeof(float));
    }
    for (int r = 0; r < all; ++r) {
        const int64_t head = h0*op.group + r/op.n_q, token = r % op.n_q;
        work.row[r] = { op.q_row(stream, head, token), op.mask_row(stream, head, token, 0), op.slope(head) };
    }
#if FATTN_INT
    const int64_t rounded = q8_block::floats(op.DK);
    if (k_as_q8_0(op)) {
        for (int r = 0; r < all; ++r) {
            q8_query(work.row[r].q, op.DK, (q8_block *) (work.query + r*rounded));
        }
    }
#else
    const int64_t rounded = 0;
#endif

    const bool mask_of_head = op.mask && op.mask->ne[2] > 1;
    for (int64_t col = c0; col < c1; col += STEP) {
        const int n = std::min<int64_t>(STEP, c1 - col);
        if (!mask_of_head && !visible(op, stream, h0*op.group, 1, col, n)) {
            continue;
        }
        // Where a head's rows are, and how far on its rows of the next step, or of the next task's first one.
        const auto rows = [&](const ggml_tensor * kv, int64_t h) {
            const char * p = op.rows_of(kv, stream, h, col);
            const char * q = p;
            if (col + STEP < c1) {
                q = op.rows_of(kv, stream, h, col + STEP);
            } else if (next < plan.n_tasks) {
                q = op.rows_of(kv, then.stream, std::min(then.h0 + h - h0, then.h1 - 1), then.c0);
            }
            return rows_at{ p, kv->nb[1], n, q - p };
        };
        fattn_ahead ahead;
        if (col + STEP < c1 || next < plan.n_tasks) {
            const int k_runs = in_runs(op, op.k) ? fattn_ahead::RUNS/(in_runs(op, op.v) ? 2 : 1) : 0;
            const int v_runs = in_runs(op, op.v) ? fattn_ahead::RUNS - k_runs : 0;
            ahead.add(0,      k_runs, rows(op.k, h0).ahead + op.rows_of(op.k, stream, h0, col), STEP*op.k->nb[1]);
            ahead.add(k_runs, v_runs, rows(op.v, h0).ahead + op.rows_of(op.v, stream, h0, col), STEP*op.v->nb[1]);
        }
        int64_t copied = -1; // the head whose scales are
        const auto along = [&](const ggml_tensor * kv, int64_t h) {
            const auto scales = [&](int64_t h) {
                ggml_fp16_t * d = (ggml_fp16_t *) work.halves + h % 2*(std::max(op.DK, op.DV)/QK8_0*STEP);
                return q8_scales{ op.rows_of(kv, stream, h, col), kv->nb[1], ggml_type_size(kv->type), n, d };
            };
            const int blocks = kv->ne[0]/QK8_0;
            const q8_scales now = scales(h), coming = h + 1 < h1 ? scales(h + 1) : q8_scales();
            if (copied != h) {
                now.zero_rest<STEP>(blocks);
                now.copy_all<STEP>(blocks);
            }
            if (coming.n > 0) {
                coming.zero_rest<STEP>(blocks);
            }
            copied = h + 1;
            return q8_along{ now.d, coming, in_runs(op, kv) ? &ahead : &nothing };
        };
        for (int64_t h = h0; h < h1; ++h) {
            const int first = (h - h0)*n_rows;
            if (mask_of_head && !visible(op, stream, h*op.group, op.group, col, n)) {
                std::fill(work.top + first, work.top + first + n_rows, -INFINITY);
                continue;
            }
            const float * q[FATTN_DECODE_ROWS];
            for (int r = 0; r < n_rows; ++r) {
                q[r] = work.row[first + r].q;
            }
            const q8_along with = k_as_q8_0(op) ? along(op.k, h) : q8_along();
            scores(op, work, rows(op.k, h), with, n_rows, q, work.query + first*rounded, work.s + first*STEP);
            for (int r = first; r < first + n_rows; ++r) {
                const ggml_fp16_t * mask = col < op.n_masked ? work.row[r].mask + col : nullptr;
                work.top[r] = finish_scores(op, work.s + r*STEP, n, mask, work.row[r].slope);
            }
        }
        for (int r = 0; r < all; r += VF_W) { // of rows that see nothing everything stays as it is
            const vf most = vf_load(work.most + r), top = vf_load(work.top + r);
            const vf now  = vf_max(vf_max(most, top), vf_set1(-FLT_MAX));
            const vf from = v_as_q8_0(op) ? vf_max(top, vf_set1(-FLT_MAX)) : now;
            vf_store(work.most   + r, now);
            vf_store(work.from   + r, from);
            vf_store(work.times  + r, vf_exp(vf_sub(from, now)));
            vf_store(work.shrink + r, vf_exp(vf_sub(most, now)));
        }
        for (int r = 0; r < all; ++r) {
            if (work.top[r] != -INFINITY) {
                work.sum[r] = work.sum[r]*work.shrink[r] + work.times[r]*exponentials(work.s + r*STEP, work.from[r]);
            } else {
                memset(work.s + r*STEP, 0, STEP*sizeof(float));
            }
            if (work.shrink[r] != 1.0f) {
                fattn_scale(o + r*plan.partial, op.DV, work.shrink[r]);
            }
        }
        copied = -1;
        for (int64_t h = h0; h < h1; ++h) {
            const int first = (h - h0)*n_rows;
            if (*std::max_element(work.top + first, work.top + first + n_rows) != -INFINITY) {
                const q8_along with = v_as_q8_0(op) ? along(op.v, h) : q8_along();
                outputs(op, work, rows(op.v, h), with, n_rows, work.s + first*STEP, work.times + first, o + first*plan.partial, plan.partial);
            }
        }
        ahead.fetch_rest();
    }
    for (int r = 0; r < all; ++r) {
        const fattn_partial part = fattn_partial_at(op, plan, partials, split, op.row(stream, h0*op.group, 0) + r);
        *part.m = work.sum[r] == 0.0f ? -INFINITY : work.most[r];
        *part.s = work.sum[r];
    }
}
