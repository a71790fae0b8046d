// Runs a Metal kernel that was compiled as C++: one threadgroup after another, each thread of it as a fiber.
//
// Why fibers: the lanes of a simdgroup exchange values (simd_sum, simd_shuffle) and the threads of a threadgroup wait
// for each other, so every thread needs a stack of its own and has to stop in the middle of the kernel. Lanes run in
// turn, each up to the next point where it needs the others. All lanes must stop at the same point: a lane that
// diverges or returns early ends the run with a message, and so does a function constant that was not set.
//
// Use: emu::launch l = {...}; emu::run(l); the kernel's view of it is what metal_stdlib calls.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

namespace emu {

constexpr int LANES       = 32;
constexpr int MAX_THREADS = 1024;
constexpr int MAX_BUFFERS = 31;
constexpr int MAX_FC      = 4096;

[[noreturn]] void fail(const char * format, ...);

//
// the thread's position
//

struct ids {
    uint32_t threadgroup[3]; // position in the grid
    uint32_t threads[3];     // per threadgroup
    uint32_t thread[3];      // in the threadgroup
    uint32_t index;          // the same as one number
};

extern const ids * current;
extern char *      buffers[MAX_BUFFERS];
extern char *      threadgroup_memory;

inline int lane() { return current->index % LANES; }

void threadgroup_barrier();
void simdgroup_barrier();

constexpr int SLOT = 64; // bytes, for the largest type that lanes exchange
char * exchange_slots(); // of this lane's simdgroup, for this exchange

// Every lane contributes a value and receives those of all.
template <typename T> struct all_lanes {
    const char * slots;
    explicit all_lanes(const T & mine) {
        static_assert(sizeof(T) <= SLOT);
        char * s = exchange_slots();
        memcpy(s + lane()*SLOT, &mine, sizeof(T));
        simdgroup_barrier();
        slots = s;
    }
    T operator[](int i) const { T r; memcpy(&r, slots + i*SLOT, sizeof(T)); return r; }
};

template <typename T> inline T undefined() { T r; memset(&r, 0xff, sizeof r); return r; }

inline int divisor(int x) { return x ? x : 1; }

//
// function constants
//

extern int32_t fc_value[MAX_FC];
extern bool    fc_set  [MAX_FC];

template <typename T, int I> struct function_constant {
    operator T() const {
        if (!fc_set[I]) {
            fail("function constant %d is read but was not set", I);
        }
        return (T) fc_value[I];
    }
};

//
// kernels
//

// The kind of a kernel's parameter; 0 to 30 are buffers.
enum { TG_MEMORY = 100, TG_POSITION, THREAD_IN_GRID, THREAD_INDEX, LANE, SIMDGROUP, THREADS };

template <typename A, int P> inline A argument() {
    if constexpr (P < MAX_BUFFERS) {
        if (!buffers[P]) {
            fail("buffer %d is not set", P);
        }
        if constexpr (std::is_reference_v<A>) {
            return *(std::remove_reference_t<A> *) buffers[P];
        } else {
            return (A) buffers[P];
        }
    } else if constexpr (P == TG_MEMORY) {
        return (A) threadgroup_memory;
    } else if constexpr (P == TG_POSITION || P == THREADS) {
        const uint32_t * p = P == THREADS ? current->threads : current->threadgroup;
        if constexpr (std::is_integral_v<A>) { return p[0]; } else { return A(p[0], p[1], p[2]); }
    } else if constexpr (P == THREAD_IN_GRID) {
        return current->threadgroup[0]*current->threads[0] + current->thread[0];
    } else if constexpr (P == THREAD_INDEX) {
        return current->index;
    } else if constexpr (P == LANE) {
        return current->index % LANES;
    } else {
        static_assert(P == SIMDGROUP);
        return current->index / LANES;
    }
}

template <int... P> struct params {};

template <typename... A, int... P> inline void call(void (*fn)(A...), params<P...>) {
    static_assert(sizeof...(A) == sizeof...(P));
    fn(argument<A, P>()...);
}

template <auto fn, typename PARAMS> inline void entry() { call(fn, PARAMS()); }

std::map<std::string, void (*)()> & kernels(); // by host_name

struct add_kernel {
    add_kernel(const char * name, void (*fn)()) { kernels()[name] = fn; }
};

struct launch {
    void (*    kernel)();
    uint32_t   threadgroups[3];
    uint32_t   threads[3];
    size_t     memory; // bytes of threadgroup memory
};

void run(const launch & l); // buffers and function constants are set already

extern bool reverse_simdgroups; // the last simdgroup first

} // namespace emu
