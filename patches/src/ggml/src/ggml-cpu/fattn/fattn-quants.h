// Blocks of the quantized cache types, taken apart into 32 small integers of which the values are d*integer + m.
//
// Why: with no m they are blocks of q8_0, which the kernels read as they are; ggml's own conversions to floats are
// compiled for the oldest CPU.
//
//   fattn_as_q8_0(GGML_TYPE_Q4_0, row, ne, blocks)   // q4_0, q5_0, iq4_nl: fattn_like_q8_0(type)
//   block_ints(block, ints, d, m)                    // one block, of any

#pragma once

#include "fattn-plan.h"
#include "fattn-simd.h"

#define GGML_COMMON_DECL_CPP
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"

namespace {

constexpr int QK = 32; // values of a block, of all these types
static_assert(QK == QK8_0 && QK == QK4_0 && QK == QK4_1 && QK == QK5_0 && QK == QK5_1 && QK == QK4_NL, "blocks of one size");

// Eight values in a register, one a byte: compilers take such short loops apart value by value.
constexpr uint64_t EACH = 0x0101010101010101u;

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
constexpr uint64_t BIT_OF_EACH = 0x0102040810204080u; // byte j of memory keeps bit j
#else
constexpr uint64_t BIT_OF_EACH = 0x8040201008040201u;
#endif

template <class Block> inline void nibbles(const Block & b, uint64_t * x) {
    uint64_t both[2];
    memcpy(both, b.qs, sizeof(both));
    for (int i = 0; i < 2; ++i) {
        x[i]     = both[i]      & 15*EACH;
        x[i + 2] = both[i] >> 4 & 15*EACH;
    }
}
template <class Block> inline void fifth_bits(const Block & b, uint64_t * x) {
    for (int i = 0; i < 4; ++i) {
        const uint64_t one_each = b.qh[i]*EACH & BIT_OF_EACH;
        x[i] |= (((one_each + 127*EACH) | one_each) >> 7 & EACH) << 4; // where it is not zero
    }
}
inline void less(uint64_t * x, int by) { // of values below 128; no byte borrows from the next
    for (int i = 0; i < 4; ++i) {
        x[i] = ((x[i] | 128*EACH) - by*EACH) ^ 128*EACH;
    }
}
inline void looked_up(const block_iq4_nl & b, uint64_t * x) {
#if defined(__SSE4_1__)
    const __m128i table = _mm_loadu_si128((const __m128i *) kvalues_iq4nl);
    const __m128i both  = _mm_loadu_si128((const __m128i *) b.qs), low = _mm_set1_epi8(15);
    const __m128i first = _mm_shuffle_epi8(table, _mm_and_si128(both, low));
    const __m128i last  = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), low));
    x[0] = _mm_extract_epi64(first, 0);
    x[1] = _mm_extract_epi64(first, 1);
    x[2] = _mm_extract_epi64(last, 0);
    x[3] = _mm_extract_epi64(last, 1);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    const int8x16_t  table = vld1q_s8(kvalues_iq4nl);
    const uint8x16_t both  = vld1q_u8(b.qs);
    vst1q_s8((int8_t *) x,       vqtbl1q_s8(table, vandq_u8(both, vdupq_n_u8(15))));
    vst1q_s8((int8_t *) (x + 2), vqtbl1q_s8(table, vshrq_n_u8(both, 4)));
#else
    nibbles(b, x);
    int8_t * v = (int8_t *) x;
    for (int i = 0; i < QK; ++i) {
        v[i] = kvalues_iq4nl[v[i]];
    }
#endif
}

template <class Block> inline void two_halves(const Block & b, float & d, float & m) {
    ggml_half dm[2]; // their names differ from compiler to compiler
    memcpy(dm, &b, sizeof(dm));
    d = fp16_to_float(dm[0]);
    m = fp16_to_float(dm[1]);
}

inline void block_ints(const block_q8_0 & b, uint64_t * x, float & d, float & m) {
    memcpy(x, b.qs, QK);
    d = fp16_to_float(b.d);
    m = 0.0f;
}
inline void block_ints(const block_q4_0 & b, uint64_t * x, float & d, float & m) {
    nibbles(b, x);
    less(x, 8);
    d = fp16_to_float(b.d);
    m = 0.0f;
}
inline void block_ints(const block_q4_1 & b, uint64_t * x, float & d, float & m) {
    nibbles(b, x);
    two_halves(b, d, m);
}
inline void block_ints(const block_q5_0 & b, uint64_t * x, float & d, float & m) {
    nibbles(b, x);
    fifth_bits(b, x);
    less(x, 16);
    d = fp16_to_float(b.d);
    m = 0.0f;
}
inline void block_ints(const block_q5_1 & b, uint64_t * x, float & d, float & m) {
    nibbles(b, x);
    fifth_bits(b, x);
    two_halves(b, d, m);
}
inline void block_ints(const block_iq4_nl & b, uint64_t * x, float & d, float & m) {
    looked_up(b, x);
    d = fp16_to_float(b.d);
    m = 0.0f;
}

template <class Block> void blocks_to_float(const char * row, int64_t ne, float * out) {
    const Block * b = (const Block *) row;
    for (int64_t i = 0; i < ne; i += QK, ++b) {
        uint64_t x[QK/8];
        float d, m;
        block_ints(*b, x, d, m);
        for (int j = 0; j < QK; j += VF_W) {
            vf_store(out + i + j, vf_fma(vf_load_i8((const int8_t *) x + j), vf_set1(d), vf_set1(m)));
        }
    }
}

template <class Block> void blocks_as_q8_0(const char * row, int64_t ne, block_q8_0 * out) {
    const Block * b = (const Block *) row;
    for (int64_t i = 0; i < ne/QK; ++i) {
        uint64_t x[QK/8];
        float d, m;
        block_ints(b[i], x, d, m);
        for (int j = 0; j < QK/8; ++j) {
            memcpy(out[i].qs + 8*j, x + j, 8);
        }
        out[i].d = b[i].d;
    }
}

// Types whose blocks become blocks of q8_0 without rounding.
inline bool fattn_like_q8_0(ggml_type type) {
    return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q5_0 || type == GGML_TYPE_IQ4_NL;
}

// Weights of 16 bits are exact enough unless K is in f32, which upstream's kernels do not round Q for.
inline bool fattn_v_in_16_bits(const fattn_op & op) { return fattn_like_q8_0(op.v->type) && op.k->type != GGML_TYPE_F32; }

inline void fattn_as_q8_0(ggml_type type, const char * row, int64_t ne, block_q8_0 * out) {
    switch (type) {
        case GGML_TYPE_Q4_0:   blocks_as_q8_0<block_q4_0  >(row, ne, out); break;
        case GGML_TYPE_Q5_0:   blocks_as_q8_0<block_q5_0  >(row, ne, out); break;
        case GGML_TYPE_IQ4_NL: blocks_as_q8_0<block_iq4_nl>(row, ne, out); break;
        default:               memcpy(out, row, ne/QK*sizeof(block_q8_0));
    }
}

} // namespace
