// What this machine can do at best, all threads at once: multiply-adds in f32, dot products in bf16 and int8 where the
// compiler may use them, and reading memory. scripts/cpu/roofline.py compiles and runs it.
//
//     c++ -O3 -std=c++17 -march=native -pthread roofline.cpp -o roofline && ./roofline THREADS [MIB] [SECONDS] [read]
//
// One line of JSON: f32_gflops, bf16_gflops, int8_gops (null where there is no such unit), read_gb_s; with `read` that alone.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// As many sums must be under way as a core begins in the time that one step takes: on x86 two a cycle for up to 6
// cycles, with NEON's narrower vectors four a cycle for 4. More of them, and compilers keep some in memory.
#if defined(__ARM_NEON)
constexpr int SUMS = 16;
#else
constexpr int SUMS = 12;
#endif
constexpr int STEPS = 4096;  // of every sum, between two looks at the clock

static volatile float sink;

struct F32 {
#if defined(__AVX512F__)
    using vec = __m512;
    static vec make(float x) { return _mm512_set1_ps(x); }
    static vec step(vec sum, vec a, vec b) { return _mm512_fmadd_ps(sum, a, b); }
    static float value(vec x) { return _mm512_cvtss_f32(x); }
#elif defined(__AVX2__) && defined(__FMA__)
    using vec = __m256;
    static vec make(float x) { return _mm256_set1_ps(x); }
    static vec step(vec sum, vec a, vec b) { return _mm256_fmadd_ps(sum, a, b); }
    static float value(vec x) { return _mm256_cvtss_f32(x); }
#elif defined(__ARM_NEON) && defined(__aarch64__)
    using vec = float32x4_t;
    static vec make(float x) { return vdupq_n_f32(x); }
    static vec step(vec sum, vec a, vec b) { return vfmaq_f32(sum, a, b); }
    static float value(vec x) { return vgetq_lane_f32(x, 0); }
#else
    // Four floats, which a compiler makes one register of where there are any.
    struct vec { float x[4]; };
    static vec make(float x) { return {{x, x, x, x}}; }
    static vec step(vec sum, vec a, vec b) {
        for (int i = 0; i < 4; ++i) {
            sum.x[i] = sum.x[i] * a.x[i] + b.x[i];
        }
        return sum;
    }
    static float value(vec x) { return x.x[0]; }
#endif
    // sum * 0.5 + x stays near 2 * x: neither infinite nor so small that it gets slow.
    static vec left(float) { return make(0.5f); }
    static vec right(float x) { return make(x); }
    static constexpr double ops = 2.0 * sizeof(vec) / sizeof(float);
};

#if defined(__AVX512BF16__)
#define HAS_BF16
struct Bf16 {
    using vec = __m512;
    using operand = __m512bh;
    static vec make(float x) { return _mm512_set1_ps(x); }
    static operand left(float x) { return _mm512_cvtne2ps_pbh(make(x), make(-x)); }
    static operand right(float x) { return _mm512_cvtne2ps_pbh(make(x), make(x)); }
    static vec step(vec sum, operand a, operand b) { return _mm512_dpbf16_ps(sum, a, b); }
    static float value(vec x) { return _mm512_cvtss_f32(x); }
    static constexpr double ops = 64;
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_BF16
struct Bf16 {
    using vec = float32x4_t;
    using operand = bfloat16x8_t;
    static vec make(float x) { return vdupq_n_f32(x); }
    static operand left(float x) { return vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(make(x)), make(-x)); }
    static operand right(float x) { return vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(make(x)), make(x)); }
    // 2 x 4 times 4 x 2: the widest that there is.
    static vec step(vec sum, operand a, operand b) { return vbfmmlaq_f32(sum, a, b); }
    static float value(vec x) { return vgetq_lane_f32(x, 0); }
    static constexpr double ops = 32;
};
#endif

#if (defined(__AVX512VNNI__) && defined(__AVX512F__)) || defined(__AVXVNNI__)
#define HAS_INT8
struct Int8 {
#if defined(__AVX512VNNI__)
    using vec = __m512i;
    static vec bytes(int x) { return _mm512_set1_epi8(char(x)); }
    static vec make(float x) { return _mm512_set1_epi32(int(x)); }
    static vec step(vec sum, vec a, vec b) { return _mm512_dpbusd_epi32(sum, a, b); }
    static float value(vec x) { return float(_mm512_cvtsi512_si32(x)); }
#else
    using vec = __m256i;
    static vec bytes(int x) { return _mm256_set1_epi8(char(x)); }
    static vec make(float x) { return _mm256_set1_epi32(int(x)); }
    static vec step(vec sum, vec a, vec b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
    static float value(vec x) { return float(_mm256_cvtsi256_si32(x)); }
#endif
    static vec left(float x) { return bytes(int(x) + 1); }
    static vec right(float x) { return bytes(-int(x) - 1); }
    static constexpr double ops = 2.0 * sizeof(vec);
};
#elif defined(__ARM_FEATURE_MATMUL_INT8) || defined(__ARM_FEATURE_DOTPROD)
#define HAS_INT8
struct Int8 {
    using vec = int32x4_t;
    static vec make(float x) { return vdupq_n_s32(int(x)); }
    static int8x16_t left(float x) { return vdupq_n_s8(int8_t(int(x) + 1)); }
    static int8x16_t right(float x) { return vdupq_n_s8(int8_t(-int(x) - 1)); }
#if defined(__ARM_FEATURE_MATMUL_INT8)
    static vec step(vec sum, int8x16_t a, int8x16_t b) { return vmmlaq_s32(sum, a, b); }
    static constexpr double ops = 64;
#else
    static vec step(vec sum, int8x16_t a, int8x16_t b) { return vdotq_s32(sum, a, b); }
    static constexpr double ops = 32;
#endif
    static float value(vec x) { return float(vgetq_lane_s32(x, 0)); }
};
#endif

// Hides from the compiler what is in x, so that it can't compute a step once for all.
template <typename T> static inline void conceal(T & x) {
#if defined(__AVX2__) || defined(__AVX512F__)
    asm volatile("" : "+v"(x));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    asm volatile("" : "+w"(x));
#else
    asm volatile("" : "+m"(x));
#endif
}

// STEPS of SUMS sums, each in a register of its own. Returns the operations done.
template <typename K, size_t... I> static double steps(float seed, std::index_sequence<I...>) {
    auto a = K::left(seed), b = K::right(seed);
    typename K::vec sum[sizeof...(I)] = {K::make(seed + float(I))...};
    for (int i = 0; i < STEPS; ++i) {
        conceal(a);
        conceal(b);
        ((sum[I] = K::step(sum[I], a, b)), ...);
    }
    (conceal(sum[I]), ...);
    sink = (K::value(sum[I]) + ...);
    return K::ops * STEPS * sizeof...(I);
}

// A thread's part of the memory that is read: never written again, added up a piece at a time.
struct Part {
    static constexpr size_t PIECE = 1 << 18;  // floats
    std::unique_ptr<float[]> data;
    size_t pieces, next = 0;

    // Written by the thread that reads it, so that it lies near that one.
    explicit Part(size_t bytes) : pieces(std::max<size_t>(1, bytes / sizeof(float) / PIECE)) {
        data.reset(new float[pieces * PIECE]);
        for (size_t i = 0; i < pieces * PIECE; ++i) {
            data[i] = float(i % 7);
        }
    }
    double read() {
        const float * from = data.get() + next * PIECE;
        next = (next + 1) % pieces;
        constexpr int WIDE = 32;  // sums: two registers of 16, or eight of 4
        float sum[WIDE] = {};
        for (size_t i = 0; i < PIECE; i += WIDE) {
            for (int j = 0; j < WIDE; ++j) {
                sum[j] += from[i + j];
            }
        }
        float all = 0;
        for (float x : sum) {
            all += x;
        }
        sink = all;
        return PIECE * sizeof(float);
    }
};

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What all threads do per second, of make() and then as many calls of its result as fit `seconds`: the median of the
// windows. A first one, which isn't counted, lets the clock settle.
template <typename Make> static double rate(int threads, double seconds, Make make) {
    constexpr int WINDOWS = 5;
    std::vector<std::array<double, WINDOWS>> rates(threads);
    std::atomic<int> ready{0};
    auto work = [&](int thread) {
        auto call = make(thread);
        auto window = [&] {
            const double start = now();
            double done = 0, passed;
            do {
                done += call();
                passed = now() - start;
            } while (passed < seconds);
            return done / passed;
        };
        ++ready;
        while (ready < threads) {
            std::this_thread::yield();
        }
        window();
        for (double & found : rates[thread]) {
            found = window();
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) {
        others.emplace_back(work, thread);
    }
    work(0);
    for (auto & other : others) {
        other.join();
    }
    std::array<double, WINDOWS> sums{};
    for (const auto & mine : rates) {
        for (int i = 0; i < WINDOWS; ++i) {
            sums[i] += mine[i];
        }
    }
    std::sort(sums.begin(), sums.end());
    return sums[WINDOWS / 2];
}

template <typename K> static double peak(int threads, double seconds) {
    return rate(threads, seconds, [](int thread) {
        return [thread] { return steps<K>(float(1 + thread % 8), std::make_index_sequence<SUMS>()); };
    }) / 1e9;
}

int main(int argc, char ** argv) {
    const int threads = argc > 1 ? atoi(argv[1]) : 1;
    const double mib = argc > 2 ? atof(argv[2]) : 256, seconds = argc > 3 ? atof(argv[3]) : 0.08;
    const bool only_read = argc > 4 && strcmp(argv[4], "read") == 0;
    if (threads < 1 || mib <= 0 || seconds <= 0 || argc > 4 + only_read) {
        fprintf(stderr, "usage: %s THREADS [MIB] [SECONDS] [read], the numbers above 0\n", argv[0]);
        return 2;
    }
    printf("{");
    if (!only_read) {
        printf("\"f32_gflops\": %.2f, ", peak<F32>(threads, seconds));
#ifdef HAS_BF16
        printf("\"bf16_gflops\": %.2f, ", peak<Bf16>(threads, seconds));
#else
        printf("\"bf16_gflops\": null, ");
#endif
#ifdef HAS_INT8
        printf("\"int8_gops\": %.2f, ", peak<Int8>(threads, seconds));
#else
        printf("\"int8_gops\": null, ");
#endif
    }
    const double read = rate(threads, seconds, [&](int) {
        return [part = std::make_shared<Part>(size_t(mib * (1 << 20)) / threads)] { return part->read(); };
    });
    printf("\"read_gb_s\": %.3f}\n", read / 1e9);
    return 0;
}
