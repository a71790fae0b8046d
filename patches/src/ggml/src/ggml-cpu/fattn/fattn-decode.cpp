// Attention of few query rows: split-KV, one pass over K and V for all the query heads that share them.
//
// Why: decode reads the whole cache for one token, so the time is that of reading it once. A task takes a range of
// KV tiles and walks it in the order of memory: tile by tile, and in a tile head by head, since a cell's heads lie
// side by side. K/V in f32, f16 or bf16 are read as they are, other types are converted a tile at a time.
//
// Use: fattn.cpp calls fattn_decode_task() when a KV head has at most FATTN_DECODE_ROWS query rows.

#include "fattn.h"
#include "fattn-plan.h"
#include "fattn-simd.h"

namespace {

constexpr int ROWS = FATTN_REGISTERS >= 32 ? 4 : 2; // query rows of a micro-kernel
constexpr int STEP = 32; // columns at a time: what two steps of all heads hold stays in the second-level cache
static_assert(FATTN_TILE % STEP == 0, "a step must not straddle two tiles");

// s[r][c] = q[r] . k[c] for n rows of K that are nb bytes apart
template <class K, int R>
void dots(const char * k, size_t nb, int n, const float * const * q, int dk, float * s) {
    int c = 0;
    for (; c + 4 <= n; c += 4) {
        const K k0(k + (c + 0)*nb), k1(k + (c + 1)*nb), k2(k + (c + 2)*nb), k3(k + (c + 3)*nb);
        vf acc[R][4];
        for (int r = 0; r < R; ++r) {
            acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = vf_zero();
        }
        const auto add = [&](vf a0, vf a1, vf a2, vf a3, vf x, vf * sum) {
            sum[0] = vf_fma(a0, x, sum[0]);
            sum[1] = vf_fma(a1, x, sum[1]);
            sum[2] = vf_fma(a2, x, sum[2]);
            sum[3] = vf_fma(a3, x, sum[3]);
        };
        int i = 0;
        for (; i + VF_W <= dk; i += VF_W) {
            const vf a0 = k0.get(i), a1 = k1.get(i), a2 = k2.get(i), a3 = k3.get(i);
            for (int r = 0; r < R; ++r) {
                add(a0, a1, a2, a3, vf_load(q[r] + i), acc[r]);
            }
        }
        if (i < dk) {
            const int rest = dk - i;
            const vf a0 = k0.part(i, rest), a1 = k1.part(i, rest), a2 = k2.part(i, rest), a3 = k3.part(i, rest);
            for (int r = 0; r < R; ++r) {
                add(a0, a1, a2, a3, row_f32(q[r]).part(i, rest), acc[r]);
            }
        }
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
void sums(const char * v, size_t nb, int n, const float * p, int d, float * const * o) {
    vf acc[R][N];
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < N; ++j) {
            acc[r][j] = vf_load(o[r] + d + j*VF_W);
        }
    }
    for (int c = 0; c < n; ++c) {
        const V row(v + c*nb);
        vf x[R];
        for (int r = 0; r < R; ++r) {
            x[r] = vf_set1(p[r*STEP + c]);
        }
        for (int j = 0; j < N; ++j) {
            const vf a = row.get(d + j*VF_W);
            for (int r = 0; r < R; ++r) {
                acc[r][j] = vf_fma(a, x[r], acc[r][j]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < N; ++j) {
            vf_store(o[r] + d + j*VF_W, acc[r][j]);
        }
    }
}

template <class V, int R>
void sums_of_row(const char * v, size_t nb, int n, const float * p, int dv, float * const * o) {
    constexpr int N = std::min(8, FATTN_REGISTERS/2/R);
    int d = 0;
    for (; d + N*VF_W <= dv; d += N*VF_W) {
        sums<V, R, N>(v, nb, n, p, d, o);
    }
    for (; d + VF_W <= dv; d += VF_W) {
        sums<V, R, 1>(v, nb, n, p, d, o);
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
void all_dots(const char * k, size_t nb, int n, int n_rows, const float * const * q, int dk, float * s) {
    for (int r = 0; r < n_rows; r += ROWS) {
        float * sr = s + r*STEP;
        switch (std::min(ROWS, n_rows - r)) {
            case 1: dots<K, 1>(k, nb, n, q + r, dk, sr); break;
            case 2: dots<K, 2>(k, nb, n, q + r, dk, sr); break;
            case 3: dots<K, std::min(3, ROWS)>(k, nb, n, q + r, dk, sr); break;
            case 4: dots<K, ROWS>(k, nb, n, q + r, dk, sr); break;
        }
    }
}
template <class V>
void all_sums(const char * v, size_t nb, int n, int n_rows, const float * p, int dv, float * const * o) {
    for (int r = 0; r < n_rows; r += ROWS) {
        const float * pr = p + r*STEP;
        switch (std::min(ROWS, n_rows - r)) {
            case 1: sums_of_row<V, 1>(v, nb, n, pr, dv, o + r); break;
            case 2: sums_of_row<V, 2>(v, nb, n, pr, dv, o + r); break;
            case 3: sums_of_row<V, std::min(3, ROWS)>(v, nb, n, pr, dv, o + r); break;
            case 4: sums_of_row<V, ROWS>(v, nb, n, pr, dv, o + r); break;
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

// K and V of the next step, for all heads of the task, on their way into the second-level cache. A head's values are a
// short piece of each row, so a walk head by head looks to the hardware's prefetcher like jumps from page to page; in
// pieces between the heads this reads the rows whole and in order.
struct prefetch {
    const char * rows[2] = { nullptr, nullptr };
    size_t nb[2], bytes[2];
    int n = 0, done = 0;

    void from(const fattn_op & op, int64_t stream, int64_t h0, int64_t h1, int64_t col, int count) {
        n    = count;
        done = 0;
        const ggml_tensor * kv[2] = { op.k, op.v };
        for (int i = 0; i < 2; ++i) {
            rows[i]  = op.rows_of(kv[i], stream, h0, col);
            nb[i]    = kv[i]->nb[1];
            bytes[i] = (h1 - h0 - 1)*kv[i]->nb[2] + ggml_row_size(kv[i]->type, kv[i]->ne[0]);
            if (bytes[i] > nb[i]) {
                n = 0; // heads do not lie side by side
            }
        }
    }
    void part(int64_t i, int64_t of) {
#if defined(__GNUC__)
        for (const int end = n*(i + 1)/of; done < end; ++done) {
            for (int j = 0; j < 2; ++j) {
                const char * row = rows[j] + done*nb[j];
                for (size_t b = 0; b < bytes[j]; b += 64) {
                    __builtin_prefetch(row + b, 0, 2);
                }
            }
        }
#else
        GGML_UNUSED(i);
        GGML_UNUSED(of);
#endif
    }
};

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

} // namespace

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

    alignas(64) float s[FATTN_DECODE_ROWS*STEP];
    const bool mask_of_head = op.mask && op.mask->ne[2] > 1;
    const auto seen_at = [&](int64_t col) { return col < c1 && visible(op, stream, h0*op.group, 1, col, std::min<int64_t>(STEP, c1 - col)); };

    bool seen = !mask_of_head && seen_at(c0);
    for (int64_t col = c0; col < c1; col += STEP) {
        const int  n    = std::min<int64_t>(STEP, c1 - col);
        const bool next = !mask_of_head && seen_at(col + STEP);
        prefetch ahead;
        if (next) {
            ahead.from(op, stream, h0, h1, col + STEP, std::min<int64_t>(STEP, c1 - col - STEP));
        }
        for (int64_t h = h0; h < h1; ++h) {
            ahead.part(h - h0, h1 - h0);
            if (!(mask_of_head ? visible(op, stream, h*op.group, op.group, col, n) : seen)) {
                continue;
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

            const char * k  = op.rows_of(op.k, stream, h, col);
            switch (op.k->type) {
                case GGML_TYPE_F32:  all_dots<row_f32 >(k, op.k->nb[1], n, n_rows, q, op.DK, s); break;
                case GGML_TYPE_F16:  all_dots<row_f16 >(k, op.k->nb[1], n, n_rows, q, op.DK, s); break;
                case GGML_TYPE_BF16: all_dots<row_bf16>(k, op.k->nb[1], n, n_rows, q, op.DK, s); break;
                default:
                    fattn_to_float(op.k, k, n, op.DK, scratch, op.DK);
                    all_dots<row_f32>((const char *) scratch, op.DK*sizeof(float), n, n_rows, q, op.DK, s);
            }
            bool any = false;
            for (int r = 0; r < n_rows; ++r) {
                const int64_t head = h*op.group + r/op.n_q;
                any |= softmax(op, s + r*STEP, n, op.mask_row(stream, head, r % op.n_q, col), op.slope(head), part[r]);
            }
            if (!any) {
                continue;
            }
            const char * v = op.rows_of(op.v, stream, h, col);
            switch (op.v->type) {
                case GGML_TYPE_F32:  all_sums<row_f32 >(v, op.v->nb[1], n, n_rows, s, op.DV, o); break;
                case GGML_TYPE_F16:  all_sums<row_f16 >(v, op.v->nb[1], n, n_rows, s, op.DV, o); break;
                case GGML_TYPE_BF16: all_sums<row_bf16>(v, op.v->nb[1], n, n_rows, s, op.DV, o); break;
                default:
                    fattn_to_float(op.v, v, n, op.DV, scratch, op.DV);
                    all_sums<row_f32>((const char *) scratch, op.DV*sizeof(float), n, n_rows, s, op.DV, o);
            }
        }
        seen = next;
    }
}
