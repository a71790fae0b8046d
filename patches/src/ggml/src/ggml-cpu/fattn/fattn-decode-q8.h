// The two products of the decode kernel for a q8_0 cache, in integers (see fattn-int.h).
//
// Why: 8 bits a value leave less time per value than floats need: a row of K takes a dot product of bytes, a row of V a
// multiplication of 16 bits, and only sums become floats.
//
//   q8_query(q, dk, to);  q8_dots(k, nb, n, ..., s);  q8_weights(v, nb, n, ..., w);  q8_sums(v, nb, n, w, ..., o)

#pragma once

#include "fattn-int.h"
#include "fattn-plan.h"

#if FATTN_INT

namespace {

// A query row in 8 bits: for each vector of VB values their scales, what takes FATTN_INT_OFFSET off their sums again, and
// the values. Lane l of the first two is of the values [4*l, 4*l + 4).
struct q8_vector {
    float   scale[VF_W];
    int32_t start[VF_W];
    int8_t  q[VB];

    static int64_t count (int64_t dk) { return (dk + VB - 1)/VB; }
    static int64_t floats(int64_t dk) { return count(dk)*sizeof(q8_vector)/sizeof(float); }
};

void q8_query(const float * x, int64_t dk, q8_vector * to) {
    memset(to, 0, q8_vector::count(dk)*sizeof(q8_vector));
    for (int64_t b = 0; b < dk; b += QK8_0) {
        int16_t q[QK8_0];
        const float scale = vf_round_q8(x + b, q);
        for (int64_t i = b; i < b + QK8_0; ++i) {
            q8_vector & v = to[i/VB];
            v.q[i % VB] = (int8_t) q[i - b];
            v.start[i % VB/4] -= FATTN_INT_OFFSET*q[i - b];
            v.scale[i % VB/4]  = scale;
        }
    }
}

// s[r][0..3] = q[r] . k[j*nb], j = 0..3
template <int R>
inline void q8_dots4(const char * k, size_t nb, const q8_vector * const * q, int dk, float * s, int64_t lds) {
    vf acc[R][4];
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = vf_zero();
    }
    for (int i = 0; i < dk; i += VB) {
        FATTN_UNROLL
        for (int j = 0; j < 4; ++j) {
            const block_q8_0 * b = (const block_q8_0 *) (k + j*nb) + i/QK8_0;
            const vb x     = vb_load(b, i % QK8_0, dk - i);
            const vf scale = vb_scales(b, dk - i);
            FATTN_UNROLL
            for (int r = 0; r < R; ++r) {
                const q8_vector & y = q[r][i/VB];
                acc[r][j] = vf_fma(vb_dot(x, y.q, y.start), vf_mul(scale, vf_load(y.scale)), acc[r][j]);
            }
        }
    }
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        vf_sum4(s + r*lds, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    }
}

// s[r][c] = q[r] . k[c] for n rows of K that are nb bytes apart
template <int R>
void q8_dots(const char * k, size_t nb, int n, const q8_vector * const * q, int dk, float * s, int64_t lds, ptrdiff_t ahead) {
    int c = 0;
    for (; c + 4 <= n; c += 4) {
        for (int j = 0; j < 4; ++j) {
            fattn_fetch(k + (c + j)*nb, ahead, dk/QK8_0*sizeof(block_q8_0));
        }
        q8_dots4<R>(k + c*nb, nb, q, dk, s + c, lds);
    }
    for (; c < n; ++c) {
        float same[R*4];
        q8_dots4<R>(k + c*nb, 0, q, dk, same, 4);
        for (int r = 0; r < R; ++r) {
            s[r*lds + c] = same[r*4];
        }
    }
}

// What a column's block adds to a row's sums, in 16 bits: w[r][b][c] = p[r][c]*d[b][c]/unit[r][b], for c < COLUMNS, p
// being 0 from n on. d: the scales of n rows of V.
template <int COLUMNS>
void q8_weights(const char * v, size_t nb, int n, int64_t blocks, const float * p, int n_rows, ggml_fp16_t * scales, int16_t * w, float * unit) {
    // Long before they are read as vectors: a processor waits where those come right after.
    for (int64_t b = 0; b < blocks; ++b) {
        for (int c = 0; c < n; ++c) {
            scales[b*COLUMNS + c] = ((const block_q8_0 *) (v + c*nb))[b].d;
        }
        for (int c = n; c < COLUMNS; ++c) {
            scales[b*COLUMNS + c] = 0;
        }
    }
    alignas(64) float of_row[FATTN_DECODE_ROWS*COLUMNS];
    float most[FATTN_DECODE_ROWS];
    for (int r = 0; r < n_rows; ++r) {
        most[r] = vf_normalized<COLUMNS>(p + r*COLUMNS, of_row + r*COLUMNS, 1.0f);
    }
    for (int64_t b = 0; b < blocks; ++b) {
        alignas(64) float of_block[COLUMNS];
        for (int c = 0; c < COLUMNS; c += VF_W) {
            vf_store(of_block + c, vf_load_f16(scales + b*COLUMNS + c));
        }
        const float most_of_block = vf_normalized<COLUMNS>(of_block, of_block, 32767.0f);
        for (int r = 0; r < n_rows; ++r) {
            for (int c = 0; c < COLUMNS; c += VF_W) {
                const vf x = vf_mul(vf_load(of_row + r*COLUMNS + c), vf_load(of_block + c));
                vf_store_i16(w + (r*blocks + b)*COLUMNS + c, x);
            }
            unit[r*blocks + b] = most[r]*most_of_block/32767.0f;
        }
    }
}

// o[r][at, at + N*VW) += unit[r]*w[r][c] * v[c], summed over c; v: first block of those values in the first row
template <int R, int N>
void q8_sums(const char * v, size_t nb, int n, const int16_t * w, const float * unit, int64_t blocks, int columns, int at, float * const * o, ptrdiff_t ahead) {
    vi acc[R][N][2];
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        FATTN_UNROLL
        for (int u = 0; u < N; ++u) {
            acc[r][u][0] = acc[r][u][1] = vi_zero();
        }
    }
    // either whole blocks, or a piece of one
    const auto block = [at](int u) { return (at + u*VW)/QK8_0; };
    for (int c = 0; c < n; c += 2) {
        const char * v0 = v + c*nb;
        const char * v1 = c + 1 < n ? v0 + nb : v0; // weighs nothing then
        fattn_fetch(v0 + block(0)*sizeof(block_q8_0), ahead, N*VW/QK8_0*sizeof(block_q8_0) + 1);
        fattn_fetch(v1 + block(0)*sizeof(block_q8_0), ahead, N*VW/QK8_0*sizeof(block_q8_0) + 1);
        FATTN_UNROLL
        for (int u = 0; u < N; ++u) {
            const vw x = vw_load(((const block_q8_0 *) v0)[block(u)].qs + (at + u*VW) % QK8_0, ((const block_q8_0 *) v1)[block(u)].qs + (at + u*VW) % QK8_0);
            FATTN_UNROLL
            for (int r = 0; r < R; ++r) {
                int32_t both;
                memcpy(&both, w + (r*blocks + block(u))*columns + c, sizeof(both));
                vw_add(acc[r][u], x, both);
            }
        }
    }
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        FATTN_UNROLL
        for (int u = 0; u < N; ++u) {
            vf sums[2];
            vw_finish(acc[r][u], sums);
            float * to = o[r] + at + u*VW;
            const vf by = vf_set1(unit[r*blocks + block(u)]);
            vf_store(to,        vf_fma(sums[0], by, vf_load(to)));
            vf_store(to + VF_W, vf_fma(sums[1], by, vf_load(to + VF_W)));
        }
    }
}

template <int R>
void q8_sums_of_row(const char * v, size_t nb, int n, const int16_t * w, const float * unit, int64_t blocks, int columns, int dv, float * const * o, ptrdiff_t ahead) {
    constexpr int N = std::max(1, std::min(4, FATTN_REGISTERS/4/R));
    int at = 0;
    for (; at + N*VW <= dv; at += N*VW) {
        q8_sums<R, N>(v, nb, n, w, unit, blocks, columns, at, o, ahead);
    }
    for (; at < dv; at += VW) {
        q8_sums<R, 1>(v, nb, n, w, unit, blocks, columns, at, o, ahead);
    }
}

} // namespace

#endif
