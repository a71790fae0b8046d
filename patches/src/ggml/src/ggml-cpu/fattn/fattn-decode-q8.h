// The two products of the decode kernel for a q8_0 cache, in integers (see fattn-int.h).
//
// Why: 8 bits a value leave less time per value than floats need: a row of K takes a dot product of bytes, a row of V a
// multiplication of 16 bits, and only sums become floats.
//
//   q8_query(q, dk, to);  q8_dots(k, nb, n, ..., s, along)
//   q8_largest(scales, ..., to, most);  q8_weights(p, ..., to, most, ..., w, unit);  q8_sums_of_row(v, nb, n, w, unit, ..., o, along)

#pragma once

#include "fattn-int.h"
#include "fattn-plan.h"

namespace {

// Rows of K or V whose blocks' scales go to d, [blocks][COLUMNS], zeros behind them. One by one: gathered as vectors they take
// more instructions, and a processor waits where they are read as vectors right after. So those of the next head are
// copied along with the products of this one, which also brings its rows into the first level of the cache.
struct q8_scales {
    const char  * rows;
    size_t        nb, size; // bytes of a row, of a block, which starts with its scale
    int           n;
    ggml_fp16_t * d;

    template <int COLUMNS> void zero_rest(int blocks) const {
        for (int b = 0; b < blocks; ++b) {
            std::fill(d + b*COLUMNS + n, d + (b + 1)*COLUMNS, 0);
        }
    }
    // Those of B blocks of N columns, as far as there are so many.
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
    template <int COLUMNS, int B> static FATTN_INLINE void copy_blocks(const char * from, size_t size, ggml_fp16_t * to) {
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

// Memory that is read next, all heads of some rows: fetched evenly along with what is computed meanwhile, as eight runs side
// by side, which was measured to be faster than row by row. Most likely because the hardware's prefetcher follows each run:
// lines are under way when they are asked for, and hold the shorter a buffer that lines of the second level need, too.
struct fattn_ahead {
    static constexpr int RUNS = 8;
    const char * run[RUNS];
    ptrdiff_t    at = 0, due = 0, end = 0; // bytes of a run

    // Runs [first, first + n): the parts of `bytes` at p.
    void add(int first, int n, const char * p, size_t bytes) {
        if (n == 0) {
            return;
        }
        for (int i = 0; i < n; ++i) {
            run[first + i] = p + i*(bytes/n);
        }
        end = std::max<ptrdiff_t>(end, (bytes + n - 1)/n);
    }
    // So many more, since as many are being read.
    void fetch(size_t bytes) {
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
    void fetch_rest() { fetch(end*RUNS); }
};

// What goes along with the products of a head: the scales of its rows; those of the next head, on their way; and what is
// read in the next step.
struct q8_along {
    const ggml_fp16_t * scales;
    q8_scales           next;
    fattn_ahead       * ahead;
};

} // namespace

#if FATTN_INT

namespace {

// 32 values of a query row in 8 bits, and half of what takes FATTN_INT_OFFSET off their sums again, which have two parts.
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

// s[r][0, VF_W) = q[r] . k[c] for VF_W rows of K that are nb bytes apart
template <int R, int COLUMNS>
inline void q8_dots_of_columns(const char * k, size_t nb, const q8_block * q, int blocks, float * s, const q8_along & along, int c) {
    vf sum[R];
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        sum[r] = vf_zero();
    }
    for (int b = 0; b < blocks; ++b, k += sizeof(block_q8_0)) {
        fattn_opaque(k);
        along.ahead->fetch(VF_W*sizeof(block_q8_0));
        along.next.copy<COLUMNS, VF_W, 1>(c, b);
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
        const vf scale = vf_load_f16(along.scales + b*COLUMNS + c);
        FATTN_UNROLL
        for (int r = 0; r < R; ++r) {
            const vf dot = vf_of(vi_of_columns(acc[r][0], acc[r][1]));
            sum[r] = vf_fma(dot, vf_mul(scale, vf_set1(q[r*blocks + b].scale)), sum[r]);
        }
    }
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        vf_store(s + r*COLUMNS, sum[r]);
    }
}

// s[r][c] = q[r] . k[c] for n >= VF_W rows of K
template <int R, int COLUMNS>
void q8_dots(const char * k, size_t nb, int n, const q8_block * q, int blocks, float * s, const q8_along & along) {
    for (int c = 0; c < n; c += VF_W) {
        const int at = std::min(c, n - VF_W); // the last ones may be computed twice
        q8_dots_of_columns<R, COLUMNS>(k + at*nb, nb, q, blocks, s + at, along, at);
    }
}

// to = d as floats; most[b] = the largest magnitude of a block. Apart from their use, which would wait for the largest.
template <int COLUMNS>
void q8_largest(const ggml_fp16_t * d, int blocks, float * to, float * most) {
    for (int b = 0; b < blocks; ++b) {
        vf top = vf_zero();
        for (int c = b*COLUMNS; c < (b + 1)*COLUMNS; c += VF_W) {
            const vf x = vf_load_f16(d + c);
            vf_store(to + c, x);
            top = vf_max(top, vf_max(x, vf_sub(vf_zero(), x)));
        }
        most[b] = vf_hmax(top);
    }
}

// What a column's block adds to a row's sums, in 16 bits: w[r][b][c] = p[r][c]*d[b][c]/unit[r][b], for c < COLUMNS, p
// being at most 1. The sums are to be multiplied by times[r].
template <int COLUMNS>
void q8_weights(const float * p, const float * times, int n_rows, const float * d, const float * most, int64_t blocks, int16_t * w, float * unit) {
    for (int64_t b = 0; b < blocks; ++b) {
        const vf by = vf_set1(most[b] > LEAST ? 32767.0f/most[b] : 0.0f);
        for (int c = 0; c < COLUMNS; c += VF_W) {
            const vf x = vf_mul(vf_load(d + b*COLUMNS + c), by);
            for (int r = 0; r < n_rows; ++r) {
                vf_store_i16(w + (r*blocks + b)*COLUMNS + c, vf_mul(vf_load(p + r*COLUMNS + c), x));
            }
        }
        for (int r = 0; r < n_rows; ++r) {
            unit[r*blocks + b] = times[r]*most[b]/32767.0f;
        }
    }
}

// o[r][at, at + N*VW) += unit[r]*w[r][c] * v[c], summed over c; v: first block of those values in the first row
template <int R, int N, int COLUMNS>
void q8_sums(const char * v, size_t nb, int n, const int16_t * w, const float * unit, int64_t blocks, int at, float * o, int64_t ldo, const q8_along & along) {
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
        along.ahead->fetch(2*N*VW*sizeof(block_q8_0)/QK8_0);
        if (at % QK8_0 == 0) {
            along.next.copy<COLUMNS, 2, std::max(1, N*VW/QK8_0)>(c, block(0));
        }
        FATTN_UNROLL
        for (int u = 0; u < N; ++u) {
            const vw x = vw_load(((const block_q8_0 *) v0)[block(u)].qs + (at + u*VW) % QK8_0, ((const block_q8_0 *) v1)[block(u)].qs + (at + u*VW) % QK8_0);
            FATTN_UNROLL
            for (int r = 0; r < R; ++r) {
                int32_t both;
                memcpy(&both, w + (r*blocks + block(u))*COLUMNS + c, sizeof(both));
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
            float * to = o + r*ldo + at + u*VW;
            const vf by = vf_set1(unit[r*blocks + block(u)]);
            vf_store(to,        vf_fma(sums[0], by, vf_load(to)));
            vf_store(to + VF_W, vf_fma(sums[1], by, vf_load(to + VF_W)));
        }
    }
}

template <int R, int COLUMNS>
void q8_sums_of_row(const char * v, size_t nb, int n, const int16_t * w, const float * unit, int64_t blocks, float * o, int64_t ldo, const q8_along & along) {
    constexpr int N = std::max(1, std::min(4, FATTN_REGISTERS/4/R));
    const int dv = blocks*QK8_0;
    int at = 0;
    for (; at + N*VW <= dv; at += N*VW) {
        q8_sums<R, N, COLUMNS>(v, nb, n, w, unit, blocks, at, o, ldo, along);
    }
    for (; at < dv; at += VW) {
        q8_sums<R, 1, COLUMNS>(v, nb, n, w, unit, blocks, at, o, ldo, along);
    }
}

} // namespace

#endif
