// Rows of K and V as the cache stores them, read as vectors of floats.
//
// Why: the decode kernel reads these types straight from the cache; every other type is converted a tile at a time.
//
//   row_f16 row(p); vf a[row_f16::N]; row.load(a, i);   // values [i, i + N*VF_W)
//   row.get(i): values [i, i + VF_W); row.part(i, n): the first n of them, then zeros; bytes(n): of n values

#pragma once

#include "fattn-simd.h"

namespace {

// The first n < VF_W values, then zeros; reads nothing past them.
template <class T> inline void vf_head(T * head, const T * p, int n) {
    memset(head, 0, VF_W*sizeof(T));
    memcpy(head, p, n*sizeof(T));
}

inline vf vf_of(const float * p)       { return vf_load(p); }
inline vf vf_of(const ggml_fp16_t * p) { return vf_load_f16(p); }
inline vf vf_of(const ggml_bf16_t * p) { return vf_load_bf16(p); }

template <class T> struct row_plain {
    static constexpr int N = 1;
    const T * p;
    explicit row_plain(const void * row) : p((const T *) row) {}
    vf get(int i) const { return vf_of(p + i); }
    vf part(int i, int n) const { T t[VF_W]; vf_head(t, p + i, n); return vf_of(t); }
    void load(vf * x, int i) const { x[0] = get(i); }
    const char * at(int i) const { return (const char *) (p + i); }
    static constexpr int bytes(int n) { return n*(int) sizeof(T); }
};
using row_f32  = row_plain<float>;
using row_f16  = row_plain<ggml_fp16_t>;
using row_bf16 = row_plain<ggml_bf16_t>;

} // namespace
