// Integer arithmetic for rows of q8_0, beside the floats of fattn-simd.h: AVX-512, AVX2 or NEON, with their dot product
// instructions where the build has them. FATTN_INT is 0 where there is nothing of the kind, and q8_0 is read as floats.
//
// Why: decode from a q8_0 cache is bound by arithmetic if each value becomes a float first.
//
//   K: q is rounded to 8 bits, as upstream's kernels do. A lane is a column: of each four values against four of q.
//        vb x[4]; vb_transposed(k, nb, x); acc = vb_dot(acc, x[i], q + 4*i);   // 16 values of VF_W columns
//   V: a column's weight, times the scale of its block, is rounded to 16 bits; two columns are added up at a time.
//        vi acc[2] = {vi_zero(), vi_zero()}; vw_add(acc, vw_load(v0, v1), weights_of_both); vw_finish(acc, sums);

#pragma once

#include "fattn-simd.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

namespace {

constexpr int VW = 2*VF_W; // values of two columns that are added up at a time

#if defined(__AVX512BW__)

#define FATTN_INT 1
using vi = __m512i;

inline vi   vi_zero() { return _mm512_setzero_si512(); }
inline vi   vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
inline vi   vi_load(const int32_t * p) { return _mm512_loadu_si512(p); }
inline void vi_store(int32_t * p, vi a) { _mm512_storeu_si512(p, a); }
inline vf   vf_of(vi a) { return _mm512_cvtepi32_ps(a); }
inline void vf_store_i16(int16_t * p, vf a) { _mm256_storeu_si256((__m256i *) p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a))); }

// 16 bytes of VF_W rows that are nb bytes apart; lane c of x[i] is bytes [4*i, 4*i + 4) of row c
FATTN_INLINE vi vi_rows(const char * p, size_t nb) {
    const auto row = [=](int c) { return _mm_loadu_si128((const __m128i *) (p + c*nb)); };
    const __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(4), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(x, row(8), 2), row(12), 3);
}
FATTN_INLINE void vi_transposed(const char * p, size_t nb, vi * x) {
    const vi a = vi_rows(p, nb), b = vi_rows(p + nb, nb), c = vi_rows(p + 2*nb, nb), d = vi_rows(p + 3*nb, nb);
    const vi ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
    const vi cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
    x[0] = _mm512_unpacklo_epi64(ab0, cd0);
    x[1] = _mm512_unpackhi_epi64(ab0, cd0);
    x[2] = _mm512_unpacklo_epi64(ab1, cd1);
    x[3] = _mm512_unpackhi_epi64(ab1, cd1);
}
// the f16 that each of VF_W rows starts with; 16 bytes of it are read
FATTN_INLINE vf vf_f16_of_rows(const char * p, size_t nb) {
    const vi ab = _mm512_unpacklo_epi32(vi_rows(p, nb), vi_rows(p + nb, nb)), cd = _mm512_unpacklo_epi32(vi_rows(p + 2*nb, nb), vi_rows(p + 3*nb, nb));
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_unpacklo_epi64(ab, cd)));
}
#if defined(__AVX512VNNI__)
#define FATTN_INT_OFFSET 128 // the instruction wants one side unsigned: K + 128, and sums that start 128*q too low
using vb = __m512i;
FATTN_INLINE void vb_transposed(const char * k, size_t nb, vb * x) {
    vi_transposed(k, nb, x);
    FATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm512_xor_si512(x[i], _mm512_set1_epi8(-128));
    }
}
inline vi vb_dot(vi acc, vb k, const int8_t * q) { return _mm512_dpbusd_epi32(acc, k, vi_set1(four(q))); }
#else
struct vb { __m512i abs; __mmask64 negative; };
FATTN_INLINE void vb_transposed(const char * k, size_t nb, vb * x) {
    vi t[4];
    vi_transposed(k, nb, t);
    FATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
        x[i] = { _mm512_abs_epi8(t[i]), _mm512_movepi8_mask(t[i]) };
    }
}
inline vi vb_dot(vi acc, vb k, const int8_t * q) {
    const __m512i x = vi_set1(four(q));
    const __m512i y = _mm512_maddubs_epi16(k.abs, _mm512_mask_sub_epi8(x, k.negative, _mm512_setzero_si512(), x));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(y, _mm512_set1_epi16(1)));
}
#endif

#if defined(__AVX512VNNI__)
#define FATTN_DOT8  1
#define FATTN_DOT16 1
inline vi vi_dot8 (vi acc, vi k, vi q) { return _mm512_dpbusd_epi32(acc, k, q); }
inline vi vi_dot16(vi acc, vi a, vi b) { return _mm512_dpwssd_epi32(acc, a, b); }
#else
inline vi vi_dot16(vi acc, vi a, vi b) { return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
#endif
inline vi vi_pair(vf lo, vf hi) {
    return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_cvtps_epi32(lo), _mm512_slli_epi32(_mm512_cvtps_epi32(hi), 16));
}

struct vw { __m512i lo, hi; };
inline vw vw_load(const int8_t * a, const int8_t * b) {
    const __m512i x = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *) a));
    const __m512i y = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *) b));
    return { _mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y) };
}
inline void vw_add(vi * acc, vw x, int32_t weights) {
    const __m512i w = _mm512_set1_epi32(weights);
    acc[0] = vi_dot16(acc[0], x.lo, w);
    acc[1] = vi_dot16(acc[1], x.hi, w);
}
inline void vw_finish(const vi * acc, vf * sums) { // unpacking works within 128 bits: put the values in order
    const __m512i lo = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), hi = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    sums[0] = _mm512_cvtepi32_ps(_mm512_permutex2var_epi64(acc[0], lo, acc[1]));
    sums[1] = _mm512_cvtepi32_ps(_mm512_permutex2var_epi64(acc[0], hi, acc[1]));
}

#elif !defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define FATTN_INT 1
using vi = __m256i;

inline vi   vi_zero() { return _mm256_setzero_si256(); }
inline vi   vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
inline vi   vi_load(const int32_t * p) { return _mm256_loadu_si256((const __m256i *) p); }
inline void vi_store(int32_t * p, vi a) { _mm256_storeu_si256((__m256i *) p, a); }
inline vf   vf_of(vi a) { return _mm256_cvtepi32_ps(a); }
inline void vf_store_i16(int16_t * p, vf a) {
    const __m256i x = _mm256_cvtps_epi32(a);
    _mm_storeu_si128((__m128i *) p, _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
FATTN_INLINE vi vi_rows(const char * p, size_t nb) {
    const auto row = [=](int c) { return _mm_loadu_si128((const __m128i *) (p + c*nb)); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(4), 1);
}
FATTN_INLINE void vi_transposed(const char * p, size_t nb, vi * x) {
    const vi a = vi_rows(p, nb), b = vi_rows(p + nb, nb), c = vi_rows(p + 2*nb, nb), d = vi_rows(p + 3*nb, nb);
    const vi ab0 = _mm256_unpacklo_epi32(a, b), ab1 = _mm256_unpackhi_epi32(a, b);
    const vi cd0 = _mm256_unpacklo_epi32(c, d), cd1 = _mm256_unpackhi_epi32(c, d);
    x[0] = _mm256_unpacklo_epi64(ab0, cd0);
    x[1] = _mm256_unpackhi_epi64(ab0, cd0);
    x[2] = _mm256_unpacklo_epi64(ab1, cd1);
    x[3] = _mm256_unpackhi_epi64(ab1, cd1);
}
FATTN_INLINE vf vf_f16_of_rows(const char * p, size_t nb) {
    const vi ab = _mm256_unpacklo_epi32(vi_rows(p, nb), vi_rows(p + nb, nb)), cd = _mm256_unpacklo_epi32(vi_rows(p + 2*nb, nb), vi_rows(p + 3*nb, nb));
    const vi x  = _mm256_and_si256(_mm256_unpacklo_epi64(ab, cd), _mm256_set1_epi32(0xFFFF));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
#if defined(__AVXVNNI__)
#define FATTN_INT_OFFSET 128
using vb = __m256i;
FATTN_INLINE void vb_transposed(const char * k, size_t nb, vb * x) {
    vi_transposed(k, nb, x);
    FATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm256_xor_si256(x[i], _mm256_set1_epi8(-128));
    }
}
inline vi vb_dot(vi acc, vb k, const int8_t * q) { return _mm256_dpbusd_avx_epi32(acc, k, vi_set1(four(q))); }
#else
struct vb { __m256i k, abs; };
FATTN_INLINE void vb_transposed(const char * k, size_t nb, vb * x) {
    vi t[4];
    vi_transposed(k, nb, t);
    FATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
        x[i] = { t[i], _mm256_abs_epi8(t[i]) };
    }
}
inline vi vb_dot(vi acc, vb k, const int8_t * q) {
    const __m256i y = _mm256_maddubs_epi16(k.abs, _mm256_sign_epi8(vi_set1(four(q)), k.k));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(y, _mm256_set1_epi16(1)));
}
#endif

#if defined(__AVXVNNI__)
#define FATTN_DOT8  1
#define FATTN_DOT16 1
inline vi vi_dot8 (vi acc, vi k, vi q) { return _mm256_dpbusd_avx_epi32(acc, k, q); }
inline vi vi_dot16(vi acc, vi a, vi b) { return _mm256_dpwssd_avx_epi32(acc, a, b); }
#else
inline vi vi_dot16(vi acc, vi a, vi b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
#endif
inline vi vi_pair(vf lo, vf hi) {
    return _mm256_blend_epi16(_mm256_cvtps_epi32(lo), _mm256_slli_epi32(_mm256_cvtps_epi32(hi), 16), 0xAA);
}

struct vw { __m256i lo, hi; };
inline vw vw_load(const int8_t * a, const int8_t * b) {
    const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) a));
    const __m256i y = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) b));
    return { _mm256_unpacklo_epi16(x, y), _mm256_unpackhi_epi16(x, y) };
}
inline void vw_add(vi * acc, vw x, int32_t weights) {
    const __m256i w = _mm256_set1_epi32(weights);
    acc[0] = vi_dot16(acc[0], x.lo, w);
    acc[1] = vi_dot16(acc[1], x.hi, w);
}
inline void vw_finish(const vi * acc, vf * sums) {
    sums[0] = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(acc[0], acc[1], 0x20));
    sums[1] = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(acc[0], acc[1], 0x31));
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

#define FATTN_INT 1
using vi = int32x4_t;

inline vi   vi_zero() { return vdupq_n_s32(0); }
inline vi   vi_set1(int32_t x) { return vdupq_n_s32(x); }
inline vi   vi_load(const int32_t * p) { return vld1q_s32(p); }
inline vf   vf_of(vi a) { return vcvtq_f32_s32(a); }
#if defined(__ARM_FEATURE_DOTPROD)
#define FATTN_DOT8 1
inline vi vi_dot8(vi acc, vi k, vi q) { return vdotq_s32(acc, vreinterpretq_s8_s32(k), vreinterpretq_s8_s32(q)); }
#endif
inline void vf_store_i16(int16_t * p, vf a) { vst1_s16(p, vmovn_s32(vcvtnq_s32_f32(a))); }

using vb = int8x16_t;
FATTN_INLINE void vb_transposed(const char * k, size_t nb, vb * x) {
    const auto row = [=](int c) { return vreinterpretq_s32_s8(vld1q_s8((const int8_t *) k + c*nb)); };
    const int32x4_t a = row(0), b = row(1), c = row(2), d = row(3);
    const int64x2_t ab0 = vreinterpretq_s64_s32(vzip1q_s32(a, b)), ab1 = vreinterpretq_s64_s32(vzip2q_s32(a, b));
    const int64x2_t cd0 = vreinterpretq_s64_s32(vzip1q_s32(c, d)), cd1 = vreinterpretq_s64_s32(vzip2q_s32(c, d));
    x[0] = vreinterpretq_s8_s64(vzip1q_s64(ab0, cd0));
    x[1] = vreinterpretq_s8_s64(vzip2q_s64(ab0, cd0));
    x[2] = vreinterpretq_s8_s64(vzip1q_s64(ab1, cd1));
    x[3] = vreinterpretq_s8_s64(vzip2q_s64(ab1, cd1));
}
FATTN_INLINE vf vf_f16_of_rows(const char * p, size_t nb) {
    uint16x4_t x = vld1_dup_u16((const uint16_t *) p);
    x = vld1_lane_u16((const uint16_t *) (p + nb),   x, 1);
    x = vld1_lane_u16((const uint16_t *) (p + 2*nb), x, 2);
    x = vld1_lane_u16((const uint16_t *) (p + 3*nb), x, 3);
    return vcvt_f32_f16(vreinterpret_f16_u16(x));
}
inline vi vb_dot(vi acc, vb k, const int8_t * q) {
    const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four(q)));
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, k, x);
#else
    const int16x8_t lo = vmull_s8(vget_low_s8(k), vget_low_s8(x)), hi = vmull_s8(vget_high_s8(k), vget_high_s8(x));
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi)));
#endif
}

struct vw { int16x8_t a, b; };
inline vw vw_load(const int8_t * a, const int8_t * b) { return { vmovl_s8(vld1_s8(a)), vmovl_s8(vld1_s8(b)) }; }
inline void vw_add(vi * acc, vw x, int32_t weights) {
    const int16x4_t w = vreinterpret_s16_s32(vdup_n_s32(weights));
    acc[0] = vmlal_lane_s16(vmlal_lane_s16(acc[0], vget_low_s16 (x.a), w, 0), vget_low_s16 (x.b), w, 1);
    acc[1] = vmlal_lane_s16(vmlal_lane_s16(acc[1], vget_high_s16(x.a), w, 0), vget_high_s16(x.b), w, 1);
}
inline void vw_finish(const vi * acc, vf * sums) {
    sums[0] = vcvtq_f32_s32(acc[0]);
    sums[1] = vcvtq_f32_s32(acc[1]);
}

#else

#define FATTN_INT 0

#endif

#ifndef FATTN_INT_OFFSET
#define FATTN_INT_OFFSET 0
#endif
#ifndef FATTN_DOT8
#define FATTN_DOT8 0
#endif
#ifndef FATTN_DOT16
#define FATTN_DOT16 0
#endif

#if FATTN_INT

constexpr float LEAST = 1e-30f; // what is smaller counts as zero: its inverse might not be finite

// to = x*by/the largest magnitude of them, which it returns
template <int N> inline float vf_normalized(const float * x, float * to, float by) {
    vf top = vf_zero();
    for (int i = 0; i < N; i += VF_W) {
        const vf a = vf_load(x + i);
        top = vf_max(top, vf_max(a, vf_sub(vf_zero(), a)));
    }
    const float most  = vf_hmax(top);
    const vf    times = vf_set1(most > LEAST ? by/most : 0.0f);
    for (int i = 0; i < N; i += VF_W) {
        vf_store(to + i, vf_mul(vf_load(x + i), times));
    }
    return most;
}

// A block's values rounded to 8 bits; returns their scale, not a number if x has such or infinities.
inline float vf_round_q8(const float * x, int16_t * rounded) {
    float to[QK8_0];
    vf odd = vf_zero();
    for (int i = 0; i < QK8_0; i += VF_W) {
        odd = vf_fma(vf_load(x + i), vf_zero(), odd);
    }
    const float scale = vf_normalized<QK8_0>(x, to, 127.0f)/127.0f;
    for (int i = 0; i < QK8_0; i += VF_W) {
        vf_store_i16(rounded + i, vf_load(to + i));
    }
    return scale + vf_sum(odd);
}

#endif

} // namespace
