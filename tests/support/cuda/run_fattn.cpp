// Flash attention of the patched CUDA sources on the emulated device, against plain loops in double precision.
//
// Why: launch_fattn, the kernels, the plan and the f16 copies run unchanged (emulator.h). Rows that the table does not list
// and fresh memory are NaN, so that reading them shows; the bytes behind every buffer must not change.
//
// Use: built by tests/patches/test_cuda_kernels.py with one of -DRUN_VEC, -DRUN_TILE, -DRUN_MMA; prints one line per case.

#include "fattn-common.cuh"
#include "fattn-tile.cuh"
#include "fattn-vec.cuh"
#include "fattn-mma-f16.cuh"
#include "fattn-kv-blocks.cu"

#include <limits>
#include <random>

static ggml_cuda_device_info device_info;

const ggml_cuda_device_info & ggml_cuda_info() { return device_info; }
int  ggml_cuda_get_device() { return 0; }
void ggml_cuda_set_device(int) {}
void ggml_cuda_error(const char * stmt, const char *, const char *, int, const char *) {
    fprintf(stderr, "CUDA error: %s\n", stmt);
    abort();
}

bool ggml_cuda_flash_attn_ext_mma_f16_shall_use_sparse(const int, const ggml_tensor *, const int, const int) { return false; }
void ggml_cuda_flash_attn_ext_compact_mask(const ggml_tensor *, int32_t *, int32_t *, int32_t, int32_t, int32_t, cudaStream_t) { abort(); }

// Memory that is initially NaN, with a guard behind it.
struct guarded {
    static constexpr size_t GUARD = 256;
    size_t size;
    char * data;

    explicit guarded(size_t size) : size(size), data((char *) aligned_alloc(256, GGML_PAD(size + GUARD, 256))) {
        memset(data, 0xFF, size);
        memset(data + size, 0x5A, GUARD);
    }
    ~guarded() {
        for (size_t i = 0; i < GUARD; ++i) {
            if (data[size + i] != 0x5A) {
                fprintf(stderr, "written past the end of a buffer\n");
                abort();
            }
        }
        free(data);
    }
};

struct guarded_pool : ggml_cuda_pool {
    std::unordered_map<void *, std::unique_ptr<guarded>> all;
    void * alloc(size_t size, size_t * actual_size) override {
        auto buffer = std::make_unique<guarded>(size);
        *actual_size = size;
        void * res = buffer->data;
        all[res] = std::move(buffer);
        return res;
    }
    void free(void * ptr, size_t) override { all.erase(ptr); }
};

std::unique_ptr<ggml_cuda_pool> ggml_backend_cuda_context::new_pool_for_device(int, int) { return std::make_unique<guarded_pool>(); }
ggml_backend_cuda_context::~ggml_backend_cuda_context() {}

cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, unsigned) { return cudaSuccess; }

// Conversions of ops without a table are upstream's own, in files that are not run here.
template <ggml_type type>
static void convert(const void * x, half * y, int64_t k, cudaStream_t) {
    std::vector<float> f(k);
    if (type == GGML_TYPE_F32) {
        memcpy(f.data(), x, k*sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(x, f.data(), k);
    }
    ggml_fp32_to_fp16_row(f.data(), (ggml_fp16_t *) y, k);
}

template <ggml_type type>
static void convert_nc(const void * x, half * y, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, int64_t s1, int64_t s2, int64_t s3, cudaStream_t stream) {
    for (int64_t i = 0; i < ne1*ne2*ne3; ++i) {
        const int64_t block = i % ne1*s1 + i/ne1 % ne2*s2 + i/(ne1*ne2)*s3;
        convert<type>((const char *) x + block*ggml_type_size(type), y + i*ne0, ne0, stream);
    }
}

to_fp16_cuda_t ggml_get_to_fp16_cuda(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  return convert<GGML_TYPE_F32>;
        case GGML_TYPE_BF16: return convert<GGML_TYPE_BF16>;
        case GGML_TYPE_Q4_0: return convert<GGML_TYPE_Q4_0>;
        case GGML_TYPE_Q5_1: return convert<GGML_TYPE_Q5_1>;
        case GGML_TYPE_Q8_0: return convert<GGML_TYPE_Q8_0>;
        default: abort();
    }
}

to_fp16_nc_cuda_t ggml_get_to_fp16_nc_cuda(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  return convert_nc<GGML_TYPE_F32>;
        case GGML_TYPE_BF16: return convert_nc<GGML_TYPE_BF16>;
        case GGML_TYPE_Q4_0: return convert_nc<GGML_TYPE_Q4_0>;
        case GGML_TYPE_Q5_1: return convert_nc<GGML_TYPE_Q5_1>;
        case GGML_TYPE_Q8_0: return convert_nc<GGML_TYPE_Q8_0>;
        default: abort();
    }
}

static std::mt19937 rng(1);

static float uniform(float lo, float hi) {
    return lo + (hi - lo)*(rng() >> 8)/float(1 << 24);
}

struct fattn_case {
    int hs, nh, nr, nb, ns, w, s, pad; // head size, KV heads, Q heads per KV head, tokens, streams, window (0: causal), sinks
    ggml_type type_K = GGML_TYPE_F16, type_V = GGML_TYPE_F16;
    bool  logit_sinks = false;
    float max_bias = 0.0f, softcap = 0.0f;
    bool  table = true;
    int   kv = 2048;
    int   nsm = 3;
};

typedef void (* run_t)(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

static int n_failed = 0;

// A cache [hs, nh, kv, ns] with random values in f16 or quantized, seen as [hs, kv, nh, ns].
static ggml_tensor * make_cache(ggml_context * ctx, const fattn_case & c, ggml_type type, std::vector<float> & values, const std::vector<bool> & listed) {
    ggml_tensor * t = ggml_new_tensor_3d(ctx, type, c.hs*c.nh, c.kv, c.ns);
    values.resize(ggml_nelements(t));
    for (int64_t row = 0; row < (int64_t) c.kv*c.ns; ++row) {
        std::vector<float> x(c.hs*c.nh);
        for (auto & v : x) {
            v = uniform(-1.0f, 1.0f);
        }
        char * data = (char *) t->data + row*t->nb[1];
        if (type == GGML_TYPE_F16) {
            ggml_fp32_to_fp16_row(x.data(), (ggml_fp16_t *) data, x.size());
        } else if (type == GGML_TYPE_BF16) {
            ggml_fp32_to_bf16_row(x.data(), (ggml_bf16_t *) data, x.size());
        } else if (type == GGML_TYPE_F32) {
            memcpy(data, x.data(), x.size()*sizeof(float));
        } else {
            ggml_quantize_chunk(type, x.data(), data, 0, 1, x.size(), nullptr);
        }
        if (type == GGML_TYPE_F32) {
            std::copy(x.begin(), x.end(), values.begin() + row*x.size());
        } else {
            ggml_get_type_traits(type)->to_float(data, values.data() + row*x.size(), x.size());
        }
        if (!listed[row/GGML_KV_BLOCK_SIZE]) {
            memset(data, 0xFF, t->nb[1]); // NaN, also as the scale of a quantized block
        }
    }
    t = ggml_view_4d(ctx, t, c.hs, c.nh, c.kv, c.ns, ggml_row_size(type, c.hs), t->nb[1], t->nb[2], 0);
    return ggml_permute(ctx, t, 0, 2, 1, 3);
}

static void check(const char * name, const fattn_case & c, run_t run) {
    constexpr int B = GGML_KV_BLOCK_SIZE;
    device_info.devices[0].nsm = c.nsm;

    ggml_init_params params = { size_t(512) << 20, nullptr, false };
    ggml_context * ctx = ggml_init(params);

    // live blocks, as in patches/src/tests/test-kv-blocks.h
    const auto pos_of = [&](int r, int i) { return c.kv - c.nb - 17*r + i; };
    const int n_blocks_kv = c.kv/B;
    const int n_free = c.w > 0 || !c.table ? 0 : pos_of(c.ns - 1, 0)/B - 1;
    std::vector<std::vector<int32_t>> masked(c.ns);
    size_t n_masked = 0;
    for (int r = 0; r < c.ns; ++r) {
        for (int b = n_free; b < n_blocks_kv; ++b) {
            if (!c.table || b*B < c.s || ((b + 1)*B - 1 > pos_of(r, 0) - std::max(c.w, 1) && b*B <= pos_of(r, c.nb - 1))) {
                masked[r].push_back(b);
            }
        }
        if (c.table) {
            std::shuffle(masked[r].begin(), masked[r].end(), rng);
        }
        n_masked = std::max(n_masked, masked[r].size());
    }
    n_masked += c.table ? c.pad : 0;
    const int n_blocks = n_masked + n_free;

    std::vector<int32_t> table;
    std::vector<bool>    listed(n_blocks_kv*c.ns);
    for (int r = 0; r < c.ns; ++r) {
        auto blocks = masked[r];
        blocks.resize(n_masked, blocks.back());
        for (int b = n_free; b > 0; --b) {
            blocks.push_back(b - 1);
        }
        for (int b : blocks) {
            listed[r*n_blocks_kv + b] = true;
        }
        table.insert(table.end(), blocks.begin(), blocks.end());
    }

    std::vector<float> K, V;
    ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c.hs, c.nb, c.nh*c.nr, c.ns);
    ggml_tensor * k = make_cache(ctx, c, c.type_K, K, listed);
    ggml_tensor * v = make_cache(ctx, c, c.type_V, V, listed);
    ggml_tensor * m = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_masked*B, c.nb, 1, c.ns);
    ggml_tensor * t = ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_blocks, 1, 1, c.ns);
    ggml_tensor * l = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.nh*c.nr);
    for (int64_t i = 0; i < ggml_nelements(q); ++i) { ((float *) q->data)[i] = uniform(-2.0f, 2.0f); }
    for (int64_t i = 0; i < ggml_nelements(l); ++i) { ((float *) l->data)[i] = uniform(-1.0f, 1.0f); }
    memcpy(t->data, table.data(), ggml_nbytes(t));

    std::vector<float> mask(ggml_nelements(m), -INFINITY);
    for (int r = 0; r < c.ns; ++r) {
        for (int i = 0; i < c.nb; ++i) {
            const int p = pos_of(r, i);
            for (size_t b = 0; b < masked[r].size() && !(c.nb > 8 && i == 3); ++b) {
                for (int x = 0; x < B; ++x) {
                    const int j = masked[r][b]*B + x;
                    if (j <= p && (c.w == 0 || p - j < c.w || j < c.s)) {
                        mask[((size_t) r*c.nb + i)*n_masked*B + b*B + x] = c.max_bias > 0 ? -std::min(p - j, 16)/16.0f : 0.0f;
                    }
                }
            }
        }
    }
    ggml_fp32_to_fp16_row(mask.data(), (ggml_fp16_t *) m->data, mask.size());

    const float scale = 1.0f/sqrtf(c.hs);
    ggml_tensor * dst = ggml_flash_attn_ext(ctx, q, k, v, m, scale, c.max_bias, c.softcap);
    if (c.logit_sinks) {
        ggml_flash_attn_ext_add_sinks(dst, l);
    }
    if (c.table) {
        ggml_flash_attn_ext_set_kv_blocks(dst, t);
        GGML_ASSERT(ggml_cuda_fattn_kv_supports(dst));
    }
    guarded out(ggml_cuda_flash_attn_ext_get_f16_extra_data(dst, true, true).end - (uintptr_t) dst->data);
    dst->data = out.data;
    {
        ggml_backend_cuda_context cuda(0);
        cuda.streams[0][0] = (cudaStream_t) 1;
        run(cuda, dst);
    }

    const uint32_t n_head_log2 = 1u << (uint32_t) floorf(log2f(c.nh*c.nr));
    double err = 0, norm = 0, worst = 0;
    for (int r = 0; r < c.ns; ++r) {
        for (int h = 0; h < c.nh*c.nr; ++h) {
            const float m0 = powf(2.0f, -c.max_bias/n_head_log2), m1 = powf(2.0f, -c.max_bias/2.0f/n_head_log2);
            const float slope = c.max_bias > 0 ? h < (int) n_head_log2 ? powf(m0, h + 1) : powf(m1, 2*(h - n_head_log2) + 1) : 1.0f;
            for (int i = 0; i < c.nb; ++i) {
                const float * Q = (const float *) ((char *) q->data + i*q->nb[1] + h*q->nb[2] + r*q->nb[3]);
                std::vector<double> p(n_blocks*B), o(c.hs);
                double sum = c.logit_sinks ? exp((double) ((float *) l->data)[h]) : 0.0;
                for (int col = 0; col < n_blocks*B; ++col) {
                    const float mv = col < (int) n_masked*B ? mask[((size_t) r*c.nb + i)*n_masked*B + col] : 0.0f;
                    if (mv == -INFINITY) {
                        continue;
                    }
                    const size_t row = (size_t) r*c.kv + table[r*n_blocks + col/B]*B + col%B;
                    double s = 0;
                    for (int d = 0; d < c.hs; ++d) {
                        s += (double) Q[d]*K[(row*c.nh + h/c.nr)*c.hs + d];
                    }
                    s *= scale;
                    s = c.softcap != 0 ? c.softcap*tanh(s/c.softcap) : s;
                    const double e = exp(s + slope*mv);
                    sum += e;
                    for (int d = 0; d < c.hs; ++d) {
                        o[d] += e*V[(row*c.nh + h/c.nr)*c.hs + d];
                    }
                }
                if (sum == 0.0) {
                    continue; // upstream divides zero by zero
                }
                const float * got = (const float *) dst->data + (((size_t) r*c.nb + i)*c.nh*c.nr + h)*c.hs;
                for (int d = 0; d < c.hs; ++d) {
                    const double e = got[d] - o[d]/sum;
                    err   += e*e;
                    norm  += o[d]/sum*o[d]/sum;
                    worst  = std::isnan(e) ? INFINITY : std::max(worst, fabs(e));
                }
            }
        }
    }
    const bool ok = err/norm <= 5e-4 && worst < 0.1; // NaN fails
    n_failed += !ok;
    printf("%s %s hs %d heads %dx%d tokens %d streams %d window %d sinks %d pad %d K %s V %s logit_sinks %d bias %g cap %g table %d sm %d: nmse %.2e, worst %.2e\n",
        ok ? "OK" : "FAIL", name, c.hs, c.nh, c.nr, c.nb, c.ns, c.w, c.s, c.pad, ggml_type_name(c.type_K), ggml_type_name(c.type_V),
        c.logit_sinks, c.max_bias, c.softcap, c.table, c.nsm, err/norm, worst);
    fflush(stdout);
    ggml_free(ctx);
}

static void run_all();

int main() {
    device_info.device_count = 1;
    device_info.devices[0].cc        = EMU_ARCH;
    device_info.devices[0].warp_size = 32;
    run_all();
    return n_failed != 0;
}

#define CASE(...) fattn_case { __VA_ARGS__ }

// With a table, and once per kernel without, which validates the emulator.
static void both(const char * name, fattn_case c, run_t run) {
    check(name, c, run);
    c.table = false;
    c.kv    = 1024;
    check(name, c, run);
}

#if defined(RUN_VEC)
DECL_FATTN_VEC_CASE( 64, GGML_TYPE_F16,  GGML_TYPE_F16);
DECL_FATTN_VEC_CASE(128, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0);

static void run_all() {
    const run_t f16  = ggml_cuda_flash_attn_ext_vec_case< 64, GGML_TYPE_F16,  GGML_TYPE_F16>;
    const run_t q8_0 = ggml_cuda_flash_attn_ext_vec_case<128, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0>;

    for (int nb : { 1, 2 }) {
        both ("vec", CASE( 64, 2, 2, nb, 1, 300,  64, 1), f16);
        check("vec", CASE( 64, 2, 2, nb, 1,   0,   0, 1), f16);
        check("vec", CASE( 64, 1, 2, nb, 3, 255,   1, 2), f16);
        both ("vec", CASE(128, 1, 2, nb, 1, 600, 257, 2, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, true, 8.0f, 30.0f), q8_0);
        check("vec", CASE(128, 1, 2, nb, 1,   0,   0, 1, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0), q8_0);
        check("vec", CASE(128, 1, 2, nb, 2, 255, 100, 2, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0), q8_0);
        // other types are converted, one of K and V or both
        check("vec", CASE( 64, 2, 2, nb, 2, 600, 100, 2, GGML_TYPE_Q4_0, GGML_TYPE_F16), f16);
        check("vec", CASE( 64, 2, 2, nb, 1,   0,   0, 1, GGML_TYPE_F16,  GGML_TYPE_F32), f16);
        check("vec", CASE( 64, 1, 2, nb, 1, 256,   0, 1, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0), f16);
        check("vec", CASE( 64, 1, 2, nb, 1,   1,   0, 1, GGML_TYPE_BF16, GGML_TYPE_BF16), f16);
    }
}
#elif defined(RUN_TILE)
static void run_all() {
    const run_t d40 = launch_fattn_tile_switch_ncols1<40, 40, 1, false>;
    const run_t d64 = launch_fattn_tile_switch_ncols1<64, 64, 4, false>;

    both ("tile x1", CASE(40, 2, 2, 33, 1, 300, 64, 1), d40);
    both ("tile x4", CASE(64, 1, 4,  5, 2, 511,  1, 2, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, true), d64);
    for (int nb : { 1, 2, 7, 17, 70 }) {
        check("tile x1", CASE(40, 1, 2, nb, 1, 257, 100, 1, GGML_TYPE_F16, GGML_TYPE_F16, true, 8.0f), d40);
        check("tile x1", CASE(40, 1, 2, nb, 2,   0,   0, 1), d40);
        check("tile x4", CASE(64, 1, 4, nb, 1, 512, 257, 3), d64);
        check("tile x4", CASE(64, 1, 4, nb, 1,   0,   0, 1, GGML_TYPE_F16, GGML_TYPE_Q8_0), d64);
    }
}
#elif defined(RUN_MMA)
DECL_FATTN_MMA_F16_CASE( 64,  64, 8, 4);
DECL_FATTN_MMA_F16_CASE(128, 128, 8, 2);
DECL_FATTN_MMA_F16_CASE( 80,  80, 8, 1);

static void run_all() {
    const run_t d64  = ggml_cuda_flash_attn_ext_mma_f16_case< 64,  64, 8, 4>; // two stages where copies are asynchronous
    const run_t d128 = ggml_cuda_flash_attn_ext_mma_f16_case<128, 128, 8, 2>;
    const run_t d80  = ggml_cuda_flash_attn_ext_mma_f16_case< 80,  80, 8, 1>; // a loop of its own, ALiBi

    // few to many processors: one CUDA block does several query tiles, or several share one
    for (int nsm : { 1, 3, 24 }) {
        auto c = CASE(64, 2, 4, 33, 1, 300, 64, 1);
        c.nsm = nsm;
        both("mma 8x4", c, d64);
        c.w = 0;
        check("mma 8x4", c, d64);
        c.type_K = GGML_TYPE_Q8_0; // only one of K and V is converted
        check("mma 8x4", c, d64);
    }
    auto c = CASE(64, 2, 4, 20, 1, 1, 0, 6); // most of the table only pads: more CUDA blocks than live KV tiles
    c.nsm = 24;
    check("mma 8x4", c, d64);
    for (int nb : { 1, 9 }) {
        check("mma 8x4", CASE( 64, 1, 3, nb, 2, 511,   1, 2), d64); // fewer heads than the tile has
        both ("mma 8x2", CASE(128, 1, 2, nb, 2, 511, 257, 2, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, true, 0.0f, 30.0f), d128);
        check("mma 8x2", CASE(128, 1, 2, nb, 1,   0,   0, 1, GGML_TYPE_F16,  GGML_TYPE_F16), d128);
        both ("mma 8x1", CASE( 80, 1, 2, nb, 1, 257, 100, 1, GGML_TYPE_F16,  GGML_TYPE_F16, true, 8.0f), d80);
        check("mma 8x1", CASE( 80, 1, 2, nb, 1,   0,   0, 1, GGML_TYPE_F16,  GGML_TYPE_F32), d80);
    }
}
#endif
