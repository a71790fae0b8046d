// The two products of the tile kernel for a q8_0 cache, in integers, where the CPU has dot products of 8 and 16 bits.
//
// Why: such an instruction does four (K) or two (V) times as many multiplications as one in floats.
//
//   S^T = K Q^T: Q is rounded to 8 bits in blocks of 32, as upstream's kernels do. A block's sum becomes a float once.
//   O += P V: a weight times the scale of V's block is rounded to 16 bits; two columns are added up at a time. A tile's
//   sum becomes a float once.
//
// Use: q8_scores() exists if FATTN_DOT8 is 1, q8_outputs() if FATTN_DOT16 is.

#pragma once

#include "fattn-int.h"
#include "fattn-op.h"
#include "fattn-quants.h"

namespace {

#if FATTN_DOT8

// Columns of K of a tile: values [n][DK], plus FATTN_INT_OFFSET, and scales [n][DK/32].
void q8_pack_k(const ggml_tensor * kv, const char * rows, int n, int64_t ne, block_q8_0 * blocks,
        int8_t * k, float * scales) {
    for (int c = 0; c < n; ++c, rows += kv->nb[1]) {
        fattn_as_q8_0(kv->type, rows, ne, blocks);
        for (int64_t b = 0; b < ne/QK; ++b) {
            for (int i = 0; i < QK; ++i) {
                *k++ = (int8_t) (blocks[b].qs[i] ^ (FATTN_INT_OFFSET ? -128 : 0));
            }
            *scales++ = fp16_to_float(blocks[b].d);
        }
    }
}

// Query rows of a panel, per block of 32 values: the values, four to a lane [8][width][4]; starts of the sums, which
// take the offset off again [width]; scales [width].
struct q8_panel {
    static int64_t floats(int64_t dk, int64_t width) { return dk/QK*width*(QK/4 + 2); }
};

void q8_pack_q(const float * x, float by, int64_t dk, int64_t r, int64_t width, float * panel) {
    for (int64_t b = 0; b < dk; b += QK, panel += q8_panel::floats(QK, width)) {
        int8_t  * q     = (int8_t  *) panel;
        int32_t * start = (int32_t *) (panel + QK/4*width);
        float   * scale = panel + (QK/4 + 1)*width;
        int16_t rounded[QK];
        scale[r] = by*vf_round_q8(x + b, rounded);
        int32_t sum = 0;
        for (int i = 0; i < QK; ++i) {
            q[i/4*width*4 + r*4 + i % 4] = (int8_t) rounded[i];
            sum += rounded[i];
        }
        start[r] = -FATTN_INT_OFFSET*sum;
    }
}

// S[i][j] for R columns of K and N vectors of query rows
template <int R, int N>
inline void q8_product(
        int64_t blocks, const int8_t * k, const float * scales, const float * panel, int64_t width, float * S) {
    vf sum[R][N];
    FATTN_UNROLL
    for (int i = 0; i < R; ++i) {
        FATTN_UNROLL
        for (int j = 0; j < N; ++j) {
            sum[i][j] = vf_zero();
        }
    }
    for (int64_t b = 0; b < blocks; ++b, panel += q8_panel::floats(QK, width)) {
        vi acc[R][N];
        FATTN_UNROLL
        for (int i = 0; i < R; ++i) {
            FATTN_UNROLL
            for (int j = 0; j < N; ++j) {
                acc[i][j] = vi_load((const int32_t *) (panel + QK/4*width) + j*VF_W);
            }
        }
        for (int g = 0; g < QK/4; ++g) {
            vi x[N];
            FATTN_UNROLL
            for (int j = 0; j < N; ++j) {
                x[j] = vi_load((const int32_t *) (panel + g*width) + j*VF_W);
            }
            FATTN_UNROLL
            for (int i = 0; i < R; ++i) {
                const vi y = vi_set1(four(k + i*blocks*QK + b*QK + g*4));
                FATTN_UNROLL
                for (int j = 0; j < N; ++j) {
                    acc[i][j] = vi_dot8(acc[i][j], y, x[j]);
                }
            }
        }
        FATTN_UNROLL
        for (int i = 0; i < R; ++i) {
            const vf d = vf_set1(scales[i*blocks + b]);
            FATTN_UNROLL
            for (int j = 0; j < N; ++j) {
                const vf scale = vf_mul(d, vf_load(panel + (QK/4 + 1)*width + j*VF_W));
                sum[i][j] = vf_fma(vf_of(acc[i][j]), scale, sum[i][j]);
            }
        }
    }
    FATTN_UNROLL
    for (int i = 0; i < R; ++i) {
        FATTN_UNROLL
        for (int j = 0; j < N; ++j) {
            vf_store(S + i*width + j*VF_W, sum[i][j]);
        }
    }
}

template <int N>
void q8_columns(
        int n, int64_t blocks, const int8_t * k, const float * scales, const float * panel, int64_t width, float * S) {
    constexpr int R = 3; // R*N sums of integers, as many of floats
    int c = 0;
    for (; c + R <= n; c += R) {
        q8_product<R, N>(blocks, k + c*blocks*QK, scales + c*blocks, panel, width, S + c*width);
    }
    for (; c < n; ++c) {
        q8_product<1, N>(blocks, k + c*blocks*QK, scales + c*blocks, panel, width, S + c*width);
    }
}

// S[c][width] for n columns of K and a panel of nv vectors of query rows
void q8_scores(
        int n, int64_t nv, int64_t blocks, const int8_t * k, const float * scales, const float * panel, float * S) {
    switch (nv) {
        case 1: q8_columns<1>(n, blocks, k, scales, panel, VF_W, S); break;
        case 2: q8_columns<2>(n, blocks, k, scales, panel, 2*VF_W, S); break;
        case 3: q8_columns<3>(n, blocks, k, scales, panel, 3*VF_W, S); break;
        case 4: q8_columns<4>(n, blocks, k, scales, panel, 4*VF_W, S); break;
    }
}

#endif

#if FATTN_DOT16

// Columns of V of a tile, in pairs: values [FATTN_TILE/2][DV][2], and per block of 32 the scales divided by unit[b]
// [DV/32][FATTN_TILE], the largest of which is 32767. Zeros after column n.
void q8_pack_v(const ggml_tensor * kv, const char * rows, int n, int64_t ne, block_q8_0 * blocks,
        int32_t * v, float * scales, float * unit) {
    std::fill(scales, scales + ne/QK*FATTN_TILE, 0.0f);
    for (int c = 0; c < n; c += 2, v += ne) {
        block_q8_0 * b0 = blocks, * b1 = blocks + ne/QK;
        fattn_as_q8_0(kv->type, rows + c*kv->nb[1], ne, b0);
        if (c + 1 < n) {
            fattn_as_q8_0(kv->type, rows + (c + 1)*kv->nb[1], ne, b1);
        } else {
            memset(b1, 0, ne/QK*sizeof(block_q8_0));
        }
        for (int64_t b = 0; b < ne/QK; ++b) {
            for (int i = 0; i < QK; ++i) {
                v[b*QK + i] = (int32_t) ((uint32_t) (uint16_t) b0[b].qs[i] | (uint32_t) (uint16_t) b1[b].qs[i] << 16);
            }
            scales[b*FATTN_TILE + c]     = fp16_to_float(b0[b].d);
            scales[b*FATTN_TILE + c + 1] = fp16_to_float(b1[b].d);
        }
    }
    for (int64_t b = 0; b < ne/QK; ++b) {
        unit[b] = vf_normalized<FATTN_TILE>(scales + b*FATTN_TILE, scales + b*FATTN_TILE, 32767.0f)/32767.0f;
    }
}

// The weights of two columns at a time, times V's scales: [pairs][width][2]
void q8_pack_p(int n, int64_t width, const float * P, const float * scales, int32_t * w) {
    for (int64_t j = 0; j < width; j += VF_W) {
        for (int c = 0; c < n; c += 2) {
            const vf x = vf_mul(vf_load(P + c*width + j), vf_set1(scales[c]));
            const vf y = c + 1 < n ? vf_mul(vf_load(P + (c + 1)*width + j), vf_set1(scales[c + 1])) : vf_zero();
            vi_store(w + c/2*width + j, vi_pair(x, y));
        }
    }
}

// O[i][0, 2*VF_W) += beta[i]*unit * sums over pairs of columns, for R query rows
template <int R>
inline void q8_output(int n_pairs, const int32_t * w, int64_t width, const int32_t * v, int64_t ldv,
        const float * beta, float unit, float * O, int64_t ldo) {
    vi acc[R][2];
    FATTN_UNROLL
    for (int i = 0; i < R; ++i) {
        acc[i][0] = acc[i][1] = vi_zero();
    }
    for (int p = 0; p < n_pairs; ++p) {
        const vi x0 = vi_load(v + p*ldv), x1 = vi_load(v + p*ldv + VF_W);
        FATTN_UNROLL
        for (int i = 0; i < R; ++i) {
            const vi y = vi_set1(w[p*width + i]);
            acc[i][0] = vi_dot16(acc[i][0], y, x0);
            acc[i][1] = vi_dot16(acc[i][1], y, x1);
        }
    }
    FATTN_UNROLL
    for (int i = 0; i < R; ++i) {
        const vf f = vf_set1(beta[i]*unit);
        float * to = O + i*ldo;
        vf_store(to,        vf_fma(vf_of(acc[i][0]), f, vf_load(to)));
        vf_store(to + VF_W, vf_fma(vf_of(acc[i][1]), f, vf_load(to + VF_W)));
    }
}

// O[r] += beta[r] * sum over c of P[c][r]*v[c], for n_rows query rows. w: room for [FATTN_TILE/2][width].
void q8_outputs(int n, int64_t n_rows, int64_t width, int64_t dv, const float * P, const int32_t * v,
        const float * scales, const float * unit, const float * beta, int32_t * w, float * O, int64_t ldo) {
    constexpr int R = 6;
    const int pairs = (n + 1)/2;
    for (int64_t b = 0; b < dv/QK; ++b) {
        q8_pack_p(n, width, P, scales + b*FATTN_TILE, w);
        for (int64_t at = b*QK; at < (b + 1)*QK; at += 2*VF_W) {
            int64_t r = 0;
            for (; r + R <= n_rows; r += R) {
                q8_output<R>(pairs, w + r, width, v + at, dv, beta + r, unit[b], O + r*ldo + at, ldo);
            }
            for (; r + 4 <= n_rows; r += 4) {
                q8_output<4>(pairs, w + r, width, v + at, dv, beta + r, unit[b], O + r*ldo + at, ldo);
            }
            for (; r < n_rows; ++r) {
                q8_output<1>(pairs, w + r, width, v + at, dv, beta + r, unit[b], O + r*ldo + at, ldo);
            }
        }
    }
}

#endif

} // namespace
