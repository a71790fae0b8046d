// The two products of the decode kernel for a q8_0 cache, in integers (see fattn-int.h).
//
// Why: with 8 bits per value, memory delivers values faster than floats can be computed: a row of K takes a dot product
// of bytes, a row of V a multiplication of 16 bits, and only sums become floats.
//
//   S = Q K^T:  q8_query(q, dk, to);  q8_dots(k, nb, n, ..., S, side)
//   O += P V:   q8_largest(scales, ..., to, largest);  q8_weights(P, ..., to, largest, ..., w, unit);
//               q8_sums_of_row(v, nb, n, w, unit, ..., O, side)

#pragma once

#include "fattn-int.h"
#include "fattn-op.h"

namespace {

// Copies the scales of the blocks of K or V rows to d, [blocks][COLUMNS], zeros after the last column. One by one: as
// vectors they take more instructions to gather, and reading them as vectors right after they were stored stalls. So
// the next head's are copied along with the products of this one, which also brings its rows into the L1 cache.
struct q8_scales {
    const char  * rows;
    size_t        nb, size; // bytes of a row; of a block, which starts with its scale
    int           n;
    ggml_fp16_t * d;

    template <int COLUMNS> void zero_rest(int blocks) const {
        for (int b = 0; b < blocks; ++b) {
            std::fill(d + b*COLUMNS + n, d + (b + 1)*COLUMNS, 0);
        }
    }
    // B blocks of up to N columns.
    template <int COLUMNS, int N, int B> FATTN_INLINE void copy(int c, int block) const {
        const char  * row = rows + c*nb + block*size;
        ggml_fp16_t * to  = d + block*COLUMNS + c;
        const size_t  to_row = nb, to_block = size;
        if (c + N <= n) {
            FATTN_UNROLL
            for (int i = 0; i < N; ++i, row += to_row) {
                copy_blocks<COLUMNS, B>(row, to_block, to + i);
            }
        } else {
            for (; c < n; ++c, ++to, row += to_row) {
                copy_blocks<COLUMNS, B>(row, to_block, to);
            }
        }
    }
    template <int COLUMNS, int B>
    static FATTN_INLINE void copy_blocks(const char * from, size_t size, ggml_fp16_t * to) {
        FATTN_UNROLL
        for (int b = 0; b < B; ++b, from += size) {
            fattn_opaque(from);
            memcpy(to + b*COLUMNS, from, sizeof(*to));
        }
    }
    template <int COLUMNS> void copy_all(int blocks) const {
        for (int c = 0; c < n; c += 4) {
            for (int b = 0; b < blocks; ++b) {
                copy<COLUMNS, 4, 1>(c, b);
            }
        }
    }
};

// Prefetches what is read next, all heads of some rows, at the pace of the computation: as eight runs side by side,
// which was measured to be faster than row by row. Most likely because the hardware's prefetcher follows each run, so
// that lines are already under way, and occupy for a shorter time the buffers that misses of the L2 cache share.
struct fattn_prefetch {
    static constexpr int RUNS = 8;
    const char * run[RUNS];
    ptrdiff_t    at = 0, due = 0, end = 0; // bytes of a run

    // Runs [first, first + n) are equal parts of `bytes` at p.
    void add(int first, int n, const char * p, size_t bytes) {
        if (n == 0) {
            return;
        }
        for (int i = 0; i < n; ++i) {
            run[first + i] = p + i*(bytes/n);
        }
        end = std::max<ptrdiff_t>(end, (bytes + n - 1)/n);
    }
    // Keeps pace with `bytes` that are being read.
    void advance(size_t bytes) {
        if (at >= end) {
            return;
        }
        due = std::min<ptrdiff_t>(due + bytes/RUNS, end);
        for (; at < due; at += 64) {
            for (int i = 0; i < RUNS; ++i) {
                fattn_fetch(run[i], at, 1);
            }
        }
    }
    void finish() { advance(end*RUNS); }
};

// The scales that a head's products use, and what is done along with them: copying the next head's scales, and
// prefetching the rows of the next step.
struct q8_side_work {
    const ggml_fp16_t * scales;
    q8_scales           next;
    fattn_prefetch    * prefetch;
};

} // namespace

#if FATTN_INT

namespace {

// 32 values of a query row in 8 bits. Sums start at `start`, which takes FATTN_INT_OFFSET off again; half of it, since
// two sums are added.
struct q8_block {
    float   scale;
    int32_t start;
    int8_t  q[VB_SPREAD];

    static int64_t floats(int64_t dk) { return dk/QK8_0*sizeof(q8_block)/sizeof(float); }
};

void q8_query(const float * x, int64_t dk, q8_block * to) {
    for (; dk > 0; dk -= QK8_0, x += QK8_0, ++to) {
        int16_t rounded[QK8_0];
        int8_t  q[QK8_0];
        to->scale = vf_round_q8(x, rounded);
        to->start = 0;
        for (int i = 0; i < QK8_0; ++i) {
            q[i]       = (int8_t) rounded[i];
            to->start -= FATTN_INT_OFFSET/2*q[i];
        }
        vb_spread(q, to->q);
    }
}

// S[r][0, VF_W) = q[r] . k[c] for VF_W rows of K that are nb bytes apart
template <int R, int COLUMNS>
inline void q8_dots_of_columns(
        const char * k, size_t nb, const q8_block * q, int blocks, float * S, const q8_side_work & side, int c) {
    vf sum[R];
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        sum[r] = vf_zero();
    }
    for (int b = 0; b < blocks; ++b, k += sizeof(block_q8_0)) {
        fattn_opaque(k);
        side.prefetch->advance(VF_W*sizeof(block_q8_0));
        side.next.copy<COLUMNS, VF_W, 1>(c, b);
        vi acc[R][2];
        FATTN_UNROLL
        for (int r = 0; r < R; ++r) {
            acc[r][0] = acc[r][1] = vi_set1(q[r*blocks + b].start);
        }
        FATTN_UNROLL
        for (int g = 0; g < 2; ++g) {
            vb x[4];
            vb_transposed(k + offsetof(block_q8_0, qs), nb, g, x);
            FATTN_UNROLL
            for (int j = 0; j < 4; ++j) {
                FATTN_UNROLL
                for (int r = 0; r < R; ++r) {
                    acc[r][g] = vb_dot(acc[r][g], x[j], vb_of_query(q[r*blocks + b].q, g, j));
                }
            }
        }
        const vf scale = vf_load_f16(side.scales + b*COLUMNS + c);
        FATTN_UNROLL
        for (int r = 0; r < R; ++r) {
            const vf dot = vf_of(vi_of_columns(acc[r][0], acc[r][1]));
            sum[r] = vf_fma(dot, vf_mul(scale, vf_set1(q[r*blocks + b].scale)), sum[r]);
        }
    }
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        vf_store(S + r*COLUMNS, sum[r]);
    }
}

// S[r][c] = q[r] . k[c] for n >= VF_W rows of K
template <int R, int COLUMNS>
void q8_dots(const char * k, size_t nb, int n, const q8_block * q, int blocks, float * S, const q8_side_work & side) {
    for (int c = 0; c < n; c += VF_W) {
        const int at = std::min(c, n - VF_W); // some of the last columns may be computed twice
        q8_dots_of_columns<R, COLUMNS>(k + at*nb, nb, q, blocks, S + at, side, at);
    }
}

// to = d as floats; largest[b] = largest magnitude of a block. A function apart from q8_weights(), which would have to
// wait for `largest`.
template <int COLUMNS>
void q8_largest(const ggml_fp16_t * d, int blocks, float * to, float * largest) {
    for (int b = 0; b < blocks; ++b) {
        vf max = vf_zero();
        for (int c = b*COLUMNS; c < (b + 1)*COLUMNS; c += VF_W) {
            const vf x = vf_load_f16(d + c);
            vf_store(to + c, x);
            max = vf_max(max, vf_max(x, vf_sub(vf_zero(), x)));
        }
        largest[b] = vf_hmax(max);
    }
}

// The weight of a column's block in a row's sums, in 16 bits: w[r][b][c] = P[r][c]*d[b][c]*32767/largest[b], for
// c < COLUMNS. P is at most 1. A unit of w counts unit[r][b] = beta[r]*largest[b]/32767.
template <int COLUMNS>
void q8_weights(const float * P, const float * beta, int n_rows, const float * d, const float * largest, int64_t blocks,
        int16_t * w, float * unit) {
    for (int64_t b = 0; b < blocks; ++b) {
        const vf by = vf_set1(largest[b] > LEAST ? 32767.0f/largest[b] : 0.0f);
        for (int c = 0; c < COLUMNS; c += VF_W) {
            const vf x = vf_mul(vf_load(d + b*COLUMNS + c), by);
            for (int r = 0; r < n_rows; ++r) {
                vf_store_i16(w + (r*blocks + b)*COLUMNS + c, vf_mul(vf_load(P + r*COLUMNS + c), x));
            }
        }
        for (int r = 0; r < n_rows; ++r) {
            unit[r*blocks + b] = beta[r]*largest[b]/32767.0f;
        }
    }
}

// O[r][at, at + N*VW) += unit[r]*w[r][c] * v[c], summed over c. v: the first of n rows, nb bytes apart
template <int R, int N, int COLUMNS>
void q8_sums(const char * v, size_t nb, int n, const int16_t * w, const float * unit, int64_t blocks, int at,
        float * O, int64_t ldo, const q8_side_work & side) {
    vi acc[R][N][2];
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        FATTN_UNROLL
        for (int u = 0; u < N; ++u) {
            acc[r][u][0] = acc[r][u][1] = vi_zero();
        }
    }
    // the values are whole blocks, or a part of one
    const auto block = [at](int u) { return (at + u*VW)/QK8_0; };
    for (int c = 0; c < n; c += 2) {
        const char * v0 = v + c*nb;
        const char * v1 = c + 1 < n ? v0 + nb : v0; // with a weight of 0
        side.prefetch->advance(2*N*VW*sizeof(block_q8_0)/QK8_0);
        if (at % QK8_0 == 0) {
            side.next.copy<COLUMNS, 2, std::max(1, N*VW/QK8_0)>(c, block(0));
        }
        FATTN_UNROLL
        for (int u = 0; u < N; ++u) {
            const int offset = (at + u*VW) % QK8_0;
            const vw x = vw_load(
                ((const block_q8_0 *) v0)[block(u)].qs + offset, ((const block_q8_0 *) v1)[block(u)].qs + offset);
            FATTN_UNROLL
            for (int r = 0; r < R; ++r) {
                int32_t two_weights;
                memcpy(&two_weights, w + (r*blocks + block(u))*COLUMNS + c, sizeof(two_weights));
                vw_add(acc[r][u], x, two_weights);
            }
        }
    }
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        FATTN_UNROLL
        for (int u = 0; u < N; ++u) {
            vf sums[2];
            vw_finish(acc[r][u], sums);
            float * to = O + r*ldo + at + u*VW;
            const vf by = vf_set1(unit[r*blocks + block(u)]);
            vf_store(to,        vf_fma(sums[0], by, vf_load(to)));
            vf_store(to + VF_W, vf_fma(sums[1], by, vf_load(to + VF_W)));
        }
    }
}

template <int R, int COLUMNS>
void q8_sums_of_row(const char * v, size_t nb, int n, const int16_t * w, const float * unit, int64_t blocks,
        float * O, int64_t ldo, const q8_side_work & side) {
    constexpr int N = std::max(1, std::min(4, FATTN_REGISTERS/4/R));
    const int dv = blocks*QK8_0;
    int at = 0;
    for (; at + N*VW <= dv; at += N*VW) {
        q8_sums<R, N, COLUMNS>(v, nb, n, w, unit, blocks, at, O, ldo, side);
    }
    for (; at < dv; at += VW) {
        q8_sums<R, 1, COLUMNS>(v, nb, n, w, unit, blocks, at, O, ldo, side);
    }
}

} // namespace

#endif
