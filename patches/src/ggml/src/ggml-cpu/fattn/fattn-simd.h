// The vector of the CPU attention kernels: AVX-512, AVX2 with FMA and F16C, NEON, or plain C++.
//
// Why: the kernels are written once, for a vector of VF_W floats and the dozen operations that attention needs. Each
// build of ggml's CPU library gets what its own compiler flags allow, as everywhere in ggml.
//
//   vf acc = vf_zero(); acc = vf_fma(vf_load_f16(k), vf_load(q), acc); float s = vf_sum(acc);
//
// Everything here has internal linkage: the library holds one copy per instruction set.

#pragma once

#include "ggml-impl.h"
#include "simd-mappings.h"

#include <cmath>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// For a loop of constant length over an array of sums: once it is unrolled, the array lives in registers.
#if defined(__clang__)
#define FATTN_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define FATTN_UNROLL _Pragma("GCC unroll 16")
#else
#define FATTN_UNROLL
#endif

#if defined(__GNUC__)
#define FATTN_INLINE inline __attribute__((always_inline))
#else
#define FATTN_INLINE inline
#endif

// Hides the value of a pointer from the compiler, which would otherwise keep one pointer for each row read from it.
#if defined(__GNUC__)
#define fattn_opaque(p) __asm__("" : "+r"(p))
#else
#define fattn_opaque(p) (void) (p)
#endif

namespace {

inline int32_t four(const int8_t * p) { // bytes, for a lane
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return x;
}

#if defined(__AVX512F__)

#define FATTN_SIMD_NAME "avx512"
#define FATTN_REGISTERS 32
constexpr int VF_W = 16;
using vf = __m512;

inline vf vf_zero()                       { return _mm512_setzero_ps(); }
inline vf vf_set1(float x)                { return _mm512_set1_ps(x); }
inline vf vf_load(const float * p)        { return _mm512_loadu_ps(p); }
inline void vf_store(float * p, vf a)     { _mm512_storeu_ps(p, a); }
inline vf vf_add(vf a, vf b)              { return _mm512_add_ps(a, b); }
inline vf vf_sub(vf a, vf b)              { return _mm512_sub_ps(a, b); }
inline vf vf_mul(vf a, vf b)              { return _mm512_mul_ps(a, b); }
inline vf vf_div(vf a, vf b)              { return _mm512_div_ps(a, b); }
inline vf vf_fma(vf a, vf b, vf c)        { return _mm512_fmadd_ps(a, b, c); }
inline vf vf_max(vf a, vf b)              { return _mm512_max_ps(a, b); }
inline vf vf_min(vf a, vf b)              { return _mm512_min_ps(a, b); }
inline vf vf_load_f16(const ggml_fp16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
inline vf vf_load_bf16(const ggml_bf16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}
inline vf vf_load_i8(const int8_t * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
}
inline float vf_sum(vf a)                 { return _mm512_reduce_add_ps(a); }
inline float vf_hmax(vf a)                { return _mm512_reduce_max_ps(a); }
inline __m256 vf_halves(vf a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
}
inline void vf_sum4(float * p, vf a, vf b, vf c, vf d) {
    const __m256 ab = _mm256_hadd_ps(vf_halves(a), vf_halves(b)), cd = _mm256_hadd_ps(vf_halves(c), vf_halves(d));
    const __m256 t  = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}
inline vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf vf_ldexp(vf a, vf n)            { return _mm512_scalef_ps(a, n); }
inline vf vf_if_less(vf x, float limit, vf a, vf b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_LT_OQ), b, a);
}
constexpr float VF_EXP_MIN = -105.0f; // below it the result rounds to zero

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define FATTN_SIMD_NAME "avx2"
#define FATTN_REGISTERS 16
constexpr int VF_W = 8;
using vf = __m256;

inline vf vf_zero()                       { return _mm256_setzero_ps(); }
inline vf vf_set1(float x)                { return _mm256_set1_ps(x); }
inline vf vf_load(const float * p)        { return _mm256_loadu_ps(p); }
inline void vf_store(float * p, vf a)     { _mm256_storeu_ps(p, a); }
inline vf vf_add(vf a, vf b)              { return _mm256_add_ps(a, b); }
inline vf vf_sub(vf a, vf b)              { return _mm256_sub_ps(a, b); }
inline vf vf_mul(vf a, vf b)              { return _mm256_mul_ps(a, b); }
inline vf vf_div(vf a, vf b)              { return _mm256_div_ps(a, b); }
inline vf vf_fma(vf a, vf b, vf c)        { return _mm256_fmadd_ps(a, b, c); }
inline vf vf_max(vf a, vf b)              { return _mm256_max_ps(a, b); }
inline vf vf_min(vf a, vf b)              { return _mm256_min_ps(a, b); }
inline vf vf_load_f16(const ggml_fp16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
inline vf vf_load_bf16(const ggml_bf16_t * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}
inline vf vf_load_i8(const int8_t * p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p)));
}
inline void vf_sum4(float * p, vf a, vf b, vf c, vf d) {
    const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}
inline float vf_sum(vf a) {
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float vf_hmax(vf a) {
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
inline vf vf_round(vf a)                  { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf vf_ldexp(vf a, vf n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
inline vf vf_if_less(vf x, float limit, vf a, vf b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_LT_OQ));
}
inline vf vf_zero_below(vf a, vf x, float limit) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_LT_OQ), a);
}
constexpr float VF_EXP_MIN = -87.0f; // below it: zero, instead of denormals

#elif defined(__ARM_NEON) && defined(__aarch64__)

#define FATTN_SIMD_NAME "neon"
#define FATTN_REGISTERS 32
constexpr int VF_W = 4;
using vf = float32x4_t;

inline vf vf_zero()                       { return vdupq_n_f32(0.0f); }
inline vf vf_set1(float x)                { return vdupq_n_f32(x); }
inline vf vf_load(const float * p)        { return vld1q_f32(p); }
inline void vf_store(float * p, vf a)     { vst1q_f32(p, a); }
inline vf vf_add(vf a, vf b)              { return vaddq_f32(a, b); }
inline vf vf_sub(vf a, vf b)              { return vsubq_f32(a, b); }
inline vf vf_mul(vf a, vf b)              { return vmulq_f32(a, b); }
inline vf vf_div(vf a, vf b)              { return vdivq_f32(a, b); }
inline vf vf_fma(vf a, vf b, vf c)        { return vfmaq_f32(c, a, b); }
inline vf vf_max(vf a, vf b)              { return vmaxq_f32(a, b); }
inline vf vf_min(vf a, vf b)              { return vminq_f32(a, b); }
inline vf vf_load_f16(const ggml_fp16_t * p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) p)));
}
inline vf vf_load_bf16(const ggml_bf16_t * p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *) p), 16));
}
inline vf vf_load_i8(const int8_t * p) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four(p)))))));
}
inline void vf_sum4(float * p, vf a, vf b, vf c, vf d) { vst1q_f32(p, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }
inline float vf_sum(vf a)                 { return vaddvq_f32(a); }
inline float vf_hmax(vf a)                { return vmaxvq_f32(a); }
inline vf vf_round(vf a)                  { return vrndnq_f32(a); }
inline vf vf_ldexp(vf a, vf n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(vcvtnq_s32_f32(n), 23)));
}
inline vf vf_if_less(vf x, float limit, vf a, vf b) { return vbslq_f32(vcltq_f32(x, vdupq_n_f32(limit)), a, b); }
inline vf vf_zero_below(vf a, vf x, float limit) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a), vcltq_f32(x, vdupq_n_f32(limit))));
}
constexpr float VF_EXP_MIN = -87.0f;

#else

// Four floats: the compiler's vector type with GCC and Clang, otherwise loops.
#define FATTN_SIMD_NAME "portable"
#define FATTN_REGISTERS 16
constexpr int VF_W = 4;
#if defined(__GNUC__)
typedef float vf __attribute__((vector_size(16)));
#define FATTN_LANE(a, i) (a)[i]
#define FATTN_BINARY(name, op) inline vf name(vf a, vf b) { return a op b; }
#else
struct vf { float v[VF_W]; };
#define FATTN_LANE(a, i) (a).v[i]
#define FATTN_BINARY(name, op) \
    inline vf name(vf a, vf b) { vf r; for (int i = 0; i < VF_W; ++i) { r.v[i] = a.v[i] op b.v[i]; } return r; }
#endif
FATTN_BINARY(vf_add, +)
FATTN_BINARY(vf_sub, -)
FATTN_BINARY(vf_mul, *)
FATTN_BINARY(vf_div, /)

#define FATTN_EACH(expr) vf r; for (int i = 0; i < VF_W; ++i) { FATTN_LANE(r, i) = (expr); } return r
inline vf vf_set1(float x)                { FATTN_EACH(x); }
inline vf vf_zero()                       { return vf_set1(0.0f); }
inline vf vf_load(const float * p)        { vf r; memcpy(&r, p, sizeof(r)); return r; }
inline void vf_store(float * p, vf a)     { memcpy(p, &a, sizeof(a)); }
inline vf vf_fma(vf a, vf b, vf c)        { return vf_add(vf_mul(a, b), c); }
#if defined(__GNUC__)
inline vf vf_max(vf a, vf b)              { return a > b ? a : b; }
inline vf vf_min(vf a, vf b)              { return a < b ? a : b; }
#else
inline vf vf_max(vf a, vf b)              { FATTN_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline vf vf_min(vf a, vf b)              { FATTN_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
#endif
inline vf vf_load_f16(const ggml_fp16_t * p) { FATTN_EACH(GGML_CPU_FP16_TO_FP32(p[i])); } // a table
inline vf vf_load_bf16(const ggml_bf16_t * p) { FATTN_EACH(GGML_BF16_TO_FP32(p[i])); }
inline vf vf_load_i8(const int8_t * p)    { FATTN_EACH((float) p[i]); }
inline float vf_sum(vf a) {
    return (FATTN_LANE(a, 0) + FATTN_LANE(a, 2)) + (FATTN_LANE(a, 1) + FATTN_LANE(a, 3));
}
inline float vf_hmax(vf a) {
    return std::fmax(std::fmax(FATTN_LANE(a, 0), FATTN_LANE(a, 2)), std::fmax(FATTN_LANE(a, 1), FATTN_LANE(a, 3)));
}
inline void vf_sum4(float * p, vf a, vf b, vf c, vf d) {
    p[0] = vf_sum(a);
    p[1] = vf_sum(b);
    p[2] = vf_sum(c);
    p[3] = vf_sum(d);
}
// Adding and subtracting 1.5*2^23 rounds to the nearest integer.
constexpr float VF_ROUNDER = 12582912.0f;
inline vf vf_round(vf a) {
    return vf_sub(vf_add(a, vf_set1(VF_ROUNDER)), vf_set1(VF_ROUNDER));
}
inline vf vf_ldexp(vf a, vf n) {
    uint32_t bits[VF_W];
    memcpy(bits, &a, sizeof(bits));
    for (int i = 0; i < VF_W; ++i) {
        bits[i] += (uint32_t) (int32_t) FATTN_LANE(n, i) << 23;
    }
    memcpy(&a, bits, sizeof(bits));
    return a;
}
inline vf vf_if_less(vf x, float limit, vf a, vf b) {
    FATTN_EACH(FATTN_LANE(x, i) < limit ? FATTN_LANE(a, i) : FATTN_LANE(b, i));
}
inline vf vf_zero_below(vf a, vf x, float limit) { FATTN_EACH(FATTN_LANE(x, i) < limit ? 0.0f : FATTN_LANE(a, i)); }
constexpr float VF_EXP_MIN = -87.0f;
#undef FATTN_EACH
#undef FATTN_LANE
#undef FATTN_BINARY

#endif

inline float fp16_to_float(ggml_fp16_t x) {
#ifdef GGML_CPU_COMPUTE_FP16_TO_FP32
    return GGML_CPU_COMPUTE_FP16_TO_FP32(x); // an instruction, where the other is a table in memory
#else
    return GGML_CPU_FP16_TO_FP32(x);
#endif
}

// e^x for x <= 88, exactly 0 for -INFINITY and 1 for 0; relative error below 2e-7. NaN stays NaN, which is why x is the
// second argument of the maximum. 2^n times a polynomial of degree 5 on [-ln2/2, ln2/2], fitted for the least maximal
// relative error.
inline vf vf_exp(vf x) {
    const vf xc = vf_max(vf_set1(VF_EXP_MIN), x);
    const vf n  = vf_round(vf_mul(xc, vf_set1(1.44269504f)));
    const vf r  = vf_fma(n, vf_set1(-1.42860682e-6f), vf_fma(n, vf_set1(-0.693145752f), xc)); // ln2 in two parts
    vf p = vf_set1(0.00829029735f);
    p = vf_fma(p, r, vf_set1(0.0418980233f));
    p = vf_fma(p, r, vf_set1(0.166676372f));
    p = vf_fma(p, r, vf_set1(0.499991477f));
    p = vf_fma(p, r, vf_set1(0.999999702f));
    p = vf_fma(p, r, vf_set1(1.0f));
#if defined(__AVX512F__)
    return vf_ldexp(p, n);
#else
    return vf_zero_below(vf_ldexp(p, n), x, VF_EXP_MIN);
#endif
}

// tanh for the soft cap, which multiplies its error: relative error below 3e-7. Where 1 - 2/(e^2x + 1) would lose
// digits, x plus x^3 times a polynomial of degree 4 in x^2, fitted for the least maximal relative error on [0, 0.625].
inline vf vf_tanh(vf x) {
    const vf e   = vf_exp(vf_min(vf_set1(40.0f), vf_max(vf_set1(-40.0f), vf_add(x, x))));
    const vf far = vf_sub(vf_set1(1.0f), vf_div(vf_set1(2.0f), vf_add(e, vf_set1(1.0f))));
    const vf xx  = vf_mul(x, x);
    vf p = vf_set1(-0.0057050325f);
    p = vf_fma(p, xx, vf_set1(0.0206391253f));
    p = vf_fma(p, xx, vf_set1(-0.0537397265f));
    p = vf_fma(p, xx, vf_set1(0.133314416f));
    p = vf_fma(p, xx, vf_set1(-0.333332807f));
    return vf_if_less(xx, 0.625f*0.625f, vf_fma(vf_mul(p, xx), x, x), far);
}

inline void vf_store_part(float * p, vf a, int n) {
    float t[VF_W];
    vf_store(t, a);
    memcpy(p, t, n*sizeof(float));
}

} // namespace
