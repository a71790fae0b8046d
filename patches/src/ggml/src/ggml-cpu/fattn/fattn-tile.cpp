// Attention of many query rows: tiles of K and V are converted once for a block of tokens of all the query heads that
// share them, and two register-blocked matrix products do the rest.
//
// Why: the scores are computed transposed, S^T = K Q^T. Then a vector holds one KV column of several query rows: K and
// V are used as their cache stores them, row by row, nothing but Q is ever transposed (once per task), the softmax needs
// no sums across a vector, and its weights lie as the second product, O += P V, wants them.
//
//   K [column][DK], broadcast      x  Q panel [DK][rows]  ->  S [column][rows]
//   S [column][rows], broadcast    x  V [column][DV]      ->  O [row][DV]
//
// Use: fattn.cpp calls fattn_tile_task() when a KV head has more than FATTN_DECODE_ROWS query rows.

#include "fattn.h"
#include "fattn-plan.h"
#include "fattn-simd.h"

#include <cfloat>

namespace {

// Registers: RM*RN sums, RN values of one operand, a broadcast of the other.
constexpr int RM = FATTN_REGISTERS >= 32 || VF_W > 4 ? 6 : 4;
constexpr int RN = FATTN_REGISTERS >= 32 ? 4 : 2;
constexpr int PANEL = RN*VF_W; // query rows of a panel, at most

// c[i][j] (+)= sum over k of a[i*am + k*ak]*b[k*ldb + j], for R rows and N vectors of columns
template <int R, int N, bool ADD>
inline void product(int n_k, const float * a, int64_t am, int64_t ak, const float * b, int64_t ldb, float * c, int64_t ldc) {
    vf acc[R][N];
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < N; ++j) {
            acc[i][j] = ADD ? vf_load(c + i*ldc + j*VF_W) : vf_zero();
        }
    }
    for (int k = 0; k < n_k; ++k) {
        vf x[N];
        for (int j = 0; j < N; ++j) {
            x[j] = vf_load(b + k*ldb + j*VF_W);
        }
        for (int i = 0; i < R; ++i) {
            const vf y = vf_set1(a[i*am + k*ak]);
            for (int j = 0; j < N; ++j) {
                acc[i][j] = vf_fma(y, x[j], acc[i][j]);
            }
        }
    }
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < N; ++j) {
            vf_store(c + i*ldc + j*VF_W, acc[i][j]);
        }
    }
}

// n_i rows, in blocks of RM
template <int N, bool ADD>
void rows(int n_i, int n_k, const float * a, int64_t am, int64_t ak, const float * b, int64_t ldb, float * c, int64_t ldc) {
    int i = 0;
    for (; i + RM <= n_i; i += RM) {
        product<RM, N, ADD>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc);
    }
    switch (n_i - i) {
        case 1: product<1, N, ADD>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc); break;
        case 2: product<2, N, ADD>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc); break;
        case 3: product<3, N, ADD>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc); break;
        case 4: product<std::min(4, RM), N, ADD>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc); break;
        case 5: product<std::min(5, RM), N, ADD>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc); break;
    }
}

// n_j vectors of columns, in blocks of RN
template <bool ADD>
void product_of(int n_i, int n_j, int n_k, const float * a, int64_t am, int64_t ak, const float * b, int64_t ldb, float * c, int64_t ldc) {
    for (; n_j >= RN; n_j -= RN, b += RN*VF_W, c += RN*VF_W) {
        rows<RN, ADD>(n_i, n_k, a, am, ak, b, ldb, c, ldc);
    }
    switch (n_j) {
        case 1: rows<1, ADD>(n_i, n_k, a, am, ak, b, ldb, c, ldc); break;
        case 2: rows<std::min(2, RN), ADD>(n_i, n_k, a, am, ak, b, ldb, c, ldc); break;
        case 3: rows<std::min(3, RN), ADD>(n_i, n_k, a, am, ak, b, ldb, c, ldc); break;
    }
}

// A block of tokens of all the query heads of one KV head.
struct task {
    const fattn_op & op;
    int64_t stream, head_kv, t0, n_t;
    int64_t n_rows, ld; // of the block; floats of a row of O and V: DV, padded to whole vectors

    // Row r is token t0 + r % n_t of query head r / n_t.
    int64_t head (int64_t r) const { return head_kv*op.group + r/n_t; }
    int64_t token(int64_t r) const { return t0 + r % n_t; }

    float * q; // [panel][DK][rows of the panel], scaled
    float * o; // [n_rows][ld]
    float * k; // [FATTN_TILE][DK]
    float * v; // [FATTN_TILE][ld]
    float * s; // [FATTN_TILE][PANEL]
    float * bias; // [FATTN_TILE][PANEL], the mask
    float * m; // [n_rows], padded to whole panels
    float * l; // likewise: sums
};

int64_t vectors(int64_t n) { return (n + VF_W - 1)/VF_W; }

void pack_q(const task & t) {
    for (int64_t r0 = 0; r0 < t.n_rows; r0 += PANEL) {
        const int64_t width = VF_W*std::min<int64_t>(RN, vectors(t.n_rows - r0));
        float * panel = t.q + r0*t.op.DK;
        for (int64_t r = 0; r < width; ++r) {
            const bool    real = r0 + r < t.n_rows;
            const float * from = real ? t.op.q_row(t.stream, t.head(r0 + r), t.token(r0 + r)) : nullptr;
            for (int64_t d = 0; d < t.op.DK; ++d) {
                panel[d*width + r] = real ? from[d]*t.op.scale : 0.0f;
            }
        }
    }
}

void fill_bias(const task & t, int64_t r0, int64_t width, int64_t col, int n) {
    for (int64_t r = 0; r < width && r0 + r < t.n_rows; ++r) {
        const int64_t head = t.head(r0 + r);
        const ggml_fp16_t * mask = t.op.mask_row(t.stream, head, t.token(r0 + r), col);
        const float slope = t.op.slope(head);
        float row[FATTN_TILE];
        int i = 0;
        for (; i + VF_W <= n; i += VF_W) {
            vf_store(row + i, vf_mul(vf_load_f16(mask + i), vf_set1(slope)));
        }
        for (; i < n; ++i) {
            row[i] = slope*fp16_to_float(mask[i]);
        }
        for (i = 0; i < n; ++i) {
            t.bias[i*width + r] = row[i];
        }
    }
}

// The panel's scores become weights; maxima and sums of its rows go on, O is scaled where a maximum rose.
void softmax(const task & t, int64_t r0, int64_t width, int n, bool masked) {
    alignas(64) float shrink[PANEL];
    for (int64_t j = 0; j < width; j += VF_W) {
        vf top = vf_set1(-INFINITY);
        if (masked || t.op.softcap != 0.0f) {
            for (int c = 0; c < n; ++c) {
                float * s = t.s + c*width + j;
                vf x = vf_load(s);
                if (t.op.softcap != 0.0f) {
                    x = vf_mul(vf_tanh(x), vf_set1(t.op.softcap));
                }
                if (masked) {
                    x = vf_add(x, vf_load(t.bias + c*width + j));
                }
                vf_store(s, x);
                top = vf_max(top, x);
            }
        } else {
            for (int c = 0; c < n; ++c) {
                top = vf_max(top, vf_load(t.s + c*width + j));
            }
        }
        float * m = t.m + r0 + j;
        const vf m_old = vf_load(m);
        const vf m_new = vf_max(m_old, top);
        // A row that has seen nothing keeps -INFINITY; less the finite limit, its exponentials are 0 instead of NaN.
        const vf limit = vf_max(m_new, vf_set1(-FLT_MAX));
        const vf down  = vf_exp(vf_sub(m_old, limit));
        vf_store(shrink + j, down);
        vf_store(m, m_new);
        vf sum = vf_zero();
        for (int c = 0; c < n; ++c) {
            float * s = t.s + c*width + j;
            const vf e = vf_exp(vf_sub(vf_load(s), limit));
            vf_store(s, e);
            sum = vf_add(sum, e);
        }
        float * l = t.l + r0 + j;
        vf_store(l, vf_fma(vf_load(l), down, sum));
    }
    for (int64_t r = 0; r < width && r0 + r < t.n_rows; ++r) {
        if (shrink[r] != 1.0f) {
            fattn_scale(t.o + (r0 + r)*t.ld, t.ld, shrink[r]);
        }
    }
}

void finish(const task & t, const fattn_plan & plan, int64_t split, float * partials) {
    for (int64_t r = 0; r < t.n_rows; ++r) {
        const float * o = t.o + r*t.ld;
        if (plan.partial > 0) {
            const fattn_partial part = fattn_partial_at(t.op, plan, partials, split, t.op.row(t.stream, t.head(r), t.token(r)));
            *part.m = t.m[r];
            *part.s = t.l[r];
            memcpy(part.o, o, t.op.DV*sizeof(float));
            continue;
        }
        float weight = t.l[r];
        float shrink = 1.0f;
        if (t.op.sinks) {
            const float sink = t.op.sinks[t.head(r)];
            const float m    = std::max(t.m[r], sink);
            shrink = expf(t.m[r] - m);
            weight = weight*shrink + expf(sink - m);
        }
        float * out = t.op.out_row(t.stream, t.head(r), t.token(r));
        const float by = weight > 0.0f ? shrink/weight : 0.0f; // 0: a row that sees nothing
        for (int64_t d = 0; d < t.op.DV; ++d) {
            out[d] = o[d]*by;
        }
    }
}

} // namespace

int64_t fattn_tile_scratch(const fattn_op & op, int64_t n_rows) {
    const int64_t ld = vectors(op.DV)*VF_W, panels = (n_rows + PANEL - 1)/PANEL*PANEL;
    return fattn_padded(panels*op.DK) + fattn_padded(n_rows*ld) + fattn_padded(FATTN_TILE*op.DK) + fattn_padded(FATTN_TILE*ld) +
        2*fattn_padded(FATTN_TILE*PANEL) + 2*fattn_padded(panels);
}

void fattn_tile_task(const fattn_op & op, const fattn_plan & plan, int64_t i, float * scratch, const uint8_t * map, float * partials) {
    const int64_t split   = i % plan.n_splits;
    const int64_t block   = i/plan.n_splits % plan.n_blocks;
    const int64_t head_kv = i/plan.n_splits/plan.n_blocks % op.n_head_kv;
    const int64_t stream  = i/plan.n_splits/plan.n_blocks/op.n_head_kv;

    const int64_t t0 = block*plan.block, n_t = std::min(plan.block, op.n_q - t0);
    task t = { op, stream, head_kv, t0, n_t, n_t*op.group, vectors(op.DV)*VF_W,
        nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr };
    const int64_t panels = (t.n_rows + PANEL - 1)/PANEL*PANEL;
    const auto take = [&](int64_t n) { float * p = scratch; scratch += fattn_padded(n); return p; };
    t.q    = take(panels*op.DK);
    t.o    = take(t.n_rows*t.ld);
    t.k    = take(FATTN_TILE*op.DK);
    t.v    = take(FATTN_TILE*t.ld);
    t.s    = take(FATTN_TILE*PANEL);
    t.bias = take(FATTN_TILE*PANEL);
    t.m    = take(panels);
    t.l    = take(panels);

    pack_q(t);
    memset(t.o, 0, t.n_rows*t.ld*sizeof(float));
    memset(t.v, 0, FATTN_TILE*t.ld*sizeof(float)); // what pads its rows stays zero
    memset(t.bias, 0, FATTN_TILE*PANEL*sizeof(float));
    memset(t.l, 0, panels*sizeof(float));
    std::fill(t.m, t.m + panels, -INFINITY);

    const int64_t tile1 = std::min((split + 1)*plan.tiles_split, op.n_tiles());
    for (int64_t tile = split*plan.tiles_split; tile < tile1; ++tile) {
        const int64_t col  = tile*FATTN_TILE;
        const int     n    = std::min<int64_t>(FATTN_TILE, op.n_cols - col);
        const uint8_t what = fattn_mask_of(op, map, stream, t0, n_t, tile);
        if (what == FATTN_MASK_HIDES) {
            continue;
        }
        const bool masked = what == FATTN_MASK_MIXED;
        fattn_to_float(op.k, op.rows_of(op.k, stream, head_kv, col), n, op.DK, t.k, op.DK);
        fattn_to_float(op.v, op.rows_of(op.v, stream, head_kv, col), n, op.DV, t.v, t.ld);
        for (int64_t r0 = 0; r0 < t.n_rows; r0 += PANEL) {
            const int64_t nv    = std::min<int64_t>(RN, vectors(t.n_rows - r0));
            const int64_t width = nv*VF_W;
            product_of<false>(n, nv, op.DK, t.k, op.DK, 1, t.q + r0*op.DK, width, t.s, width);
            if (masked) {
                fill_bias(t, r0, width, col, n);
            }
            softmax(t, r0, width, n, masked);
            product_of<true>(std::min<int64_t>(width, t.n_rows - r0), t.ld/VF_W, n, t.s, 1, width, t.v, t.ld, t.o + r0*t.ld, t.ld);
        }
    }
    finish(t, plan, split, partials);
}
