// Attention of few query rows: split-KV, one pass over K and V for all the query heads that share them.
//
// Why: decode reads the whole cache for one token, so its time is that of reading the cache once. A task takes a range
// of KV tiles and walks it in the order of memory, a step of columns at a time, and those head by head, since a cell's
// heads lie side by side: first the scores of all heads, then the weights of all rows, then the outputs, so that other
// rows fill the time that one row has to wait. Meanwhile the next step is prefetched. K/V in f32, f16, bf16 or q8_0 are
// read as they are, other types are converted a step at a time.
//
// Use: fattn.cpp calls fattn_decode_task() when a KV head has at most FATTN_DECODE_ROWS query rows.

#include "fattn.h"
#include "fattn-decode-float.h"
#include "fattn-decode-q8.h"
#include "fattn-op.h"
#include "fattn-quants.h"

#include <cfloat>
#include <type_traits>

namespace {

constexpr int ROWS = FATTN_REGISTERS >= 32 ? 4 : 2; // query rows of a micro-kernel
constexpr int STEP = 64; // columns at a time: what two steps of all heads hold stays in the L2 cache
static_assert(FATTN_TILE % STEP == 0, "a step must not straddle two tiles");

// f(R, r) for the query rows [r, r + R), R being known at compile time: ROWS of them, finally fewer.
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

bool in_floats(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}
bool k_as_q8_0(const fattn_op & op) { return FATTN_INT && fattn_like_q8_0(op.k->type); }
bool v_as_q8_0(const fattn_op & op) { return FATTN_INT && fattn_v_in_16_bits(op); }

// Whether the rows of all heads are read as they are and lie side by side, so that they can be prefetched in runs.
bool in_runs(const fattn_op & op, const ggml_tensor * kv) {
    return (kv == op.k ? k_as_q8_0(op) : v_as_q8_0(op)) && kv->type == GGML_TYPE_Q8_0 &&
        (kv->nb[2] <= kv->nb[1] || kv->ne[2] == 1);
}

// A query row of a task.
struct query_row {
    const float       * q;
    const ggml_fp16_t * mask; // of the first column, or NULL
    float               slope;
};

// Scratch memory of a task, beside its partial results. Rows are those of all its KV heads.
struct workspace {
    query_row * row;
    float * S;         // [row][STEP], scores, then the weights P in their place
    float * m;         // [row]
    float * l;         // [row]
    float * m_step;    // [row], largest score of a step
    float * base;      // [row], the weights of a step are P = e^(S - base)
    float * beta;      // [row], and count as beta*P
    float * alpha;     // [row]
    float * q_int;     // k_as_q8_0: [row], rounded query rows
    float * converted; // [STEP rows of K or V], where they can't be read as they are
    float * scales_16; // in 16 bits: 2 of [blocks of K or V][STEP], the scales of two heads
    float * scales;    // [blocks of V][STEP], those of V
    float * largest;   // [blocks of V], of those
    float * unit;      // [ROWS][blocks of V]
    float * weights;   // in 16 bits: [ROWS][blocks of V][STEP]
    int64_t size;      // floats

    workspace(const fattn_op & op, int64_t n_heads, float * at) {
        const int64_t widest = std::max(op.DK, op.DV);
        const auto take = [&](size_t n) { float * p = at + size; size += fattn_padded(n); return p; };
        const int64_t n_rows = n_heads*op.group*op.n_q;
        size = 0;
        row    = (query_row *) take(n_rows*sizeof(query_row)/sizeof(float));
        S      = take(n_rows*STEP);
        m      = take(n_rows);
        l      = take(n_rows);
        m_step = take(n_rows);
        base   = take(n_rows);
        beta   = take(n_rows);
        alpha  = take(n_rows);
        q_int  = converted = scales_16 = scales = largest = unit = weights = nullptr;
        if (!in_floats(op.k->type) || !in_floats(op.v->type)) {
            converted = take(STEP*widest);
        }
#if FATTN_INT
        q_int     = take(n_rows*q8_block::floats(op.DK));
        scales_16 = take(2*(widest/QK8_0)*STEP/2);
        scales    = take(op.DV/QK8_0*STEP);
        largest   = take(op.DV/QK8_0);
        unit      = take(ROWS*(op.DV/QK8_0));
        weights   = take(ROWS*(op.DV/QK8_0)*STEP/2);
#endif
    }
};

// n rows of K or V, nb bytes apart; those to prefetch meanwhile are `ahead` bytes on.
struct kv_rows { const char * data; size_t nb; int n; ptrdiff_t ahead; };

//
// products with the rows of one head
//

void fetch_rows(const ggml_tensor * kv, kv_rows rows, int64_t ne) {
    for (int c = 0; c < rows.n; ++c) {
        fattn_fetch(rows.data + c*rows.nb, rows.ahead, ggml_row_size(kv->type, ne));
    }
}

kv_rows rows_as_f32(const ggml_tensor * kv, kv_rows from, int64_t ne, float * to) {
    fetch_rows(kv, from, ne);
    fattn_to_float(kv, from.data, from.n, ne, to, ne);
    return { (const char *) to, ne*sizeof(float), from.n, 0 };
}

template <class K> void scores_in_floats(kv_rows k, int n_rows, const float * const * q, int64_t dk, float * S) {
    in_blocks(n_rows, [&](auto R, int r) {
        dots<K, R.value>(k.data, k.nb, k.n, q + r, dk, S + r*STEP, STEP, k.ahead);
    });
}
template <class V> void outputs_in_floats(kv_rows v, int n_rows, const float * P, int64_t dv, float * O, int64_t ldo) {
    in_blocks(n_rows, [&](auto R, int r) {
        sums_of_row<V, R.value>(v.data, v.nb, v.n, P + r*STEP, STEP, dv, O + r*ldo, ldo, v.ahead);
    });
}

fattn_prefetch no_prefetch; // never given any runs

#if FATTN_INT
// At least VF_W rows can be read there.
kv_rows rows_as_q8_0(const ggml_tensor * kv, kv_rows from, int64_t ne, float * to) {
    if (kv->type == GGML_TYPE_Q8_0 && from.n >= VF_W) {
        return from;
    }
    fetch_rows(kv, from, ne);
    const size_t nb = ne/QK8_0*sizeof(block_q8_0);
    for (int c = 0; c < from.n; ++c) {
        fattn_as_q8_0(kv->type, from.data + c*from.nb, ne, (block_q8_0 *) ((char *) to + c*nb));
    }
    for (int c = from.n; c < VF_W; ++c) {
        memset((char *) to + c*nb, 0, nb);
    }
    return { (const char *) to, nb, from.n, 0 };
}

// The side work is done along with a head's first rows; the further ones only need its scales.
q8_side_work only_scales(const q8_side_work & side) { return { side.scales, q8_scales(), &no_prefetch }; }

void scores_in_integers(
        kv_rows k, const q8_side_work & side, int n_rows, const float * q_int, int64_t dk, float * S) {
    in_blocks(n_rows, [&](auto R, int r) {
        const q8_block * q = (const q8_block *) (q_int + r*q8_block::floats(dk));
        q8_dots<R.value, STEP>(
            k.data, k.nb, std::max(k.n, VF_W), q, dk/QK8_0, S + r*STEP, r == 0 ? side : only_scales(side));
    });
}
void outputs_in_integers(kv_rows v, const q8_side_work & side, int n_rows, const workspace & work, const float * P,
        const float * beta, int64_t dv, float * O, int64_t ldo) {
    q8_largest<STEP>(side.scales, dv/QK8_0, work.scales, work.largest);
    in_blocks(n_rows, [&](auto R, int r) {
        int16_t * w = (int16_t *) work.weights;
        q8_weights<STEP>(P + r*STEP, beta + r, R.value, work.scales, work.largest, dv/QK8_0, w, work.unit);
        q8_sums_of_row<R.value, STEP>(
            v.data, v.nb, v.n, w, work.unit, dv/QK8_0, O + r*ldo, ldo, r == 0 ? side : only_scales(side));
    });
}
#endif

// S[r][c] = q[r] . k[c]; q_int: the same query rows rounded, for K as q8_0
void scores(const fattn_op & op, const workspace & work, kv_rows k, const q8_side_work & side, int n_rows,
        const float * const * q, const float * q_int, float * S) {
    switch (op.k->type) {
        case GGML_TYPE_F32:  return scores_in_floats<row_f32 >(k, n_rows, q, op.DK, S);
        case GGML_TYPE_F16:  return scores_in_floats<row_f16 >(k, n_rows, q, op.DK, S);
        case GGML_TYPE_BF16: return scores_in_floats<row_bf16>(k, n_rows, q, op.DK, S);
        default: break;
    }
#if FATTN_INT
    if (k_as_q8_0(op)) {
        return scores_in_integers(rows_as_q8_0(op.k, k, op.DK, work.converted), side, n_rows, q_int, op.DK, S);
    }
#endif
    GGML_UNUSED(q_int);
    GGML_UNUSED(side);
    scores_in_floats<row_f32>(rows_as_f32(op.k, k, op.DK, work.converted), n_rows, q, op.DK, S);
}

// O[r] += beta[r]*P[r][c] * v[c]. P is 0 past the last column, beta is 1 unless v_as_q8_0
void outputs(const fattn_op & op, const workspace & work, kv_rows v, const q8_side_work & side, int n_rows,
        const float * P, const float * beta, float * O, int64_t ldo) {
    switch (op.v->type) {
        case GGML_TYPE_F32:  return outputs_in_floats<row_f32 >(v, n_rows, P, op.DV, O, ldo);
        case GGML_TYPE_F16:  return outputs_in_floats<row_f16 >(v, n_rows, P, op.DV, O, ldo);
        case GGML_TYPE_BF16: return outputs_in_floats<row_bf16>(v, n_rows, P, op.DV, O, ldo);
        default: break;
    }
#if FATTN_INT
    if (v_as_q8_0(op)) {
        const kv_rows rows = rows_as_q8_0(op.v, v, op.DV, work.converted);
        return outputs_in_integers(rows, side, n_rows, work, P, beta, op.DV, O, ldo);
    }
#endif
    GGML_UNUSED(beta);
    GGML_UNUSED(side);
    outputs_in_floats<row_f32>(rows_as_f32(op.v, v, op.DV, work.converted), n_rows, P, op.DV, O, ldo);
}

//
// a task: setup, then scores, softmax and outputs step by step
//

// What a task reads: columns [c0, c1) of the KV heads [h0, h1).
struct range {
    int64_t stream, split, h0, h1, c0, c1;

    range(const fattn_op & op, const fattn_tasks & tasks, int64_t t)
        : stream(t/tasks.n_blocks/tasks.n_splits), split(t/tasks.n_blocks % tasks.n_splits),
          h0(t % tasks.n_blocks*tasks.block), h1(std::min(h0 + tasks.block, op.n_head_kv)),
          c0(split*tasks.tiles_split*FATTN_TILE), c1(std::min(c0 + tasks.tiles_split*FATTN_TILE, op.n_cols)) {}
};

struct decode_task {
    const fattn_op    & op;
    const fattn_tasks & tasks;
    const range         cur, next;    // next: of the thread's next task, if there is one
    const bool          has_next;
    const int           n_rows;       // query rows of a KV head
    const int           n_all;        // of all KV heads of the task
    const bool          mask_of_head; // each head has a mask of its own
    const workspace     work;
    const int64_t       ld_q_int;     // floats of a rounded query row
    float * const       O;            // [n_all], tasks.partial floats apart: rows follow each other
};

// A step: n columns from col on.
struct step {
    int64_t          col;
    int              n;
    fattn_prefetch & prefetch;
};

inline void setup(const decode_task & t) {
    const auto & op   = t.op;
    const auto & work = t.work;
    std::fill(work.m,      work.m      + fattn_padded(t.n_all), -INFINITY);
    std::fill(work.m_step, work.m_step + fattn_padded(t.n_all), -INFINITY);
    memset(work.l, 0, t.n_all*sizeof(float));
    for (int r = 0; r < t.n_all; ++r) {
        const int64_t head = t.cur.h0*op.group + r/op.n_q, token = r % op.n_q;
        work.row[r] = {
            op.q_row(t.cur.stream, head, token), op.mask_row(t.cur.stream, head, token, 0), op.slope(head) };
        memset(t.O + r*t.tasks.partial, 0, op.DV*sizeof(float));
    }
#if FATTN_INT
    if (k_as_q8_0(op)) {
        for (int r = 0; r < t.n_all; ++r) {
            q8_query(work.row[r].q, op.DK, (q8_block *) (work.q_int + r*t.ld_q_int));
        }
    }
#endif
}

// Whether some row of some heads sees one of n columns.
bool is_visible(const fattn_op & op, int64_t stream, int64_t head, int64_t n_heads, int64_t col, int n) {
    for (int64_t h = head; h < head + n_heads; ++h) {
        for (int64_t token = 0; token < op.n_q; ++token) {
            const ggml_fp16_t * mask = op.mask_row(stream, h, token, col);
            if (!mask || !fattn_all_masked(mask, n)) {
                return true;
            }
        }
    }
    return false;
}

// A KV head's rows of the step. Ahead are its rows of the next step, or of the next task's first one.
inline kv_rows rows_of(const decode_task & t, const step & s, const ggml_tensor * kv, int64_t h) {
    const char * data = t.op.rows_of(kv, t.cur.stream, h, s.col);
    const char * then = data;
    if (s.col + STEP < t.cur.c1) {
        then = t.op.rows_of(kv, t.cur.stream, h, s.col + STEP);
    } else if (t.has_next) {
        then = t.op.rows_of(kv, t.next.stream, std::min(t.next.h0 + h - t.cur.h0, t.next.h1 - 1), t.next.c0);
    }
    return { data, kv->nb[1], s.n, then - data };
}

// Prefetches the next step's rows of all heads, where they can be read in runs.
inline void start_prefetch(const decode_task & t, const step & s) {
    if (s.col + STEP >= t.cur.c1 && !t.has_next) {
        return;
    }
    const auto & op = t.op;
    const int k_runs = in_runs(op, op.k) ? fattn_prefetch::RUNS/(in_runs(op, op.v) ? 2 : 1) : 0;
    const int v_runs = in_runs(op, op.v) ? fattn_prefetch::RUNS - k_runs : 0;
    const kv_rows k = rows_of(t, s, op.k, t.cur.h0), v = rows_of(t, s, op.v, t.cur.h0);
    s.prefetch.add(0,      k_runs, k.data + k.ahead, STEP*k.nb);
    s.prefetch.add(k_runs, v_runs, v.data + v.ahead, STEP*v.nb);
}

// What goes along with the products of each head in turn, K or V. Two buffers of scales alternate.
struct side_work_of_heads {
    const decode_task & t;
    const step        & s;
    const ggml_tensor * kv;
    int64_t             h_ready = -1; // the head whose scales have been copied

    q8_scales scales_of(int64_t h) const {
        ggml_fp16_t * d = (ggml_fp16_t *) t.work.scales_16 + h % 2*(std::max(t.op.DK, t.op.DV)/QK8_0*STEP);
        return { t.op.rows_of(kv, t.cur.stream, h, s.col), kv->nb[1], ggml_type_size(kv->type), s.n, d };
    }
    q8_side_work operator()(int64_t h) {
        const int       n_blocks = kv->ne[0]/QK8_0;
        const q8_scales mine     = scales_of(h);
        const q8_scales next     = h + 1 < t.cur.h1 ? scales_of(h + 1) : q8_scales();
        if (h_ready != h) {
            mine.zero_rest<STEP>(n_blocks);
            mine.copy_all<STEP>(n_blocks);
        }
        if (next.n > 0) {
            next.zero_rest<STEP>(n_blocks);
        }
        h_ready = h + 1;
        return { mine.d, next, in_runs(t.op, kv) ? &s.prefetch : &no_prefetch };
    }
};

// A row's scores of a step, scaled, capped and masked, -INFINITY from n on. Returns the largest.
float finish_scores(const fattn_op & op, float * S, int n, const ggml_fp16_t * mask, float slope) {
    vf max = vf_set1(-INFINITY);
    for (int i = 0; i < STEP; i += VF_W) {
        const int rest = std::max(0, std::min(VF_W, n - i));
        vf x = vf_mul(vf_load(S + i), vf_set1(op.scale));
        if (op.softcap != 0.0f) {
            x = vf_mul(vf_tanh(x), vf_set1(op.softcap));
        }
        if (mask && rest > 0) {
            x = vf_fma(vf_set1(slope), rest < VF_W ? row_f16(mask).part(i, rest) : vf_load_f16(mask + i), x);
        }
        vf_store(S + i, x);
        if (rest < VF_W) {
            std::fill(S + i + rest, S + i + VF_W, -INFINITY);
            x = vf_load(S + i);
        }
        max = vf_max(max, x);
    }
    return vf_hmax(max);
}

// S and m_step of all rows. Where a head sees nothing, m_step is -INFINITY and S is left alone.
inline void step_scores(const decode_task & t, const step & s) {
    const auto & op   = t.op;
    const auto & work = t.work;
    side_work_of_heads side_work { t, s, op.k };
    for (int64_t h = t.cur.h0; h < t.cur.h1; ++h) {
        const int first = (h - t.cur.h0)*t.n_rows;
        if (t.mask_of_head && !is_visible(op, t.cur.stream, h*op.group, op.group, s.col, s.n)) {
            std::fill(work.m_step + first, work.m_step + first + t.n_rows, -INFINITY);
            continue;
        }
        const float * q[FATTN_DECODE_ROWS];
        for (int r = 0; r < t.n_rows; ++r) {
            q[r] = work.row[first + r].q;
        }
        const q8_side_work side = k_as_q8_0(op) ? side_work(h) : q8_side_work();
        scores(op, work, rows_of(t, s, op.k, h), side, t.n_rows, q, work.q_int + first*t.ld_q_int, work.S + first*STEP);
        for (int r = first; r < first + t.n_rows; ++r) {
            const ggml_fp16_t * mask = s.col < op.n_masked ? work.row[r].mask + s.col : nullptr;
            work.m_step[r] = finish_scores(op, work.S + r*STEP, s.n, mask, work.row[r].slope);
        }
    }
}

// S = e^(S - base), 0 for -INFINITY. Returns the sum.
float exponentials(float * S, float base) {
    vf sum = vf_zero();
    for (int i = 0; i < STEP; i += VF_W) {
        const vf e = vf_exp(vf_sub(vf_load(S + i), vf_set1(base)));
        vf_store(S + i, e);
        sum = vf_add(sum, e);
    }
    return vf_sum(sum);
}

// S becomes P; m, l and O of all rows follow the new maximum. Nothing changes for rows that see nothing.
inline void step_softmax(const decode_task & t) {
    const auto & op   = t.op;
    const auto & work = t.work;
    const vf lowest = vf_set1(-FLT_MAX); // finite, or differences would be NaN
    for (int r = 0; r < t.n_all; r += VF_W) {
        const vf m = vf_load(work.m + r), m_step = vf_load(work.m_step + r);
        const vf m_new = vf_max(vf_max(m, m_step), lowest);
        // weights that will be rounded to 16 bits are relative to the step's own maximum, so that the largest is 1
        const vf base = v_as_q8_0(op) ? vf_max(m_step, lowest) : m_new;
        vf_store(work.m     + r, m_new);
        vf_store(work.base  + r, base);
        vf_store(work.beta  + r, vf_exp(vf_sub(base, m_new)));
        vf_store(work.alpha + r, vf_exp(vf_sub(m, m_new)));
    }
    for (int r = 0; r < t.n_all; ++r) {
        if (work.m_step[r] != -INFINITY) {
            work.l[r] = work.l[r]*work.alpha[r] + work.beta[r]*exponentials(work.S + r*STEP, work.base[r]);
        } else {
            memset(work.S + r*STEP, 0, STEP*sizeof(float));
        }
        if (work.alpha[r] != 1.0f) {
            fattn_scale(t.O + r*t.tasks.partial, op.DV, work.alpha[r]);
        }
    }
}

// O += beta*P V, for the heads that see something.
inline void step_outputs(const decode_task & t, const step & s) {
    const auto & op   = t.op;
    const auto & work = t.work;
    side_work_of_heads side_work { t, s, op.v };
    for (int64_t h = t.cur.h0; h < t.cur.h1; ++h) {
        const int first = (h - t.cur.h0)*t.n_rows;
        if (*std::max_element(work.m_step + first, work.m_step + first + t.n_rows) != -INFINITY) {
            const q8_side_work side = v_as_q8_0(op) ? side_work(h) : q8_side_work();
            outputs(op, work, rows_of(t, s, op.v, h), side, t.n_rows, work.S + first*STEP, work.beta + first,
                t.O + first*t.tasks.partial, t.tasks.partial);
        }
    }
}

} // namespace

int64_t fattn_decode_scratch(const fattn_op & op, int64_t n_heads) { return workspace(op, n_heads, nullptr).size; }

void fattn_decode_task(
        const fattn_op & op, const fattn_tasks & tasks, int64_t i, int64_t i_next, float * scratch, float * partials) {
    const range cur(op, tasks, i), next(op, tasks, std::min(i_next, tasks.n_tasks - 1));
    const int     n_rows = op.group*op.n_q;
    const int64_t first  = op.row(cur.stream, cur.h0*op.group, 0);
    const auto partial_of = [&](int r) { return fattn_partial_at(op, tasks, partials, cur.split, first + r); };
#if FATTN_INT
    const int64_t ld_q_int = q8_block::floats(op.DK);
#else
    const int64_t ld_q_int = 0;
#endif
    const decode_task t = {
        op, tasks, cur, next, i_next < tasks.n_tasks, n_rows, (int) (cur.h1 - cur.h0)*n_rows,
        op.mask && op.mask->ne[2] > 1, workspace(op, tasks.block, scratch), ld_q_int,
        partial_of(0).O,
    };

    setup(t);
    for (int64_t col = cur.c0; col < cur.c1; col += STEP) {
        const int n = std::min<int64_t>(STEP, cur.c1 - col);
        if (!t.mask_of_head && !is_visible(op, cur.stream, cur.h0*op.group, 1, col, n)) {
            continue;
        }
        fattn_prefetch prefetch;
        const step s = { col, n, prefetch };
        start_prefetch(t, s);
        step_scores(t, s);
        step_softmax(t);
        step_outputs(t, s);
        prefetch.finish();
    }
    for (int r = 0; r < t.n_all; ++r) {
        const fattn_partial part = partial_of(r);
        *part.m = t.work.l[r] == 0.0f ? -INFINITY : t.work.m[r];
        *part.l = t.work.l[r];
    }
}
