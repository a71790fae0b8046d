// A CUDA device on the host: runs kernels of the patched tree, compiled as plain C++, one CUDA block after the other.
//
// Why: without a GPU, this is the only way to execute the flash attention kernels. Threads of a block are fibers that run
// until they reach a barrier or a warp-wide instruction; inline PTX is interpreted (translate.py turns it into calls of
// emu::ptx). Asynchronous copies are made as late as allowed, so that a missing wait shows. It replaces vendors/cuda.h. EMU_ARCH is the compute capability, 610 to 900.

#pragma once

#include <cuda_runtime.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __CUDA_ARCH__ EMU_ARCH
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static
#undef __forceinline__
#define __forceinline__ inline
#define __builtin_assume(x)

// cuBLAS by name only: common.cuh mentions it, flash attention does not call it
typedef struct cublasContext * cublasHandle_t;
enum cublasStatus_t { CUBLAS_STATUS_SUCCESS };
enum cublasMath_t { CUBLAS_TF32_TENSOR_OP_MATH };
const char *   cublasGetStatusString(cublasStatus_t);
cublasStatus_t cublasCreate(cublasHandle_t *);
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t);
cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t);
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t);

namespace emu {

constexpr int WARP = 32;

struct barrier {
    int      arrived    = 0;
    uint64_t generation = 0;
};

struct warp_state : barrier {
    uint64_t slots[2][WARP][16];
};

struct copy {
    uint32_t     dst;
    const void * src;
};

struct thread {
    ucontext_t context;
    jmp_buf jump;
    bool started;
    std::vector<char> stack;
    uint3 index;
    int   linear;
    bool  done;
    std::vector<copy> copies; // asynchronous, not made yet
};

extern std::vector<thread>     threads;
extern std::vector<warp_state> warps;
extern thread * current;
extern dim3     grid, block;
extern uint3    block_index;
extern std::vector<char> shared; // dynamic

void yield();
void sync_block();
void run_block(const std::function<void()> & kernel);

// All lanes store n values; afterwards the slots of the warp hold them.
const uint64_t (* exchange(const uint64_t * values, int n))[16];

void ptx(const char * op, std::initializer_list<void *> out, std::initializer_list<uint64_t> in);

template <typename T> uint64_t in(T x) {
    uint64_t bits = 0;
    static_assert(sizeof(T) <= sizeof(bits), "operand too large");
    memcpy(&bits, &x, sizeof(T));
    return bits;
}

template <typename T> T shuffle(T x, int lane) {
    const uint64_t bits = in(x);
    const uint64_t got  = exchange(&bits, 1)[lane][0];
    T res;
    memcpy(&res, &got, sizeof(T));
    return res;
}

template <typename Kernel, typename... Args>
void launch(Kernel kernel, dim3 g, dim3 b, size_t n_shared, cudaStream_t, Args... args) {
    grid  = g;
    block = b;
    for (unsigned z = 0; z < g.z; ++z) {
        for (unsigned y = 0; y < g.y; ++y) {
            for (unsigned x = 0; x < g.x; ++x) {
                block_index = { x, y, z };
                shared.assign(n_shared + 16, (char) 0xFF); // NaNs
                run_block([&] { kernel(args...); });
            }
        }
    }
}

static inline char * dynamic_shared() {
    return (char *) (((uintptr_t) shared.data() + 15) & ~(uintptr_t) 15);
}

} // namespace emu

// the runtime functions that launch_fattn calls
template <typename T> cudaError_t emu_occupancy(int * n, T, int, size_t) { *n = 2; return cudaSuccess; }
#define cudaOccupancyMaxActiveBlocksPerMultiprocessor emu_occupancy
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(err) "error"

#define threadIdx (emu::current->index)
#define blockIdx  (emu::block_index)
#define gridDim   (emu::grid)
#define blockDim  (emu::block)

static inline void __syncthreads() { emu::sync_block(); }
static inline void __syncwarp(unsigned = ~0u) { emu::exchange(nullptr, 0); }

template <typename T> T __shfl_xor_sync(unsigned, T x, int mask, int = 32) {
    return emu::shuffle(x, (emu::current->linear % emu::WARP) ^ mask);
}
template <typename T> T __shfl_sync(unsigned, T x, int src, int width = 32) {
    const int lane = emu::current->linear % emu::WARP;
    return emu::shuffle(x, lane/width*width + src%width);
}
template <typename T> T __shfl_up_sync(unsigned, T x, int delta, int width = 32) {
    const int lane = emu::current->linear % emu::WARP;
    return emu::shuffle(x, lane%width < delta ? lane : lane - delta);
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    const uint64_t bit = predicate != 0;
    const auto slots = emu::exchange(&bit, 1);
    unsigned res = 0;
    for (int lane = 0; lane < emu::WARP; ++lane) {
        res |= unsigned(slots[lane][0]) << lane;
    }
    return res;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }
static inline int __reduce_add_sync(unsigned, int x) {
    const uint64_t bits  = emu::in(x);
    const auto     slots = emu::exchange(&bits, 1);
    int res = 0;
    for (int lane = 0; lane < emu::WARP; ++lane) {
        res += (int) slots[lane][0];
    }
    return res;
}

static inline int      __popc(unsigned x) { return __builtin_popcount(x); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t(a)*b) >> 32; }
static inline int __dp4a(int a, int b, int c) {
    const int8_t * a8 = (const int8_t *) &a;
    const int8_t * b8 = (const int8_t *) &b;
    return c + a8[0]*b8[0] + a8[1]*b8[1] + a8[2]*b8[2] + a8[3]*b8[3];
}
static inline void __trap() { abort(); }
static inline unsigned __cvta_generic_to_shared(const void * p) { return (const char *) p - emu::dynamic_shared(); }

template <typename A, typename B> std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <typename A, typename B> std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

// named by helpers that flash attention does not call
static inline unsigned __byte_perm(unsigned, unsigned, unsigned) { abort(); }
static inline unsigned __vsub4(unsigned, unsigned) { abort(); }
static inline unsigned __vcmpne4(unsigned, unsigned) { abort(); }
static inline __nv_bfloat16_raw __nv_cvt_e8m0_to_bf16raw(uint8_t) { abort(); }
