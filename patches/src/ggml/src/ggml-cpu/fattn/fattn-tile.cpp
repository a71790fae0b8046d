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
// Blocks of 8 bits or fewer are multiplied as integers where the CPU is good at it (fattn-tile-q8.h).
//
// Use: fattn.cpp calls fattn_tile_task() when a KV head has more than FATTN_DECODE_ROWS query rows.

#include "fattn.h"
#include "fattn-plan.h"
#include "fattn-simd.h"
#include "fattn-tile-q8.h"

#include <cfloat>

namespace {

// Registers: RM*RN sums, RN values of one operand, a broadcast of the other.
constexpr int RM = FATTN_REGISTERS >= 32 || VF_W > 4 ? 6 : 4;
constexpr int RN = FATTN_REGISTERS >= 32 ? 4 : 2;
constexpr int PANEL = RN*VF_W; // query rows of a panel, at most

// What becomes of the sums: they are the result, they go on from it, or they are added to it.
enum { NEW, ON, ADDED };

// c[i][j] (+)= sum over k of a[i*am + k*ak]*b[k*ldb + j], for R rows and N vectors of columns
template <int R, int N, int TO>
inline void product(int n_k, const float * a, int64_t am, int64_t ak, const float * b, int64_t ldb, float * c, int64_t ldc) {
    vf acc[R][N];
    FATTN_UNROLL
    for (int i = 0; i < R; ++i) {
        FATTN_UNROLL
        for (int j = 0; j < N; ++j) {
            acc[i][j] = TO == ON ? vf_load(c + i*ldc + j*VF_W) : vf_zero();
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
            if constexpr (TO == ADDED) {
                acc[i][j] = vf_add(vf_load(c + i*ldc + j*VF_W), acc[i][j]);
            }
            vf_store(c + i*ldc + j*VF_W, acc[i][j]);
        }
    }
}

// n_i rows, in blocks of RM
template <int N, int TO>
void rows(int n_i, int n_k, const float * a, int64_t am, int64_t ak, const float * b, int64_t ldb, float * c, int64_t ldc) {
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
void product_of(int n_i, int n_j, int n_k, const float * a, int64_t am, int64_t ak, const float * b, int64_t ldb, float * c, int64_t ldc) {
    for (; n_j >= RN; n_j -= RN, b += RN*VF_W, c += RN*VF_W) {
        rows<RN, TO>(n_i, n_k, a, am, ak, b, ldb, c, ldc);
    }
    switch (n_j) {
        case 1: rows<1, TO>(n_i, n_k, a, am, ak, b, ldb, c, ldc); break;
        case 2: rows<std::min(2, RN), TO>(n_i, n_k, a, am, ak, b, ldb, c, ldc); break;
        case 3: rows<std::min(3, RN), TO>(n_i, n_k, a, am, ak, b, ldb, c, ldc); break;
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

    float * q = nullptr; // [panel][DK][rows of the panel], scaled
    float * o = nullptr; // [n_rows][ld]
    float * k = nullptr; // [FATTN_TILE][DK]
    float * v = nullptr; // [FATTN_TILE][ld]
    float * s = nullptr; // [FATTN_TILE][PANEL]
    float * bias = nullptr; // [FATTN_TILE][PANEL], the mask
    float * m = nullptr; // [n_rows], padded to whole panels
    float * l = nullptr; // likewise: sums
    float * rise = nullptr; // [PANEL]: what a tile's weights count, which are at most 1, where V is in integers

    // in integers:
    float * blocks = nullptr;   // two rows of blocks of q8_0
    float * k_scales = nullptr; // [FATTN_TILE][DK/32]
    float * v_scales = nullptr; // [DV/32][FATTN_TILE]
    float * v_unit = nullptr;   // [DV/32]
    float * w = nullptr;        // [FATTN_TILE/2][PANEL], two weights of 16 bits each

    // Where the arrays begin in the scratch memory, behind one another; the sum of their sizes.
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

// All panels but the last are full ones.
float * task::panel(int64_t r0) const { return q + r0/PANEL*panel_floats(op, PANEL); }

int64_t task::place(float * scratch) {
    const int64_t panels = (n_rows + PANEL - 1)/PANEL;
    int64_t size = 0;
    const auto take = [&](int64_t n) { float * p = scratch ? scratch + size : nullptr; size += fattn_padded(n); return p; };
    q    = take(panels*panel_floats(op, PANEL));
    o    = take(n_rows*ld);
    k    = take(FATTN_TILE*op.DK);
    v    = take(FATTN_TILE*ld);
    s    = take(FATTN_TILE*PANEL);
    bias = take(FATTN_TILE*PANEL);
    m    = take(panels*PANEL);
    l    = take(panels*PANEL);
    rise = take(PANEL);
    if (k_in_integers(op) || v_in_integers(op)) {
        blocks   = take(2*std::max(op.DK, op.DV));
        k_scales = take(FATTN_TILE*(op.DK/QK));
        v_scales = take(FATTN_TILE*(op.DV/QK));
        v_unit   = take(op.DV/QK);
        w        = take(FATTN_TILE/2*PANEL);
    }
    return size;
}

void pack_q(const task & t) {
    for (int64_t r0 = 0; r0 < t.n_rows; r0 += PANEL) {
        const int64_t width = VF_W*std::min<int64_t>(RN, vectors(t.n_rows - r0));
        float * panel = t.panel(r0);
        memset(panel, 0, panel_floats(t.op, width)*sizeof(float)); // of the rows that pad it
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
        q8_pack_k(t.op.k, k, n, t.op.DK, (block_q8_0 *) t.blocks, (int8_t *) t.k, t.k_scales);
        k = nullptr;
    }
#endif
#if FATTN_DOT16
    if (v_in_integers(t.op)) {
        q8_pack_v(t.op.v, v, n, t.op.DV, (block_q8_0 *) t.blocks, (int32_t *) t.v, t.v_scales, t.v_unit);
        v = nullptr;
    }
#endif
    if (k) {
        fattn_to_float(t.op.k, k, n, t.op.DK, t.k, t.op.DK);
    }
    if (v) {
        fattn_to_float(t.op.v, v, n, t.op.DV, t.v, t.ld);
    }
}

// The columns of the tile from col on, on their way into the cache, a share of them for the query rows [r0, r1): their
// rows lie far apart in memory, where the hardware does not look for what is next.
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
        return q8_scores(n, width/VF_W, t.op.DK/QK, (const int8_t *) t.k, t.k_scales, t.panel(r0), t.s);
    }
#endif
    // One long sum is less exact than several short ones. Only of a cache in f32 it is the largest error.
    const int64_t step = t.op.k->type == GGML_TYPE_F32 ? 64 : t.op.DK;
    product_of<NEW>(n, width/VF_W, std::min(step, t.op.DK), t.k, t.op.DK, 1, t.panel(r0), width, t.s, width);
    for (int64_t d = step; d < t.op.DK; d += step) {
        product_of<ADDED>(n, width/VF_W, std::min(step, t.op.DK - d), t.k + d, t.op.DK, 1, t.panel(r0) + d*width, width, t.s, width);
    }
}

void outputs(const task & t, int64_t r0, int64_t width, int n) {
    const int64_t n_rows = std::min<int64_t>(width, t.n_rows - r0);
#if FATTN_DOT16
    if (v_in_integers(t.op)) {
        return q8_outputs(n, n_rows, width, t.op.DV, t.s, (const int32_t *) t.v, t.v_scales, t.v_unit, t.rise, (int32_t *) t.w, t.o + r0*t.ld, t.ld);
    }
#endif
    product_of<ON>(n_rows, t.ld/VF_W, n, t.s, 1, width, t.v, t.ld, t.o + r0*t.ld, t.ld);
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
        // Weights that will be rounded to 16 bits are of the tile's own maximum, so that its largest is 1.
        const bool own = v_in_integers(t.op);
        const vf rise = own ? vf_exp(vf_sub(top, limit)) : vf_set1(1.0f);
        const vf base = own ? vf_max(top, vf_set1(-FLT_MAX)) : limit;
        vf_store(t.rise + j, rise);
        vf sum = vf_zero();
        for (int c = 0; c < n; ++c) {
            float * s = t.s + c*width + j;
            const vf e = vf_exp(vf_sub(vf_load(s), base));
            vf_store(s, e);
            sum = vf_add(sum, e);
        }
        float * l = t.l + r0 + j;
        vf_store(l, vf_fma(vf_load(l), down, vf_mul(rise, sum)));
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
        const float by = weight != 0.0f ? shrink/weight : 0.0f; // 0: a row that sees nothing
        for (int64_t d = 0; d < t.op.DV; ++d) {
            out[d] = o[d]*by;
        }
    }
}

} // namespace

static task make_task(const fattn_op & op, int64_t stream, int64_t head_kv, int64_t t0, int64_t n_t) {
    return { op, stream, head_kv, t0, n_t, n_t*op.group, vectors(op.DV)*VF_W };
}

int64_t fattn_tile_scratch(const fattn_op & op, int64_t n_tokens) { return make_task(op, 0, 0, 0, n_tokens).place(nullptr); }

void fattn_tile_task(const fattn_op & op, const fattn_plan & plan, int64_t i, float * scratch, const uint8_t * map, float * partials) {
    const int64_t split   = i % plan.n_splits;
    const int64_t block   = i/plan.n_splits % plan.n_blocks;
    const int64_t head_kv = i/plan.n_splits/plan.n_blocks % op.n_head_kv;
    const int64_t stream  = i/plan.n_splits/plan.n_blocks/op.n_head_kv;

    const int64_t t0 = block*plan.block, n_t = std::min(plan.block, op.n_q - t0);
    task t = make_task(op, stream, head_kv, t0, n_t);
    t.place(scratch);
    const int64_t n_padded = (t.n_rows + PANEL - 1)/PANEL*PANEL;

    pack_q(t);
    memset(t.o, 0, t.n_rows*t.ld*sizeof(float));
    memset(t.v, 0, FATTN_TILE*t.ld*sizeof(float)); // what pads its rows stays zero
    memset(t.bias, 0, FATTN_TILE*PANEL*sizeof(float));
    memset(t.l, 0, n_padded*sizeof(float));
    std::fill(t.m, t.m + n_padded, -INFINITY);

    const int64_t tile1 = std::min((split + 1)*plan.tiles_split, op.n_tiles());
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
    for (int64_t tile = visible_from(split*plan.tiles_split), next; tile < tile1; tile = next) {
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
    finish(t, plan, split, partials);
}
