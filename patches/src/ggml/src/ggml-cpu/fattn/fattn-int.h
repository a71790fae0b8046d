// Integer arithmetic for rows of q8_0, beside the floats of fattn-simd.h: AVX-512, AVX2 or NEON, with their dot product
// instructions where the build has them. FATTN_INT is 0 where there is nothing of the kind, and q8_0 is read as floats.
//
// Why: decode from a q8_0 cache is bound by arithmetic if each value becomes a float first.
//
//   K: q is rounded to 8 bits, as upstream's kernels do. 4*VF_W products of 8 bits become VF_W sums of 32 bits.
//        vf part = vb_dot(vb_load(block, i, n), q, start);   // of the n <= VB values from i on, four to a lane
//   V: a column's weight, times the scale of its block, is rounded to 16 bits; two columns are added up at a time.
//        vi acc[2] = {vi_zero(), vi_zero()}; vw_add(acc, vw_load(v0, v1), weights_of_both); vw_finish(acc, sums);

#pragma once

#include "fattn-simd.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

namespace {

constexpr int VB = 4*VF_W; // values of a vector of bytes
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

inline vi vb_bytes(const block_q8_0 * b, int n) { // two blocks, or one and zeros
    const __m512i first = _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *) b[0].qs));
    return n > QK8_0 ? _mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i *) b[1].qs), 1) : first;
}
inline vf vb_scales(const block_q8_0 * b, int n) {
    const uint32_t two = b[0].d | (n > QK8_0 ? (uint32_t) b[1].d << 16 : 0);
    const __m512 lanes = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128(two)));
    return _mm512_permutexvar_ps(_mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0), lanes);
}
#if defined(__AVX512VNNI__)
#define FATTN_INT_OFFSET 128 // the instruction wants one side unsigned: K + 128, and sums that start 128*q too low
using vb = __m512i;
inline vb vb_load(const block_q8_0 * b, int, int n) { return _mm512_xor_si512(vb_bytes(b, n), _mm512_set1_epi8(-128)); }
inline vf vb_dot(vb k, const int8_t * q, const int32_t * start) {
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_loadu_si512(start), k, _mm512_loadu_si512(q)));
}
#else
struct vb { __m512i abs; __mmask64 negative; };
inline vb vb_load(const block_q8_0 * b, int, int n) {
    const __m512i k = vb_bytes(b, n);
    return { _mm512_abs_epi8(k), _mm512_movepi8_mask(k) };
}
inline vf vb_dot(vb k, const int8_t * q, const int32_t *) {
    const __m512i x = _mm512_loadu_si512(q);
    const __m512i y = _mm512_maddubs_epi16(k.abs, _mm512_mask_sub_epi8(x, k.negative, _mm512_setzero_si512(), x));
    return _mm512_cvtepi32_ps(_mm512_madd_epi16(y, _mm512_set1_epi16(1)));
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
inline vf vb_scales(const block_q8_0 * b, int) { return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(b->d))); }
#if defined(__AVXVNNI__)
#define FATTN_INT_OFFSET 128
using vb = __m256i;
inline vb vb_load(const block_q8_0 * b, int, int) {
    return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) b->qs), _mm256_set1_epi8(-128));
}
inline vf vb_dot(vb k, const int8_t * q, const int32_t * start) {
    return _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(_mm256_loadu_si256((const __m256i *) start), k, _mm256_loadu_si256((const __m256i *) q)));
}
#else
struct vb { __m256i k, abs; };
inline vb vb_load(const block_q8_0 * b, int, int) {
    const __m256i k = _mm256_loadu_si256((const __m256i *) b->qs);
    return { k, _mm256_abs_epi8(k) };
}
inline vf vb_dot(vb k, const int8_t * q, const int32_t *) {
    const __m256i x = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i *) q), k.k);
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(k.abs, x), _mm256_set1_epi16(1)));
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
inline vf   vb_scales(const block_q8_0 * b, int) { return vdupq_n_f32(fp16_to_float(b->d)); }

using vb = int8x16_t;
inline vb vb_load(const block_q8_0 * b, int i, int) { return vld1q_s8(b->qs + i); }
inline vf vb_dot(vb k, const int8_t * q, const int32_t *) {
    const int8x16_t x = vld1q_s8(q);
#if defined(__ARM_FEATURE_DOTPROD)
    return vcvtq_f32_s32(vdotq_s32(vdupq_n_s32(0), k, x));
#else
    const int16x8_t lo = vmull_s8(vget_low_s8(k), vget_low_s8(x)), hi = vmull_s8(vget_high_s8(k), vget_high_s8(x));
    return vcvtq_f32_s32(vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi)));
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
