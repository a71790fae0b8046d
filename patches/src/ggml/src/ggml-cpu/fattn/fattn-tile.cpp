// Attention of many query rows: tiles of K and V are converted once for a block of tokens of all the query heads that
// share them, and two register-blocked matrix products do the rest.
//
// Why: the scores are computed transposed, S^T = K Q^T. Then a vector holds one KV column of several query rows: K and
// V are used as the cache stores them, row by row; only Q is transposed, once per task; the softmax needs no sums
// across a vector; and its weights lie as the second product, O += P V, needs them.
//
//   K [column][DK], broadcast      x  Q panel [DK][rows]  ->  S [column][rows]
//   S [column][rows], broadcast    x  V [column][DV]      ->  O [row][DV]
//
// Blocks of 8 bits or fewer are multiplied as integers where the CPU has the instructions for it (fattn-tile-q8.h).
//
// Use: fattn.cpp calls fattn_tile_task() when a KV head has more than FATTN_DECODE_ROWS query rows.

#include "fattn.h"
#include "fattn-op.h"
#include "fattn-simd.h"
#include "fattn-tile-q8.h"

#include <cfloat>

namespace {

// Registers: RM*RN sums, RN values of one operand, a broadcast of the other.
constexpr int RM = FATTN_REGISTERS >= 32 || VF_W > 4 ? 6 : 4;
constexpr int RN = FATTN_REGISTERS >= 32 ? 4 : 2;
constexpr int PANEL = RN*VF_W; // query rows of a panel, at most

// How the sums relate to what c holds: they replace it, start from it, or are added to it at the end.
enum { REPLACE, START_FROM, ADD };

// c[i][j] (+)= sum over k of a[i*am + k*ak]*b[k*ldb + j], for R rows and N vectors of columns
template <int R, int N, int TO>
inline void product(
        int n_k, const float * a, int64_t am, int64_t ak, const float * b, int64_t ldb, float * c, int64_t ldc) {
    vf acc[R][N];
    FATTN_UNROLL
    for (int i = 0; i < R; ++i) {
        FATTN_UNROLL
        for (int j = 0; j < N; ++j) {
            acc[i][j] = TO == START_FROM ? vf_load(c + i*ldc + j*VF_W) : vf_zero();
        }
    }
    for (int k = 0; k < n_k; ++k) {
        vf x[N];
        FATTN_UNROLL
        for (int j = 0; j < N; ++j) {
            x[j] = vf_load(b + k*ldb + j*VF_W);
        }
        FATTN_UNROLL
        for (int i = 0; i < R; ++i) {
            const vf y = vf_set1(a[i*am + k*ak]);
            FATTN_UNROLL
            for (int j = 0; j < N; ++j) {
                acc[i][j] = vf_fma(y, x[j], acc[i][j]);
            }
        }
    }
    FATTN_UNROLL
    for (int i = 0; i < R; ++i) {
        FATTN_UNROLL
        for (int j = 0; j < N; ++j) {
            if constexpr (TO == ADD) {
                acc[i][j] = vf_add(vf_load(c + i*ldc + j*VF_W), acc[i][j]);
            }
            vf_store(c + i*ldc + j*VF_W, acc[i][j]);
        }
    }
}

// n_i rows, in blocks of RM
template <int N, int TO>
void product_of_rows(
        int n_i, int n_k, const float * a, int64_t am, int64_t ak, const float * b, int64_t ldb,
        float * c, int64_t ldc) {
    int i = 0;
    for (; i + RM <= n_i; i += RM) {
        product<RM, N, TO>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc);
    }
    switch (n_i - i) {
        case 1: product<1, N, TO>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc); break;
        case 2: product<2, N, TO>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc); break;
        case 3: product<3, N, TO>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc); break;
        case 4: product<std::min(4, RM), N, TO>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc); break;
        case 5: product<std::min(5, RM), N, TO>(n_k, a + i*am, am, ak, b, ldb, c + i*ldc, ldc); break;
    }
}

// n_j vectors of columns, in blocks of RN
template <int TO>
void product_of(
        int n_i, int n_j, int n_k, const float * a, int64_t am, int64_t ak, const float * b, int64_t ldb,
        float * c, int64_t ldc) {
    for (; n_j >= RN; n_j -= RN, b += RN*VF_W, c += RN*VF_W) {
        product_of_rows<RN, TO>(n_i, n_k, a, am, ak, b, ldb, c, ldc);
    }
    switch (n_j) {
        case 1: product_of_rows<1, TO>(n_i, n_k, a, am, ak, b, ldb, c, ldc); break;
        case 2: product_of_rows<std::min(2, RN), TO>(n_i, n_k, a, am, ak, b, ldb, c, ldc); break;
        case 3: product_of_rows<std::min(3, RN), TO>(n_i, n_k, a, am, ak, b, ldb, c, ldc); break;
    }
}

bool k_in_integers(const fattn_op & op) { return FATTN_DOT8  && fattn_like_q8_0(op.k->type); }
bool v_in_integers(const fattn_op & op) { return FATTN_DOT16 && fattn_v_in_16_bits(op); }

// A block of tokens of all the query heads of one KV head.
struct task {
    const fattn_op & op;
    int64_t stream, head_kv, t0, n_t;
    int64_t n_rows, ld; // of the block; floats of a row of O and V: DV, padded to whole vectors

    // Row r is token t0 + r % n_t of query head r / n_t.
    int64_t head (int64_t r) const { return head_kv*op.group + r/n_t; }
    int64_t token(int64_t r) const { return t0 + r % n_t; }

    float * Q    = nullptr; // [panel][DK][rows of the panel], scaled
    float * O    = nullptr; // [n_rows][ld]
    float * K    = nullptr; // [FATTN_TILE][DK]
    float * V    = nullptr; // [FATTN_TILE][ld]
    float * S    = nullptr; // [FATTN_TILE][PANEL], scores, then the weights P in their place
    float * bias = nullptr; // [FATTN_TILE][PANEL], the mask
    float * m    = nullptr; // [n_rows], padded to whole panels
    float * l    = nullptr; // likewise
    float * beta = nullptr; // [PANEL]; 1 unless V is in integers

    // in integers:
    float * blocks   = nullptr; // two rows of blocks of q8_0
    float * k_scales = nullptr; // [FATTN_TILE][DK/32]
    float * v_scales = nullptr; // [DV/32][FATTN_TILE]
    float * v_unit   = nullptr; // [DV/32]
    float * weights  = nullptr; // [FATTN_TILE/2][PANEL], two weights of 16 bits each

    // Places the arrays in the scratch memory, one after the other, and returns the sum of their sizes.
    int64_t place(float * scratch);
    float * panel(int64_t r0) const; // of Q
};

int64_t vectors(int64_t n) { return (n + VF_W - 1)/VF_W; }

int64_t panel_floats(const fattn_op & op, int64_t width) {
#if FATTN_DOT8
    if (k_in_integers(op)) {
        return q8_panel::floats(op.DK, width);
    }
#endif
    return op.DK*width;
}

// All panels but the last are full.
float * task::panel(int64_t r0) const { return Q + r0/PANEL*panel_floats(op, PANEL); }

int64_t task::place(float * scratch) {
    const int64_t panels = (n_rows + PANEL - 1)/PANEL;
    int64_t size = 0;
    const auto take = [&](int64_t n) {
        float * p = scratch ? scratch + size : nullptr;
        size += fattn_padded(n);
        return p;
    };
    Q    = take(panels*panel_floats(op, PANEL));
    O    = take(n_rows*ld);
    K    = take(FATTN_TILE*op.DK);
    V    = take(FATTN_TILE*ld);
    S    = take(FATTN_TILE*PANEL);
    bias = take(FATTN_TILE*PANEL);
    m    = take(panels*PANEL);
    l    = take(panels*PANEL);
    beta = take(PANEL);
    if (k_in_integers(op) || v_in_integers(op)) {
        blocks   = take(2*std::max(op.DK, op.DV));
        k_scales = take(FATTN_TILE*(op.DK/QK));
        v_scales = take(FATTN_TILE*(op.DV/QK));
        v_unit   = take(op.DV/QK);
        weights  = take(FATTN_TILE/2*PANEL);
    }
    return size;
}

void pack_q(const task & t) {
    for (int64_t r0 = 0; r0 < t.n_rows; r0 += PANEL) {
        const int64_t width = VF_W*std::min<int64_t>(RN, vectors(t.n_rows - r0));
        float * panel = t.panel(r0);
        memset(panel, 0, panel_floats(t.op, width)*sizeof(float)); // for the rows that pad it
        for (int64_t r = 0; r < width && r0 + r < t.n_rows; ++r) {
            const float * from = t.op.q_row(t.stream, t.head(r0 + r), t.token(r0 + r));
#if FATTN_DOT8
            if (k_in_integers(t.op)) {
                q8_pack_q(from, t.op.scale, t.op.DK, r, width, panel);
                continue;
            }
#endif
            for (int64_t d = 0; d < t.op.DK; ++d) {
                panel[d*width + r] = from[d]*t.op.scale;
            }
        }
    }
}

// K and V of n columns from col on
void load(const task & t, int64_t col, int n) {
    const char * k = t.op.rows_of(t.op.k, t.stream, t.head_kv, col);
    const char * v = t.op.rows_of(t.op.v, t.stream, t.head_kv, col);
#if FATTN_DOT8
    if (k_in_integers(t.op)) {
        q8_pack_k(t.op.k, k, n, t.op.DK, (block_q8_0 *) t.blocks, (int8_t *) t.K, t.k_scales);
        k = nullptr;
    }
#endif
#if FATTN_DOT16
    if (v_in_integers(t.op)) {
        q8_pack_v(t.op.v, v, n, t.op.DV, (block_q8_0 *) t.blocks, (int32_t *) t.V, t.v_scales, t.v_unit);
        v = nullptr;
    }
#endif
    if (k) {
        fattn_to_float(t.op.k, k, n, t.op.DK, t.K, t.op.DK);
    }
    if (v) {
        fattn_to_float(t.op.v, v, n, t.op.DV, t.V, t.ld);
    }
}

// Prefetches the tile from col on. The query rows [r0, r1) prefetch their fraction of its columns, whose rows lie too
// far apart in memory for the hardware's prefetcher.
void fetch(const task & t, int64_t col, int64_t r0, int64_t r1) {
    const int64_t n = std::min<int64_t>(FATTN_TILE, t.op.n_cols - col);
    const char * k = t.op.rows_of(t.op.k, t.stream, t.head_kv, col);
    const char * v = t.op.rows_of(t.op.v, t.stream, t.head_kv, col);
    for (int64_t c = n*r0/t.n_rows; c < n*r1/t.n_rows; ++c) {
        fattn_fetch(k + c*t.op.k->nb[1], 0, ggml_row_size(t.op.k->type, t.op.DK));
        fattn_fetch(v + c*t.op.v->nb[1], 0, ggml_row_size(t.op.v->type, t.op.DV));
    }
}

void scores(const task & t, int64_t r0, int64_t width, int n) {
#if FATTN_DOT8
    if (k_in_integers(t.op)) {
        return q8_scores(n, width/VF_W, t.op.DK/QK, (const int8_t *) t.K, t.k_scales, t.panel(r0), t.S);
    }
#endif
    // One long sum is less exact than several short ones. Only with a cache in f32 is that the largest error.
    const int64_t step = t.op.k->type == GGML_TYPE_F32 ? 64 : t.op.DK;
    const float * Q = t.panel(r0);
    product_of<REPLACE>(n, width/VF_W, std::min(step, t.op.DK), t.K, t.op.DK, 1, Q, width, t.S, width);
    for (int64_t d = step; d < t.op.DK; d += step) {
        const int64_t n_d = std::min(step, t.op.DK - d);
        product_of<ADD>(n, width/VF_W, n_d, t.K + d, t.op.DK, 1, Q + d*width, width, t.S, width);
    }
}

void outputs(const task & t, int64_t r0, int64_t width, int n) {
    const int64_t n_rows = std::min<int64_t>(width, t.n_rows - r0);
#if FATTN_DOT16
    if (v_in_integers(t.op)) {
        return q8_outputs(n, n_rows, width, t.op.DV, t.S, (const int32_t *) t.V, t.v_scales, t.v_unit, t.beta,
            (int32_t *) t.weights, t.O + r0*t.ld, t.ld);
    }
#endif
    product_of<START_FROM>(n_rows, t.ld/VF_W, n, t.S, 1, width, t.V, t.ld, t.O + r0*t.ld, t.ld);
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

// The panel's S becomes P; m, l and O of its rows follow the new maximum.
void softmax(const task & t, int64_t r0, int64_t width, int n, bool masked) {
    alignas(64) float alpha[PANEL];
    for (int64_t j = 0; j < width; j += VF_W) {
        vf m_tile = vf_set1(-INFINITY);
        if (masked || t.op.softcap != 0.0f) {
            for (int c = 0; c < n; ++c) {
                float * S = t.S + c*width + j;
                vf x = vf_load(S);
                if (t.op.softcap != 0.0f) {
                    x = vf_mul(vf_tanh(x), vf_set1(t.op.softcap));
                }
                if (masked) {
                    x = vf_add(x, vf_load(t.bias + c*width + j));
                }
                vf_store(S, x);
                m_tile = vf_max(m_tile, x);
            }
        } else {
            for (int c = 0; c < n; ++c) {
                m_tile = vf_max(m_tile, vf_load(t.S + c*width + j));
            }
        }
        float * m = t.m + r0 + j;
        const vf m_old = vf_load(m);
        const vf m_new = vf_max(m_old, m_tile);
        // A row that has seen nothing keeps -INFINITY; relative to a finite value its exponentials are 0, not NaN.
        const vf m_finite = vf_max(m_new, vf_set1(-FLT_MAX));
        const vf a        = vf_exp(vf_sub(m_old, m_finite));
        vf_store(alpha + j, a);
        vf_store(m, m_new);
        // Weights that will be rounded to 16 bits are relative to the tile's own maximum, so that the largest is 1.
        const bool own  = v_in_integers(t.op);
        const vf   beta = own ? vf_exp(vf_sub(m_tile, m_finite)) : vf_set1(1.0f);
        const vf   base = own ? vf_max(m_tile, vf_set1(-FLT_MAX)) : m_finite;
        vf_store(t.beta + j, beta);
        vf sum = vf_zero();
        for (int c = 0; c < n; ++c) {
            float * S = t.S + c*width + j;
            const vf P = vf_exp(vf_sub(vf_load(S), base));
            vf_store(S, P);
            sum = vf_add(sum, P);
        }
        float * l = t.l + r0 + j;
        vf_store(l, vf_fma(vf_load(l), a, vf_mul(beta, sum)));
    }
    for (int64_t r = 0; r < width && r0 + r < t.n_rows; ++r) {
        if (alpha[r] != 1.0f) {
            fattn_scale(t.O + (r0 + r)*t.ld, t.ld, alpha[r]);
        }
    }
}

void finish(const task & t, const fattn_tasks & tasks, int64_t split, float * partials) {
    for (int64_t r = 0; r < t.n_rows; ++r) {
        const int64_t head = t.head(r), token = t.token(r);
        const float * O = t.O + r*t.ld;
        if (tasks.partial > 0) {
            const fattn_partial part = fattn_partial_at(t.op, tasks, partials, split, t.op.row(t.stream, head, token));
            *part.m = t.m[r];
            *part.l = t.l[r];
            memcpy(part.O, O, t.op.DV*sizeof(float));
            continue;
        }
        float l     = t.l[r];
        float alpha = 1.0f;
        if (t.op.sinks) {
            const float sink  = t.op.sinks[head];
            const float m_new = std::max(t.m[r], sink);
            alpha = expf(t.m[r] - m_new);
            l     = l*alpha + expf(sink - m_new);
        }
        float * out = t.op.out_row(t.stream, head, token);
        const float by = l != 0.0f ? alpha/l : 0.0f; // 0: no visible column
        for (int64_t d = 0; d < t.op.DV; ++d) {
            out[d] = O[d]*by;
        }
    }
}

} // namespace

static task make_task(const fattn_op & op, int64_t stream, int64_t head_kv, int64_t t0, int64_t n_t) {
    return { op, stream, head_kv, t0, n_t, n_t*op.group, vectors(op.DV)*VF_W };
}

int64_t fattn_tile_scratch(const fattn_op & op, int64_t n_tokens) {
    return make_task(op, 0, 0, 0, n_tokens).place(nullptr);
}

void fattn_tile_task(
        const fattn_op & op, const fattn_tasks & tasks, int64_t i, float * scratch, const uint8_t * map,
        float * partials) {
    const int64_t split   = i % tasks.n_splits;
    const int64_t block   = i/tasks.n_splits % tasks.n_blocks;
    const int64_t head_kv = i/tasks.n_splits/tasks.n_blocks % op.n_head_kv;
    const int64_t stream  = i/tasks.n_splits/tasks.n_blocks/op.n_head_kv;

    const int64_t t0 = block*tasks.block, n_t = std::min(tasks.block, op.n_q - t0);
    task t = make_task(op, stream, head_kv, t0, n_t);
    t.place(scratch);
    const int64_t n_padded = (t.n_rows + PANEL - 1)/PANEL*PANEL;

    pack_q(t);
    memset(t.O, 0, t.n_rows*t.ld*sizeof(float));
    memset(t.V, 0, FATTN_TILE*t.ld*sizeof(float)); // the padding of its rows stays zero
    memset(t.bias, 0, FATTN_TILE*PANEL*sizeof(float));
    memset(t.l, 0, n_padded*sizeof(float));
    std::fill(t.m, t.m + n_padded, -INFINITY);

    const int64_t tile1 = std::min((split + 1)*tasks.tiles_split, op.n_tiles());
    const auto mask_of = [&](int64_t tile, int64_t r0, int64_t r1) { // of the rows [r0, r1)
        const bool one_head = r0/n_t == (r1 - 1)/n_t;
        return fattn_mask_of(op, map, stream, one_head ? t.token(r0) : t0, one_head ? r1 - r0 : n_t, tile);
    };
    const auto visible_from = [&](int64_t tile) {
        while (tile < tile1 && mask_of(tile, 0, t.n_rows) == FATTN_MASK_HIDES) {
            ++tile;
        }
        return tile;
    };
    for (int64_t tile = visible_from(split*tasks.tiles_split), next; tile < tile1; tile = next) {
        next = visible_from(tile + 1);
        const int64_t col = tile*FATTN_TILE;
        const int     n   = std::min<int64_t>(FATTN_TILE, op.n_cols - col);
        load(t, col, n);
        for (int64_t r0 = 0; r0 < t.n_rows; r0 += PANEL) {
            const int64_t r1 = std::min<int64_t>(r0 + PANEL, t.n_rows);
            if (next < tile1) {
                fetch(t, next*FATTN_TILE, r0, r1);
            }
            const uint8_t mask = mask_of(tile, r0, r1);
            if (mask == FATTN_MASK_HIDES) {
                continue;
            }
            const int64_t width = VF_W*vectors(r1 - r0);
            scores(t, r0, width, n);
            if (mask == FATTN_MASK_MIXED) {
                fill_bias(t, r0, width, col, n);
            }
            softmax(t, r0, width, n, mask == FATTN_MASK_MIXED);
            outputs(t, r0, width, n);
        }
    }
    finish(t, tasks, split, partials);
}
