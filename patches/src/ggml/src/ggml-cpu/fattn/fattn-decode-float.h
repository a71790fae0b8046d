// The two products of the decode kernel in floats, for rows that fattn-rows.h reads.
//
// Why: a row of K or V becomes floats once, for all the query rows that share it.
//
//   dots<row_f16, 2>(k, nb, n, q, dk, S, lds, ahead);  sums_of_row<row_f16, 2>(v, nb, n, P, ldp, dv, O, ldo, ahead);

#pragma once

#include "fattn-op.h"
#include "fattn-rows.h"

namespace {

// S[r][c] = q[r] . k[c] for n rows of K that are nb bytes apart; the next ones to prefetch are `ahead` bytes on
template <class K, int R>
void dots(const char * k, size_t nb, int n, const float * const * q, int dk, float * S, int64_t lds, ptrdiff_t ahead) {
    int c = 0;
    for (; c + 4 <= n; c += 4) {
        const K k0(k + (c + 0)*nb), k1(k + (c + 1)*nb), k2(k + (c + 2)*nb), k3(k + (c + 3)*nb);
        const char * next = k + c*nb + ahead;
        vf acc[R][4];
        FATTN_UNROLL
        for (int r = 0; r < R; ++r) {
            acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = vf_zero();
        }
        int i = 0;
        for (; i + K::N*VF_W <= dk; i += K::N*VF_W) {
            for (int j = 0; j < 4; ++j) {
                fattn_fetch(next + j*nb, K::bytes(i), K::bytes(K::N*VF_W));
            }
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
            vf_sum4(S + r*lds + c, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
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
            S[r*lds + c] = vf_sum(acc);
        }
    }
}

// O[r][d, d + N*VF_W) += P[r][c] * v[c], summed over c
template <class V, int R, int N>
void sums(const char * v, size_t nb, int n, const float * P, int64_t ldp, int d, float * O, int64_t ldo,
        ptrdiff_t ahead) {
    vf acc[R][N];
    FATTN_UNROLL
    for (int r = 0; r < R; ++r) {
        FATTN_UNROLL
        for (int j = 0; j < N; ++j) {
            acc[r][j] = vf_load(O + r*ldo + d + j*VF_W);
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
            const vf x = vf_set1(P[r*ldp + c]);
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
            vf_store(O + r*ldo + d + j*VF_W, acc[r][j]);
        }
    }
}

template <class V, int R>
void sums_of_row(const char * v, size_t nb, int n, const float * P, int64_t ldp, int dv, float * O, int64_t ldo,
        ptrdiff_t ahead) {
    constexpr int N = std::min(8, FATTN_REGISTERS/2/R);
    int d = 0;
    for (; d + N*VF_W <= dv; d += N*VF_W) {
        sums<V, R, N>(v, nb, n, P, ldp, d, O, ldo, ahead);
    }
    for (; d + VF_W <= dv; d += VF_W) {
        sums<V, R, 1>(v, nb, n, P, ldp, d, O, ldo, ahead);
    }
    if (d < dv) {
        for (int r = 0; r < R; ++r) {
            vf acc = row_f32(O + r*ldo).part(d, dv - d);
            for (int c = 0; c < n; ++c) {
                acc = vf_fma(V(v + c*nb).part(d, dv - d), vf_set1(P[r*ldp + c]), acc);
            }
            vf_store_part(O + r*ldo + d, acc, dv - d);
        }
    }
}

} // namespace
