// Attention of few query rows: split-KV, one pass over K and V for all the query heads that share them.
//
// Why: decode reads the whole cache for one token, so the time is that of reading it once. A task takes a range of
// KV tiles and walks it in the order of memory: a few columns at a time, of those head by head, since a cell's heads lie
// side by side. K/V in f32, f16, bf16 or q8_0 are read as they are, other types are converted a few columns at a time.
//
// Use: fattn.cpp calls fattn_decode_task() when a KV head has at most FATTN_DECODE_ROWS query rows.

#include "fattn.h"
#include "fattn-decode-q8.h"
#include "fattn-plan.h"
#include "fattn-quants.h"
#include "fattn-rows.h"

namespace {

constexpr int ROWS = FATTN_REGISTERS >= 32 ? 4 : 2; // query rows of a micro-kernel
constexpr int STEP = 32; // columns at a time: what two steps of all heads hold stays in the second-level cache
static_assert(FATTN_TILE % STEP == 0, "a step must not straddle two tiles");

// s[r][c] = q[r] . k[c] for n rows of K that are nb bytes apart
template <class K, int R>
void dots(const char * k, size_t nb, int n, const float * const * q, int dk, float * s, ptrdiff_t ahead) {
    int c = 0;
    for (; c + 4 <= n; c += 4) {
        const K k0(k + (c + 0)*nb), k1(k + (c + 1)*nb), k2(k + (c + 2)*nb), k3(k + (c + 3)*nb);
        for (int j = 0; j < 4; ++j) {
            fattn_fetch(k + (c + j)*nb, ahead, K::bytes(dk));
        }
        vf acc[R][4];
        FATTN_UNROLL
        for (int r = 0; r < R; ++r) {
            acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = vf_zero();
        }
        int i = 0;
        for (; i + K::N*VF_W <= dk; i += K::N*VF_W) {
            vf a0[K::N], a1[K::N], a2[K::N], a3[K::N];
            k0.load(a0, i);
            k1.load(a1, i);
            k2.load(a2, i);
            k3.load(a3, i);
            FATTN_UNROLL
            for (int r = 0; r < R; ++r) {
                FATTN_UNROLL
                for (int u = 0; u < K::N; ++u) {
                    const vf x = vf_load(q[r] + i + u*VF_W);
                    acc[r][0] = vf_fma(a0[u], x, acc[r][0]);
                    acc[r][1] = vf_fma(a1[u], x, acc[r][1]);
                    acc[r][2] = vf_fma(a2[u], x, acc[r][2]);
                    acc[r][3] = vf_fma(a3[u], x, acc[r][3]);
                }
            }
        }
        if (i < dk) {
            const int rest = dk - i;
            const vf a0 = k0.part(i, rest), a1 = k1.part(i, rest), a2 = k2.part(i, rest), a3 = k3.part(i, rest);
            FATTN_UNROLL
            for (int r = 0; r < R; ++r) {
                const vf x = row_f32(q[r]).part(i, rest);
                acc[r][0] = vf_fma(a0, x, acc[r][0]);
                acc[r][1] = vf_fma(a1, x, acc[r][1]);
                acc[r][2] = vf_fma(a2, x, acc[r][2]);
                acc[r][3] = vf_fma(a3, x, acc[r][3]);
            }
        }
        FATTN_UNROLL
        for (int r = 0; r < R; ++r) {
            vf_sum4(s + r*STEP + c, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
        }
    }
    for (; c < n; ++c) {
        const K k0(k + c*nb);
        for (int r = 0; r < R; ++r) {
            vf acc = vf_zero();
            int i = 0;
            for (; i + VF_W <= dk; i += VF_W) {
                acc = vf_fma(k0.get(i), vf_load(q[r] + i), acc);
            }
            if (i < dk) {
                acc = vf_fma(k0.part(i, dk - i), row_f32(q[r]).part(i, dk - i), acc);
            }
            s[r*STEP + c] = vf_sum(acc);
        }
    }
}

// o[r][d, d + N*VF_W) += p[r][c] * v[c], summed over c
template <class V, int R, int N>
void sums(const char * v, size_t nb, int n, const float * p, int d, float * const * o, ptrdiff_t ahead) {
    vf acc[R][N];
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        FATTN_UNROLL
        for (int j = 0; j < N; ++j) {
            acc[r][j] = vf_load(o[r] + d + j*VF_W);
        }
    }
    for (int c = 0; c < n; ++c) {
        const V row(v + c*nb);
        fattn_fetch(row.at(d), ahead, V::bytes(N*VF_W));
        vf a[N];
        if constexpr (N % V::N == 0) {
            FATTN_UNROLL
            for (int j = 0; j < N; j += V::N) {
                row.load(a + j, d + j*VF_W);
            }
        } else {
            FATTN_UNROLL
            for (int j = 0; j < N; ++j) {
                a[j] = row.get(d + j*VF_W);
            }
        }
        FATTN_UNROLL
        for (int r = 0; r < R; ++r) {
            const vf x = vf_set1(p[r*STEP + c]);
            FATTN_UNROLL
            for (int j = 0; j < N; ++j) {
                acc[r][j] = vf_fma(a[j], x, acc[r][j]);
            }
        }
    }
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        FATTN_UNROLL
        for (int j = 0; j < N; ++j) {
            vf_store(o[r] + d + j*VF_W, acc[r][j]);
        }
    }
}

template <class V, int R>
void sums_of_row(const char * v, size_t nb, int n, const float * p, int dv, float * const * o, ptrdiff_t ahead) {
    constexpr int N = std::min(8, FATTN_REGISTERS/2/R);
    int d = 0;
    for (; d + N*VF_W <= dv; d += N*VF_W) {
        sums<V, R, N>(v, nb, n, p, d, o, ahead);
    }
    for (; d + VF_W <= dv; d += VF_W) {
        sums<V, R, 1>(v, nb, n, p, d, o, ahead);
    }
    if (d < dv) {
        for (int r = 0; r < R; ++r) {
            vf acc = row_f32(o[r]).part(d, dv - d);
            for (int c = 0; c < n; ++c) {
                acc = vf_fma(V(v + c*nb).part(d, dv - d), vf_set1(p[r*STEP + c]), acc);
            }
            vf_store_part(o[r] + d, acc, dv - d);
        }
    }
}

// In blocks of ROWS query rows, the last one smaller.
template <class K>
void all_dots(const char * k, size_t nb, int n, int n_rows, const float * const * q, int dk, float * s, ptrdiff_t ahead) {
    for (int r = 0; r < n_rows; r += ROWS) {
        float * sr = s + r*STEP;
        switch (std::min(ROWS, n_rows - r)) {
            case 1: dots<K, 1>(k, nb, n, q + r, dk, sr, ahead); break;
            case 2: dots<K, 2>(k, nb, n, q + r, dk, sr, ahead); break;
            case 3: dots<K, std::min(3, ROWS)>(k, nb, n, q + r, dk, sr, ahead); break;
            case 4: dots<K, ROWS>(k, nb, n, q + r, dk, sr, ahead); break;
        }
    }
}
template <class V>
void all_sums(const char * v, size_t nb, int n, int n_rows, const float * p, int dv, float * const * o, ptrdiff_t ahead) {
    for (int r = 0; r < n_rows; r += ROWS) {
        const float * pr = p + r*STEP;
        switch (std::min(ROWS, n_rows - r)) {
            case 1: sums_of_row<V, 1>(v, nb, n, pr, dv, o + r, ahead); break;
            case 2: sums_of_row<V, 2>(v, nb, n, pr, dv, o + r, ahead); break;
            case 3: sums_of_row<V, std::min(3, ROWS)>(v, nb, n, pr, dv, o + r, ahead); break;
            case 4: sums_of_row<V, ROWS>(v, nb, n, pr, dv, o + r, ahead); break;
        }
    }
}

// One row's scores become weights; its maximum and sum go on, its output is scaled to the new maximum. False: nothing
// of the tile is visible to it, its weights are zeros.
bool softmax(const fattn_op & op, float * s, int n, const ggml_fp16_t * mask, float slope, fattn_partial part) {
    vf top = vf_set1(-INFINITY);
    for (int i = 0; i < n; i += VF_W) {
        vf x = vf_load(s + i);
        x = vf_mul(x, vf_set1(op.scale));
        if (op.softcap != 0.0f) {
            x = vf_mul(vf_tanh(x), vf_set1(op.softcap));
        }
        const int rest = std::min(VF_W, n - i);
        if (mask) {
            x = vf_fma(vf_set1(slope), rest < VF_W ? row_f16(mask).part(i, rest) : vf_load_f16(mask + i), x);
        }
        vf_store(s + i, x);
        for (int j = rest; j < VF_W; ++j) {
            s[i + j] = -INFINITY;
        }
        top = vf_max(top, rest < VF_W ? vf_load(s + i) : x);
    }
    const float m_tile = vf_hmax(top);
    if (m_tile == -INFINITY) {
        memset(s, 0, n*sizeof(float));
        return false;
    }
    const float m = std::max(*part.m, m_tile);
    if (m > *part.m) {
        const float shrink = expf(*part.m - m);
        *part.m  = m;
        *part.s *= shrink;
        fattn_scale(part.o, op.DV, shrink);
    }
    vf sum = vf_zero();
    for (int i = 0; i < n; i += VF_W) {
        const vf e = vf_exp(vf_sub(vf_load(s + i), vf_set1(m)));
        vf_store(s + i, e);
        sum = vf_add(sum, e);
    }
    *part.s += vf_sum(sum);
    return true;
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
bool k_in_integers(const fattn_op & op) { return FATTN_INT && fattn_like_q8_0(op.k->type); }
bool v_in_integers(const fattn_op & op) { return FATTN_INT && fattn_v_in_16_bits(op); }

// What a task keeps beside its partial results. Floats, in the order of memory.
struct workspace {
    float * query;  // k_in_integers: [KV head of the task][query row], rounded
    float * rows;   // [STEP rows of K or V], where they can't be read as they are
    float * scales; // 16 bits: [blocks of V][STEP]
    float * unit;   // [ROWS][blocks of V]
    float * weight; // 16 bits: [ROWS][blocks of V][STEP]
    int64_t size;

    workspace(const fattn_op & op, int64_t n_heads, float * at) {
        const int64_t widest = std::max(op.DK, op.DV);
        const auto take = [&](size_t n) { float * p = at + size; size += fattn_padded(n); return p; };
        size   = 0;
        query  = rows = scales = unit = weight = nullptr;
        if (!in_floats(op.k->type) || !in_floats(op.v->type)) {
            rows = take(STEP*widest);
        }
#if FATTN_INT
        query  = take(n_heads*op.group*op.n_q*q8_vector::floats(op.DK));
        scales = take(op.DV/QK8_0*STEP/2);
        unit   = take(ROWS*(op.DV/QK8_0));
        weight = take(ROWS*(op.DV/QK8_0)*STEP/2);
#else
        GGML_UNUSED(n_heads);
#endif
    }
};

// Rows where they can be read: `as`, or as they are.
struct rows_at { const char * p; size_t nb; ptrdiff_t ahead; };

#if FATTN_INT
rows_at rows_as_q8_0(const ggml_tensor * kv, rows_at from, int n, int64_t ne, float * to) {
    if (kv->type == GGML_TYPE_Q8_0) {
        return from;
    }
    const size_t nb = ne/QK8_0*sizeof(block_q8_0);
    for (int c = 0; c < n; ++c) {
        fattn_fetch(from.p + c*from.nb, from.ahead, ggml_row_size(kv->type, ne));
        fattn_as_q8_0(kv->type, from.p + c*from.nb, ne, (block_q8_0 *) ((char *) to + c*nb));
    }
    return { (const char *) to, nb, 0 };
}
#endif

rows_at rows_as_f32(const ggml_tensor * kv, rows_at from, int n, int64_t ne, float * to) {
    for (int c = 0; c < n; ++c) {
        fattn_fetch(from.p + c*from.nb, from.ahead, ggml_row_size(kv->type, ne));
    }
    fattn_to_float(kv, from.p, n, ne, to, ne);
    return { (const char *) to, ne*sizeof(float), 0 };
}

// s[r][c]: the query rows q[r], rounded ones from `query` on, times n rows of K
void scores(const fattn_op & op, const workspace & work, rows_at k, int n, int n_rows, const float * const * q, float * query, float * s) {
    switch (op.k->type) {
        case GGML_TYPE_F32:  return all_dots<row_f32 >(k.p, k.nb, n, n_rows, q, op.DK, s, k.ahead);
        case GGML_TYPE_F16:  return all_dots<row_f16 >(k.p, k.nb, n, n_rows, q, op.DK, s, k.ahead);
        case GGML_TYPE_BF16: return all_dots<row_bf16>(k.p, k.nb, n, n_rows, q, op.DK, s, k.ahead);
        default: break;
    }
#if FATTN_INT
    if (k_in_integers(op)) {
        k = rows_as_q8_0(op.k, k, n, op.DK, work.rows);
        for (int r = 0; r < n_rows; r += ROWS) {
            const q8_vector * rounded[ROWS];
            for (int i = 0; i < ROWS; ++i) {
                rounded[i] = (const q8_vector *) (query + std::min(r + i, n_rows - 1)*q8_vector::floats(op.DK));
            }
            switch (std::min(ROWS, n_rows - r)) {
                case 1: q8_dots<1>(k.p, k.nb, n, rounded, op.DK, s + r*STEP, STEP, k.ahead); break;
                case 2: q8_dots<2>(k.p, k.nb, n, rounded, op.DK, s + r*STEP, STEP, k.ahead); break;
                case 3: q8_dots<std::min(3, ROWS)>(k.p, k.nb, n, rounded, op.DK, s + r*STEP, STEP, k.ahead); break;
                case 4: q8_dots<ROWS>(k.p, k.nb, n, rounded, op.DK, s + r*STEP, STEP, k.ahead); break;
            }
        }
        return;
    }
#endif
    GGML_UNUSED(query);
    k = rows_as_f32(op.k, k, n, op.DK, work.rows);
    all_dots<row_f32>(k.p, k.nb, n, n_rows, q, op.DK, s, k.ahead);
}

// o[r] += p[r][c] * v[c] of n rows of V; p is 0 from n on
void outputs(const fattn_op & op, const workspace & work, rows_at v, int n, int n_rows, const float * p, float * const * o) {
    switch (op.v->type) {
        case GGML_TYPE_F32:  return all_sums<row_f32 >(v.p, v.nb, n, n_rows, p, op.DV, o, v.ahead);
        case GGML_TYPE_F16:  return all_sums<row_f16 >(v.p, v.nb, n, n_rows, p, op.DV, o, v.ahead);
        case GGML_TYPE_BF16: return all_sums<row_bf16>(v.p, v.nb, n, n_rows, p, op.DV, o, v.ahead);
        default: break;
    }
#if FATTN_INT
    if (v_in_integers(op)) {
        v = rows_as_q8_0(op.v, v, n, op.DV, work.rows);
        const int64_t blocks = op.DV/QK8_0;
        int16_t * w = (int16_t *) work.weight;
        for (int r = 0; r < n_rows; r += ROWS) {
            const int R = std::min(ROWS, n_rows - r);
            q8_weights<STEP>(v.p, v.nb, n, blocks, p + r*STEP, R, (ggml_fp16_t *) work.scales, w, work.unit);
            switch (R) {
                case 1: q8_sums_of_row<1>(v.p, v.nb, n, w, work.unit, blocks, STEP, op.DV, o + r, v.ahead); break;
                case 2: q8_sums_of_row<2>(v.p, v.nb, n, w, work.unit, blocks, STEP, op.DV, o + r, v.ahead); break;
                case 3: q8_sums_of_row<std::min(3, ROWS)>(v.p, v.nb, n, w, work.unit, blocks, STEP, op.DV, o + r, v.ahead); break;
                case 4: q8_sums_of_row<ROWS>(v.p, v.nb, n, w, work.unit, blocks, STEP, op.DV, o + r, v.ahead); break;
            }
        }
        return;
    }
#endif
    v = rows_as_f32(op.v, v, n, op.DV, work.rows);
    all_sums<row_f32>(v.p, v.nb, n, n_rows, p, op.DV, o, v.ahead);
}

} // namespace

int64_t fattn_decode_scratch(const fattn_op & op, int64_t n_heads) { return workspace(op, n_heads, nullptr).size; }

void fattn_decode_task(const fattn_op & op, const fattn_plan & plan, int64_t t, float * scratch, float * partials) {
    const int64_t block  = t % plan.n_blocks;
    const int64_t split  = t/plan.n_blocks % plan.n_splits;
    const int64_t stream = t/plan.n_blocks/plan.n_splits;
    const int64_t h0 = block*plan.block;
    const int64_t h1 = std::min(h0 + plan.block, op.n_head_kv);
    const int64_t c0 = split*plan.tiles_split*FATTN_TILE;
    const int64_t c1 = std::min(c0 + plan.tiles_split*FATTN_TILE, op.n_cols);
    const int     n_rows = op.group*op.n_q;

    for (int64_t r = op.row(stream, h0*op.group, 0); r < op.row(stream, h1*op.group, 0); ++r) {
        const fattn_partial part = fattn_partial_at(op, plan, partials, split, r);
        *part.m = -INFINITY;
        *part.s = 0.0f;
        memset(part.o, 0, op.DV*sizeof(float));
    }

    const workspace work(op, plan.block, scratch);
#if FATTN_INT
    const int64_t rounded = q8_vector::floats(op.DK);
    if (k_in_integers(op)) {
        for (int64_t r = 0; r < (h1 - h0)*n_rows; ++r) {
            q8_query(op.q_row(stream, h0*op.group + r/op.n_q, r % op.n_q), op.DK, (q8_vector *) (work.query + r*rounded));
        }
    }
#else
    const int64_t rounded = 0;
#endif

    alignas(64) float s[FATTN_DECODE_ROWS*STEP];
    const bool mask_of_head = op.mask && op.mask->ne[2] > 1;
    for (int64_t col = c0; col < c1; col += STEP) {
        const int n = std::min<int64_t>(STEP, c1 - col);
        if (!mask_of_head && !visible(op, stream, h0*op.group, 1, col, n)) {
            continue;
        }
        for (int64_t h = h0; h < h1; ++h) {
            if (mask_of_head && !visible(op, stream, h*op.group, op.group, col, n)) {
                continue;
            }
            const char * k = op.rows_of(op.k, stream, h, col);
            const char * v = op.rows_of(op.v, stream, h, col);
            ptrdiff_t k_ahead = 0, v_ahead = 0; // to the same head of the next columns
            if (col + STEP < c1) {
                k_ahead = op.rows_of(op.k, stream, h, col + STEP) - k;
                v_ahead = op.rows_of(op.v, stream, h, col + STEP) - v;
            }
            const float * q[FATTN_DECODE_ROWS];
            float       * o[FATTN_DECODE_ROWS];
            fattn_partial part[FATTN_DECODE_ROWS];
            for (int r = 0; r < n_rows; ++r) {
                const int64_t head = h*op.group + r/op.n_q;
                q[r]    = op.q_row(stream, head, r % op.n_q);
                part[r] = fattn_partial_at(op, plan, partials, split, op.row(stream, head, r % op.n_q));
                o[r]    = part[r].o;
            }

            scores(op, work, { k, op.k->nb[1], k_ahead }, n, n_rows, q, work.query + (h - h0)*n_rows*rounded, s);
            bool any = false;
            for (int r = 0; r < n_rows; ++r) {
                const int64_t head = h*op.group + r/op.n_q;
                any |= softmax(op, s + r*STEP, n, op.mask_row(stream, head, r % op.n_q, col), op.slope(head), part[r]);
            }
            if (!any) {
                continue;
            }
            if (n < STEP) {
                for (int r = 0; r < n_rows; ++r) {
                    memset(s + r*STEP + n, 0, (STEP - n)*sizeof(float));
                }
            }
            outputs(op, work, { v, op.v->nb[1], v_ahead }, n, n_rows, s, o);
        }
    }
}
