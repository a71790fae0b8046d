// One flash attention through llama.cpp's own host code for Metal, with the emulator instead of the GPU.
//
// Why: grid, arguments, scratch buffers, function constants and the choice of kernels come from ggml-metal-ops.cpp and
// ggml-metal-device.cpp, compiled unchanged; only their Objective-C functions are replaced here. Two things are stricter
// than on a Mac: kernels between two memory barriers run in reverse order, and all scratch starts as NaN.
//
// Use: emu_attention(&c), through ctypes (attention.py).

#include "ggml-metal.cpp" // for its static functions: size of an allocation, get_proc_address

#include "emulator.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

//
// replacements for ggml-metal-device.m and -context.m
//

struct ggml_metal_cv { std::map<int, int> values; };

ggml_metal_cv_t ggml_metal_cv_init(void)               { return new ggml_metal_cv; }
void ggml_metal_cv_free(ggml_metal_cv_t cv)            { delete cv; }
void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t value, int32_t idx) { cv->values[idx] = value; }
void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t idx) { cv->values[idx] = value; }
void ggml_metal_cv_set_bool (ggml_metal_cv_t cv, bool    value, int32_t idx) { cv->values[idx] = value; }

struct ggml_metal_pipeline {
    std::string name;
    void (*     kernel)();
    std::map<int, int> constants;
};

struct ggml_metal_library { std::map<std::string, ggml_metal_pipeline> pipelines; };

static ggml_metal_library g_library;
static std::string        g_log; // names of the pipelines that ran, one per line

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params res = {};
    const auto it = lib->pipelines.find(name);
    res.pipeline = it == lib->pipelines.end() ? nullptr : &it->second;
    return res;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base, const char * name, ggml_metal_cv_t cv) {
    const auto it = emu::kernels().find(base);
    if (it == emu::kernels().end()) {
        emu::fail("kernel %s is not among those that were compiled", base);
    }
    lib->pipelines[name] = { name, it->second, cv ? cv->values : std::map<int, int>() };
    return ggml_metal_library_get_pipeline(lib, name);
}

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return emu::MAX_THREADS; }
void ggml_metal_pipeline_free(ggml_metal_pipeline_t) {}

static ggml_metal_device_props g_props;

const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t) { return &g_props; }
ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t)          { return &g_library; }
bool ggml_metal_device_supports_op(ggml_metal_device_t, const ggml_tensor *)     { return true; }
bool ggml_metal_fusion_info_enabled(const ggml_metal_fusion_info *)              { return false; }

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const ggml_tensor * t) { return { t->data, 0 }; }

struct dispatch {
    ggml_metal_pipeline_t pipeline;
    emu::launch           launch;
    char *                buffers[emu::MAX_BUFFERS];
    std::vector<char>     bytes[emu::MAX_BUFFERS];
};

struct ggml_metal_encoder {
    dispatch              next = {};
    std::vector<dispatch> queue;

    void run_queue() {
        for (size_t i = queue.size(); i-- > 0; ) {
            dispatch & d = queue[i];
            for (int b = 0; b < emu::MAX_BUFFERS; ++b) {
                emu::buffers[b] = d.bytes[b].empty() ? d.buffers[b] : d.bytes[b].data();
            }
            std::fill(std::begin(emu::fc_set), std::end(emu::fc_set), false);
            for (const auto & [idx, value] : d.pipeline->constants) {
                emu::fc_value[idx] = value;
                emu::fc_set  [idx] = true;
            }
            g_log += d.pipeline->name + "\n";
            emu::run(d.launch);
        }
        queue.clear();
    }
};

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool) { return new ggml_metal_encoder; }
void ggml_metal_encoder_free(ggml_metal_encoder_t enc)                   { delete enc; }
void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t enc)           { enc->run_queue(); }
void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t enc)         { enc->run_queue(); }

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t enc, ggml_metal_pipeline_with_params pipeline) {
    enc->next.pipeline      = pipeline.pipeline;
    enc->next.launch.kernel = pipeline.pipeline->kernel;
    enc->next.launch.memory = 0;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t enc, void * data, size_t size, int idx) {
    enc->next.bytes[idx].assign((char *) data, (char *) data + size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t enc, ggml_metal_buffer_id buffer, int idx) {
    if (buffer.offs % 4 != 0) {
        emu::fail("buffer %d starts at an offset of %zu bytes", idx, buffer.offs);
    }
    enc->next.bytes[idx].clear();
    enc->next.buffers[idx] = (char *) buffer.metal + buffer.offs;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t enc, size_t size, int) { enc->next.launch.memory = size; }

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t enc, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    const uint32_t grid[6] = { (uint32_t) tg0, (uint32_t) tg1, (uint32_t) tg2, (uint32_t) tptg0, (uint32_t) tptg1, (uint32_t) tptg2 };
    std::copy(grid,     grid + 3, enc->next.launch.threadgroups);
    std::copy(grid + 3, grid + 6, enc->next.launch.threads);
    enc->queue.push_back(enc->next);
}

//
// one attention
//

// As test-kv-blocks.h lays it out; attention.py has the same struct.
struct attention {
    int32_t type_k, type_v;
    int64_t dk, dv;
    int64_t n_head_kv, gqa;   // KV heads, query heads per KV head
    int64_t kv, n_q, n_stream;
    int64_t mask_cols;        // 0: no mask
    int64_t n_blocks;         // 0: no table
    int64_t n_kv_max;         // hint of sparsity, 0: none
    float   scale, max_bias, softcap;
    int32_t vec_q, vec_ne;    // 0: as in the tuning table
    int32_t reverse_simdgroups;

    void * q;     // f32 [n_stream][heads][n_q][dk]
    void * k;     // [n_stream][kv][n_head_kv][dk]
    void * v;     // [n_stream][kv][n_head_kv][dv]
    void * mask;  // f16 [n_stream][n_q][mask_cols]
    void * table; // i32 [n_stream][n_blocks]
    void * sinks; // f32 [heads] or null
    void * out;   // f32 [n_stream][n_q][heads][dv]
};

API void emu_attention(const attention * c) {
    g_log.clear();
    g_props.max_theadgroup_memory_size = 32768;
    emu::reverse_simdgroups = c->reverse_simdgroups;

    if (c->vec_q) {
        ggml_metal_tuning::fa_vec_set_override({ (int8_t) c->vec_q, (int8_t) c->vec_ne });
    } else {
        ggml_metal_tuning::fa_vec_clear_override();
    }

    ggml_init_params params = { 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*no_alloc =*/ true };
    ggml_context * ctx = ggml_init(params);

    ggml_backend_buffer_type buffer_type = {};
    buffer_type.iface.get_alloc_size = ggml_backend_metal_buffer_type_get_alloc_size;
    ggml_backend_buffer buffer = {};
    buffer.buft = &buffer_type;
    const auto tensor = [&](ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, void * data) {
        ggml_tensor * t = ggml_new_tensor_4d(ctx, type, ne0, ne1, ne2, ne3);
        t->data   = data;
        t->buffer = &buffer;
        return t;
    };
    const auto cache = [&](int32_t type, int64_t d, void * data) {
        ggml_tensor * t = tensor((ggml_type) type, d, c->n_head_kv, c->kv, c->n_stream, data);
        return ggml_permute(ctx, t, 0, 2, 1, 3);
    };

    const int64_t n_head = c->n_head_kv*c->gqa;
    ggml_tensor * q  = tensor(GGML_TYPE_F32, c->dk, c->n_q, n_head, c->n_stream, c->q);
    ggml_tensor * m  = c->mask_cols ? tensor(GGML_TYPE_F16, c->mask_cols, c->n_q, 1, c->n_stream, c->mask) : nullptr;
    ggml_tensor * op = ggml_flash_attn_ext(ctx, q, cache(c->type_k, c->dk, c->k), cache(c->type_v, c->dv, c->v), m, c->scale, c->max_bias, c->softcap);
    op->op_params[4] = c->n_kv_max;
    if (c->sinks) {
        op->src[4] = tensor(GGML_TYPE_F32, n_head, 1, 1, 1, c->sinks);
    }
    if (c->n_blocks) {
        op->src[5] = tensor(GGML_TYPE_I32, c->n_blocks, 1, 1, c->n_stream, c->table);
    }
    op->flags |= GGML_TENSOR_FLAG_COMPUTE;

    // result, scratch, and a guard of 4096 bytes
    const size_t size = ggml_backend_metal_buffer_type_get_alloc_size(&buffer_type, op);
    std::unique_ptr<char, void (*)(void *)> memory((char *) aligned_alloc(256, GGML_PAD(size + 4096, 256)), free);
    memset(memory.get(), 0xff, size + 4096);
    op->data   = memory.get();
    op->buffer = &buffer;

    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, op);

    ggml_metal_op_t run = ggml_metal_op_init(nullptr, nullptr, gf, nullptr, 0, ggml_graph_n_nodes(gf), /*use_concurrency =*/ true, false, 0);
    for (int i = 0; i < ggml_metal_op_n_nodes(run); ) {
        i += ggml_metal_op_encode(run, i);
    }
    ggml_metal_op_free(run);

    for (size_t i = 0; i < 4096; ++i) {
        if (memory.get()[size + i] != (char) 0xff) {
            emu::fail("written %zu bytes past the scratch of the op", i);
        }
    }
    memcpy(c->out, op->data, ggml_nbytes(op));
    ggml_free(ctx);
}

API const char * emu_log() { return g_log.c_str(); }

// Whether the backend reports that its kernels read a table; -1: it has no such function.
API int emu_supports_kv_blocks() {
    const auto supports = (bool (*)(const ggml_tensor *)) ggml_backend_metal_get_proc_address(nullptr, "ggml_backend_supports_kv_blocks");
    ggml_tensor op = {};
    op.op = GGML_OP_FLASH_ATTN_EXT;
    return supports ? supports(&op) : -1;
}

API int64_t emu_row_size(int32_t type, int64_t n) { return ggml_row_size((ggml_type) type, n); }

API void emu_from_float(int32_t type, const float * src, void * dst, int64_t n_rows, int64_t n) {
    ggml_quantize_chunk((ggml_type) type, src, dst, 0, n_rows, n, nullptr);
}

API void emu_to_float(int32_t type, const void * src, float * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
    } else {
        ggml_get_type_traits((ggml_type) type)->to_float(src, dst, n);
    }
}
