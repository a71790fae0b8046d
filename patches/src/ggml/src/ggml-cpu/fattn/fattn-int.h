// Integer arithmetic for rows of q8_0, beside the floats of fattn-simd.h: AVX-512, AVX2 or NEON, with their dot product
// instructions where the build has them. Elsewhere FATTN_INT is 0 and q8_0 is read as floats.
//
// Why: decode from a q8_0 cache is bound by arithmetic if each value becomes a float first.
//
//   K: q is rounded to 8 bits, as upstream's kernels do. A lane is a column, or half of its block: four values times
//      four of q. A block of VF_W columns is two groups of four registers; g < 2, j < 4.
//        vb x[4]; vb_transposed(k, nb, g, x); acc[g] = vb_dot(acc[g], x[j], vb_of_query(spread, g, j));
//        vi_of_columns(acc[0], acc[1]);   // the products; spread: vb_spread() of q, VB_SPREAD bytes
//   V: a column's weight, times the scale of its block, is rounded to 16 bits; two columns are added up at a time.
//        vi acc[2] = {vi_zero(), vi_zero()}; vw_add(acc, vw_load(v0, v1), two_weights); vw_finish(acc, sums);

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
inline void vf_store_i16(int16_t * p, vf a) {
    _mm256_storeu_si256((__m256i *) p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a)));
}

// Transposes the rows g*8 + i and g*8 + 4 + i, i < 4, 32 bytes each: x[j] gets bytes [4*j, 4*j + 4) of the first four
// rows, then 16 bytes further on, and the same of the other four.
FATTN_INLINE void vi_transposed(const char * p, size_t nb, int g, vi * x) {
    p += g*8*nb;
    const char * four_on = p + 4*nb;
    fattn_opaque(p);
    fattn_opaque(four_on);
    const auto rows = [=](int i) {
        const __m256i x = _mm256_loadu_si256((const __m256i *) (p + i*nb));
        const __m256i y = _mm256_loadu_si256((const __m256i *) (four_on + i*nb));
        return _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
    };
    const vi a = rows(0), b = rows(1), c = rows(2), d = rows(3);
    const vi ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
    const vi cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
    x[0] = _mm512_unpacklo_epi64(ab0, cd0);
    x[1] = _mm512_unpackhi_epi64(ab0, cd0);
    x[2] = _mm512_unpacklo_epi64(ab1, cd1);
    x[3] = _mm512_unpackhi_epi64(ab1, cd1);
}
inline vi vi_of_columns(vi a, vi b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}
inline vi vb_of_query(const int8_t * spread, int, int j) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) (spread + 32*j)));
}
#if defined(__AVX512VNNI__)
#define FATTN_INT_OFFSET 128 // the instruction takes one operand unsigned: K + 128, and sums start 128*q too low
using vb = __m512i;
FATTN_INLINE void vb_transposed(const char * k, size_t nb, int g, vb * x) {
    vi_transposed(k, nb, g, x);
    FATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm512_xor_si512(x[i], _mm512_set1_epi8(-128));
    }
}
inline vi vb_dot(vi acc, vb k, vi q) { return _mm512_dpbusd_epi32(acc, k, q); }
#else
struct vb { __m512i abs; __mmask64 negative; };
FATTN_INLINE void vb_transposed(const char * k, size_t nb, int g, vb * x) {
    vi t[4];
    vi_transposed(k, nb, g, t);
    FATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
        x[i] = { _mm512_abs_epi8(t[i]), _mm512_movepi8_mask(t[i]) };
    }
}
inline vi vb_dot(vi acc, vb k, vi q) {
    const __m512i y = _mm512_maddubs_epi16(k.abs, _mm512_mask_sub_epi8(q, k.negative, _mm512_setzero_si512(), q));
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
// As with AVX-512, for the rows g*4 + i.
FATTN_INLINE void vi_transposed(const char * p, size_t nb, int g, vi * x) {
    p += g*4*nb;
    fattn_opaque(p);
    const auto row = [=](int i) { return _mm256_loadu_si256((const __m256i *) (p + i*nb)); };
    const vi a = row(0), b = row(1), c = row(2), d = row(3);
    const vi ab0 = _mm256_unpacklo_epi32(a, b), ab1 = _mm256_unpackhi_epi32(a, b);
    const vi cd0 = _mm256_unpacklo_epi32(c, d), cd1 = _mm256_unpackhi_epi32(c, d);
    x[0] = _mm256_unpacklo_epi64(ab0, cd0);
    x[1] = _mm256_unpackhi_epi64(ab0, cd0);
    x[2] = _mm256_unpacklo_epi64(ab1, cd1);
    x[3] = _mm256_unpackhi_epi64(ab1, cd1);
}
inline vi vi_of_columns(vi a, vi b) {
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}
inline vi vb_of_query(const int8_t * spread, int, int j) {
    return _mm256_loadu_si256((const __m256i *) (spread + 32*j));
}
#if defined(__AVXVNNI__)
#define FATTN_INT_OFFSET 128
using vb = __m256i;
FATTN_INLINE void vb_transposed(const char * k, size_t nb, int g, vb * x) {
    vi_transposed(k, nb, g, x);
    FATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm256_xor_si256(x[i], _mm256_set1_epi8(-128));
    }
}
inline vi vb_dot(vi acc, vb k, vi q) { return _mm256_dpbusd_avx_epi32(acc, k, q); }
#else
struct vb { __m256i k, abs; };
FATTN_INLINE void vb_transposed(const char * k, size_t nb, int g, vb * x) {
    vi t[4];
    vi_transposed(k, nb, g, t);
    FATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
        x[i] = { t[i], _mm256_abs_epi8(t[i]) };
    }
}
inline vi vb_dot(vi acc, vb k, vi q) {
    const __m256i y = _mm256_maddubs_epi16(k.abs, _mm256_sign_epi8(q, k.k));
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
// x[j] gets bytes [16*g + 4*j, 16*g + 4*j + 4) of the four rows.
FATTN_INLINE void vb_transposed(const char * k, size_t nb, int g, vb * x) {
    const auto row = [=](int c) { return vreinterpretq_s32_s8(vld1q_s8((const int8_t *) k + 16*g + c*nb)); };
    const int32x4_t a = row(0), b = row(1), c = row(2), d = row(3);
    const int64x2_t ab0 = vreinterpretq_s64_s32(vzip1q_s32(a, b)), ab1 = vreinterpretq_s64_s32(vzip2q_s32(a, b));
    const int64x2_t cd0 = vreinterpretq_s64_s32(vzip1q_s32(c, d)), cd1 = vreinterpretq_s64_s32(vzip2q_s32(c, d));
    x[0] = vreinterpretq_s8_s64(vzip1q_s64(ab0, cd0));
    x[1] = vreinterpretq_s8_s64(vzip2q_s64(ab0, cd0));
    x[2] = vreinterpretq_s8_s64(vzip1q_s64(ab1, cd1));
    x[3] = vreinterpretq_s8_s64(vzip2q_s64(ab1, cd1));
}
inline vi vi_of_columns(vi a, vi b) { return vaddq_s32(a, b); }
constexpr int VB_SPREAD = QK8_0;
inline void vb_spread(const int8_t * q, int8_t * to) { memcpy(to, q, QK8_0); }
inline vb vb_of_query(const int8_t * spread, int g, int j) {
    return vreinterpretq_s8_s32(vdupq_n_s32(four(spread + 16*g + 4*j)));
}
inline vi vb_dot(vi acc, vb k, vb q) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, k, q);
#else
    const int16x8_t lo = vmull_s8(vget_low_s8(k), vget_low_s8(q)), hi = vmull_s8(vget_high_s8(k), vget_high_s8(q));
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

#if !defined(__ARM_NEON)
// A block of q in the order of vb_transposed()'s lanes.
constexpr int VB_SPREAD = 4*QK8_0;
inline void vb_spread(const int8_t * q, int8_t * to) {
    for (int j = 0; j < QK8_0; j += 4, to += 16) {
        const int32_t x = four(q + j%8*4 + j/8*4), lane[4] = {x, x, x, x};
        memcpy(to, lane, sizeof(lane));
    }
}
#endif

constexpr float LEAST = 1e-30f; // smaller values count as zero: their inverse might not be finite

// to = x*by/(largest magnitude of x), which it returns
template <int N> inline float vf_normalized(const float * x, float * to, float by) {
    vf max = vf_zero();
    for (int i = 0; i < N; i += VF_W) {
        const vf a = vf_load(x + i);
        max = vf_max(max, vf_max(a, vf_sub(vf_zero(), a)));
    }
    const float largest = vf_hmax(max);
    const vf    factor  = vf_set1(largest > LEAST ? by/largest : 0.0f);
    for (int i = 0; i < N; i += VF_W) {
        vf_store(to + i, vf_mul(vf_load(x + i), factor));
    }
    return largest;
}

// A block's values rounded to 8 bits; returns their scale, or NaN if x has NaN or infinities.
inline float vf_round_q8(const float * x, int16_t * rounded) {
    float to[QK8_0];
    vf nan = vf_zero(); // 0, or NaN
    for (int i = 0; i < QK8_0; i += VF_W) {
        nan = vf_fma(vf_load(x + i), vf_zero(), nan);
    }
    const float scale = vf_normalized<QK8_0>(x, to, 127.0f)/127.0f;
    for (int i = 0; i < QK8_0; i += VF_W) {
        vf_store_i16(rounded + i, vf_load(to + i));
    }
    return scale + vf_sum(nan);
}

#endif

} // namespace
