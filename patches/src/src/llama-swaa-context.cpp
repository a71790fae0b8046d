// SWAA state of a llama_context, and the C interface (see llama-swaa-context.h, llama-swaa.h).

#include "llama-swaa-context.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"
#include "llama-swaa-memory.h"

#include "ggml-cpp.h"
#include "ggml-kv-blocks.h"

#include <algorithm>
#include <array>
#include <atomic>

static std::atomic<int32_t> swaa_default_policy { LLAMA_SWAA_POLICY_AUTO };

// Does the device support the layer's attention with a KV block table of two blocks, n_masked of them under a mask?
static bool swaa_device_reads_table(
        ggml_backend_dev_t    dev,
        const llama_hparams & hparams,
        uint32_t              il,
        int64_t               n_masked,
        ggml_type             type_k,
        ggml_type             type_v) {
    const ggml_init_params ctx_params = {
        /*.mem_size   =*/ 16*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(ctx_params) };

    const int64_t n_tokens = 32;
    const int64_t n_cells  = 2*GGML_KV_BLOCK_SIZE;

    // flash attention casts an F32 cache
    type_k = type_k == GGML_TYPE_F32 ? GGML_TYPE_F16 : type_k;
    type_v = type_v == GGML_TYPE_F32 ? GGML_TYPE_F16 : type_v;

    const int64_t dk = hparams.n_embd_head_k(il);
    const int64_t dv = hparams.n_embd_head_v(il);

    ggml_tensor * q = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, dk, n_tokens, hparams.n_head(il),    1);
    ggml_tensor * k = ggml_new_tensor_4d(ctx.get(), type_k,        dk, n_cells,  hparams.n_head_kv(il), 1);
    ggml_tensor * v = ggml_new_tensor_4d(ctx.get(), type_v,        dv, n_cells,  hparams.n_head_kv(il), 1);
    ggml_tensor * m = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, n_masked*GGML_KV_BLOCK_SIZE, n_tokens, 1, 1);
    ggml_tensor * t = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_I32, 2, 1, 1, 1);

    ggml_tensor * op = ggml_flash_attn_ext(ctx.get(), q, k, v, m, 1.0f, hparams.f_max_alibi_bias,
            hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f);
    ggml_flash_attn_ext_set_kv_blocks(op, t);
    ggml_prec_set_acc(op, GGML_PREC_F32);

    return ggml_backend_dev_supports_op(dev, op);
}

llama_swaa_context::llama_swaa_context(const llama_swaa_params & params, llama_swaa_memory & memory) :
    params(params), memory(memory), layer_reads_table(params.sliding.size(), false) {
    for (size_t il = 0; il < params.sliding.size(); ++il) {
        kinds.fa_decode  |= params.sliding[il] &&  params.fa_decode[il];
        kinds.swa_decode |= params.sliding[il] && !params.fa_decode[il] && !memory.in_ring(il);
    }
}

std::unique_ptr<llama_swaa_context> llama_swaa_context::create(
        const llama_model   & model,
        const llama_cparams & cparams,
             llama_memory_i * memory,
              ggml_type       type_k,
              ggml_type       type_v) {
    llama_swaa_clear_error();

    if (!model.swaa.any_sliding()) {
        return nullptr;
    }

    // create_memory() makes ours wherever it would make a plain KV cache
    auto * swaa_memory = dynamic_cast<llama_swaa_memory *>(memory);
    if (swaa_memory == nullptr) {
        llama_swaa_refuse(format("SWAA can't be applied to architecture '%s': its memory is not a plain KV cache; "
                    "load it with swaa.enabled=false", model.arch_name().c_str()));
    }

    std::unique_ptr<llama_swaa_context> res(new llama_swaa_context(model.swaa, *swaa_memory));

    swaa_memory->attach(*res);

    const int32_t forced = swaa_default_policy;

    if (forced == LLAMA_SWAA_POLICY_DENSE) {
        res->forced_dense = true;
        return res;
    }

    if (!cparams.flash_attn) {
        if (forced != LLAMA_SWAA_POLICY_AUTO) {
            llama_swaa_refuse(format("SWAA policy '%s' needs flash attention; turn it on, or use policy 'dense'",
                        forced == LLAMA_SWAA_POLICY_TABLE ? "table" : "copy"));
        }
        return res;
    }

    ggml_backend_dev_t dev_cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);

    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        if (!model.hparams.has_kv(il)) {
            continue;
        }

        ggml_backend_dev_t dev = cparams.offload_kqv ? model.dev_layer(il) : dev_cpu;

        const bool sliding     = res->params.sliding[il];
        const bool reads_table = forced != LLAMA_SWAA_POLICY_COPY &&
            swaa_device_reads_table(dev, model.hparams, il, sliding ? 2 : 1, type_k, type_v);

        res->layer_reads_table[il] = reads_table;

        if (!sliding) {
            // ALiBi's bias is part of the mask, which unmasked columns lack
            res->kinds.causal_table |= reads_table && !model.hparams.use_alibi;
        } else if (forced == LLAMA_SWAA_POLICY_TABLE && !reads_table) {
            llama_swaa_refuse(format("SWAA policy 'table' is not available: flash attention on %s (layer %u) does not read "
                        "KV block tables; use policy 'copy' or 'dense'", ggml_backend_dev_name(dev), il));
        }
    }

    return res;
}

void llama_swaa_context::check_attached(const llama_model & model) const {
    if (!attached) {
        llama_swaa_refuse(format("SWAA can't be applied to architecture '%s': its graph does not use the plain "
                    "attention input; load it with swaa.enabled=false", model.arch_name().c_str()));
    }
}

bool llama_swaa_context::begin_batch(const llama_batch & batch, const llama_cparams & cparams) {
    llama_swaa_clear_error();

    std::array<int32_t, LLAMA_MAX_SEQ> n_tokens {};

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t s = 0; s < batch.n_seq_id[i]; ++s) {
            n_tokens[batch.seq_id[i][s]]++;
        }
    }

    for (size_t s = 0; s < n_tokens.size(); ++s) {
        alone.set(s, n_tokens[s] == 1);
    }

    // without causal attention there is no window either
    return memory.check_batch(batch, !cparams.causal_attn);
}

bool llama_swaa_context::is_decode(llama_seq_id seq_id, llama_pos pos) const {
    const llama_pos from = memory.get_decode_from(seq_id);

    return from < 0 ? alone.test(seq_id) : pos >= from;
}

llama_swaa_policy llama_swaa_context::policy(const llama_cparams & cparams) const {
    if (is_dense(cparams)) {
        return LLAMA_SWAA_POLICY_DENSE;
    }

    for (size_t il = 0; il < params.sliding.size(); ++il) {
        if (params.sliding[il] && !layer_reads_table[il]) {
            return LLAMA_SWAA_POLICY_COPY;
        }
    }

    return LLAMA_SWAA_POLICY_TABLE;
}

//
// C interface
//

uint32_t llama_swaa_abi_version(void) {
    return LLAMA_SWAA_ABI_VERSION;
}

bool llama_swaa_model_config(
        const llama_model       * model,
              llama_swaa_config * config,
              uint8_t           * sliding,
              uint8_t           * fa_decode,
              uint32_t            n) {
    const auto & params = model->swaa;

    config->enabled     = params.enabled;
    config->window_size = params.window_size;
    config->sink_count  = params.sink_count;
    config->n_layer     = params.sliding.size();
    config->tail_count  = params.tail_count;

    for (uint32_t il = 0; il < std::min(n, config->n_layer); ++il) {
        if (sliding) {
            sliding[il] = params.sliding[il];
        }
        if (fa_decode) {
            fa_decode[il] = params.fa_decode[il];
        }
    }

    return params.enabled;
}

int32_t llama_swaa_set_decode_from(llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    const auto & cparams = ctx->get_cparams();

    if (seq_id < -1 || seq_id >= (int64_t) cparams.n_seq_max || pos < -1) {
        return -1;
    }

    if (cparams.swaa) {
        cparams.swaa->memory.set_decode_from(seq_id, pos);
    }

    return 0;
}

int32_t llama_swaa_get_policy(const llama_context * ctx) {
    const auto & cparams = ctx->get_cparams();

    return cparams.swaa ? cparams.swaa->policy(cparams) : LLAMA_SWAA_POLICY_AUTO;
}

uint64_t llama_swaa_fingerprint(const llama_context * ctx) {
    const auto & model = ctx->get_model();

    return llama_swaa_model_hash(model, ctx->get_cparams()) ^ model.swaa.hash();
}

bool llama_swaa_can_continue(const llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    const auto * swaa = ctx->get_cparams().swaa;

    return swaa ? swaa->memory.can_continue(seq_id, pos) : true;
}

bool llama_swaa_holds(const llama_context * ctx, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const auto * swaa = ctx->get_cparams().swaa;

    return swaa ? swaa->memory.holds(seq_id, p0, p1) : true;
}

uint64_t llama_swaa_kv_bytes(const llama_context * ctx) {
    uint64_t res = 0;

    if (const auto * memory = ctx->get_memory()) {
        for (const auto & [buft, size] : memory->memory_breakdown()) {
            res += size;
        }
    }

    return res;
}

uint32_t llama_swaa_ring_cells(const llama_context * ctx) {
    const auto * swaa = ctx->get_cparams().swaa;

    return swaa ? swaa->memory.n_ring_cells() : 0;
}

int32_t llama_swaa_set_default_policy(int32_t policy) {
    if (policy < LLAMA_SWAA_POLICY_AUTO || policy > LLAMA_SWAA_POLICY_DENSE) {
        return -1;
    }

    swaa_default_policy = policy;

    return 0;
}
