// Blocks of the quantized cache types, unpacked into 32 small integers; a value is d*integer + m.
//
// Why: where m is 0 they become blocks of q8_0, which the kernels read as they are; ggml's own conversions to floats
// are compiled for the oldest CPU.
//
//   fattn_as_q8_0(GGML_TYPE_Q4_0, row, ne, blocks)   // q4_0, q5_0, iq4_nl: fattn_like_q8_0(type)
//   block_ints(block, ints, d, m)                    // one block, of any

#pragma once

#include "fattn-op.h"
#include "fattn-simd.h"

#define GGML_COMMON_DECL_CPP
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"

namespace {

constexpr int QK = 32; // values of a block, in all these types
static_assert(QK == QK8_0 && QK == QK4_0 && QK == QK4_1 && QK == QK5_0 && QK == QK5_1 && QK == QK4_NL,
    "blocks must be of one size");

// The 32 integers of a block, one per byte. Written as vectors, since compilers don't vectorize plain loops over them.
#if defined(__SSSE3__)

struct ints { __m128i half[2]; };

inline void store(const ints & x, int8_t * to) {
    _mm_storeu_si128((__m128i *) to,        x.half[0]);
    _mm_storeu_si128((__m128i *) (to + 16), x.half[1]);
}
template <class Block> inline ints nibbles(const Block & b) {
    const __m128i both = _mm_loadu_si128((const __m128i *) b.qs), low = _mm_set1_epi8(15);
    return {{ _mm_and_si128(both, low), _mm_and_si128(_mm_srli_epi16(both, 4), low) }};
}
template <class Block> inline void fifth_bits(const Block & b, ints & x) {
    int32_t bits;
    memcpy(&bits, b.qh, sizeof(bits));
    const __m128i bit_of_each  = _mm_set1_epi64x(0x8040201008040201);
    const __m128i byte_of_each = _mm_set_epi64x(0x0101010101010101, 0);
    for (int i = 0; i < 2; ++i) {
        const __m128i of_each = _mm_shuffle_epi8(_mm_set1_epi32(bits >> 16*i), byte_of_each);
        const __m128i is_set  = _mm_cmpeq_epi8(_mm_and_si128(of_each, bit_of_each), bit_of_each);
        x.half[i] = _mm_or_si128(x.half[i], _mm_and_si128(is_set, _mm_set1_epi8(16)));
    }
}
inline void subtract(ints & x, int by) {
    x.half[0] = _mm_sub_epi8(x.half[0], _mm_set1_epi8(by));
    x.half[1] = _mm_sub_epi8(x.half[1], _mm_set1_epi8(by));
}
inline ints looked_up(const block_iq4_nl & b) {
    const __m128i table = _mm_loadu_si128((const __m128i *) kvalues_iq4nl);
    const ints at = nibbles(b);
    return {{ _mm_shuffle_epi8(table, at.half[0]), _mm_shuffle_epi8(table, at.half[1]) }};
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

struct ints { uint8x16_t half[2]; };

inline void store(const ints & x, int8_t * to) {
    vst1q_u8((uint8_t *) to,      x.half[0]);
    vst1q_u8((uint8_t *) to + 16, x.half[1]);
}
template <class Block> inline ints nibbles(const Block & b) {
    const uint8x16_t both = vld1q_u8(b.qs);
    return {{ vandq_u8(both, vdupq_n_u8(15)), vshrq_n_u8(both, 4) }};
}
template <class Block> inline void fifth_bits(const Block & b, ints & x) {
    const uint8x16_t bit_of_each = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    for (int i = 0; i < 2; ++i) {
        const uint8x16_t of_each = vcombine_u8(vdup_n_u8(b.qh[2*i]), vdup_n_u8(b.qh[2*i + 1]));
        x.half[i] = vorrq_u8(x.half[i], vandq_u8(vtstq_u8(of_each, bit_of_each), vdupq_n_u8(16)));
    }
}
inline void subtract(ints & x, int by) {
    x.half[0] = vsubq_u8(x.half[0], vdupq_n_u8(by));
    x.half[1] = vsubq_u8(x.half[1], vdupq_n_u8(by));
}
inline ints looked_up(const block_iq4_nl & b) {
    const uint8x16_t table = vld1q_u8((const uint8_t *) kvalues_iq4nl);
    const ints at = nibbles(b);
    return {{ vqtbl1q_u8(table, at.half[0]), vqtbl1q_u8(table, at.half[1]) }};
}

#else

struct ints { int8_t x[QK]; };

inline void store(const ints & x, int8_t * to) { memcpy(to, x.x, QK); }
template <class Block> inline ints nibbles(const Block & b) {
    ints x;
    for (int i = 0; i < QK/2; ++i) {
        x.x[i]        = (int8_t) (b.qs[i] & 15);
        x.x[i + QK/2] = (int8_t) (b.qs[i] >> 4);
    }
    return x;
}
template <class Block> inline void fifth_bits(const Block & b, ints & x) {
    for (int i = 0; i < QK; ++i) {
        x.x[i] = (int8_t) (x.x[i] | (b.qh[i/8] >> i % 8 & 1) << 4);
    }
}
inline void subtract(ints & x, int by) {
    for (int i = 0; i < QK; ++i) {
        x.x[i] = (int8_t) (x.x[i] - by);
    }
}
inline ints looked_up(const block_iq4_nl & b) {
    ints x = nibbles(b);
    for (int i = 0; i < QK; ++i) {
        x.x[i] = kvalues_iq4nl[x.x[i]];
    }
    return x;
}

#endif

template <class Block> inline void two_halves(const Block & b, float & d, float & m) {
    ggml_half dm[2]; // copied, since the members' names differ from compiler to compiler
    memcpy(dm, &b, sizeof(dm));
    d = fp16_to_float(dm[0]);
    m = fp16_to_float(dm[1]);
}

inline void block_ints(const block_q8_0 & b, int8_t * x, float & d, float & m) {
    memcpy(x, b.qs, QK);
    d = fp16_to_float(b.d);
    m = 0.0f;
}
inline void block_ints(const block_q4_0 & b, int8_t * x, float & d, float & m) {
    ints i = nibbles(b);
    subtract(i, 8);
    store(i, x);
    d = fp16_to_float(b.d);
    m = 0.0f;
}
inline void block_ints(const block_q4_1 & b, int8_t * x, float & d, float & m) {
    store(nibbles(b), x);
    two_halves(b, d, m);
}
inline void block_ints(const block_q5_0 & b, int8_t * x, float & d, float & m) {
    ints i = nibbles(b);
    fifth_bits(b, i);
    subtract(i, 16);
    store(i, x);
    d = fp16_to_float(b.d);
    m = 0.0f;
}
inline void block_ints(const block_q5_1 & b, int8_t * x, float & d, float & m) {
    ints i = nibbles(b);
    fifth_bits(b, i);
    store(i, x);
    two_halves(b, d, m);
}
inline void block_ints(const block_iq4_nl & b, int8_t * x, float & d, float & m) {
    store(looked_up(b), x);
    d = fp16_to_float(b.d);
    m = 0.0f;
}

template <class Block> void blocks_to_float(const char * row, int64_t ne, float * out) {
    const Block * b = (const Block *) row;
    for (int64_t i = 0; i < ne; i += QK, ++b) {
        int8_t x[QK];
        float d, m;
        block_ints(*b, x, d, m);
        for (int j = 0; j < QK; j += VF_W) {
            vf_store(out + i + j, vf_fma(vf_load_i8(x + j), vf_set1(d), vf_set1(m)));
        }
    }
}

template <class Block> void blocks_as_q8_0(const char * row, int64_t ne, block_q8_0 * out) {
    const Block * b = (const Block *) row;
    for (int64_t i = 0; i < ne/QK; ++i) {
        float d, m;
        block_ints(b[i], out[i].qs, d, m);
        out[i].d = b[i].d;
    }
}

// Types whose blocks can be written as q8_0 without rounding.
inline bool fattn_like_q8_0(ggml_type type) {
    return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q5_0 || type == GGML_TYPE_IQ4_NL;
}

// Weights of 16 bits are exact enough unless K is in f32, for which upstream's kernels do not round Q either.
inline bool fattn_v_in_16_bits(const fattn_op & op) {
    return fattn_like_q8_0(op.v->type) && op.k->type != GGML_TYPE_F32;
}

inline void fattn_as_q8_0(ggml_type type, const char * row, int64_t ne, block_q8_0 * out) {
    switch (type) {
        case GGML_TYPE_Q4_0:   blocks_as_q8_0<block_q4_0  >(row, ne, out); break;
        case GGML_TYPE_Q5_0:   blocks_as_q8_0<block_q5_0  >(row, ne, out); break;
        case GGML_TYPE_IQ4_NL: blocks_as_q8_0<block_iq4_nl>(row, ne, out); break;
        default:               memcpy(out, row, ne/QK*sizeof(block_q8_0));
    }
}

} // namespace
