// SWAA in the compute graph: the inputs that carry KV block tables and masks into the attention of each layer.
//
// A ubatch can need up to three masks besides upstream's full one (the terms are those of llama-swaa-plan.h):
//
//     window   sliding layers, when no token sees past the window
//     mixed    sliding layers with FA decode, in a ubatch that mixes prompt and decode tokens
//     causal   FA layers in prefill: only the blocks that not every token sees have a mask, so that it stays
//              small however long the context is
//
// Everything else (FA decode in a ubatch of decode tokens, any layer while the sequence is still shorter than
// window and sink tokens together, devices that read no table) takes upstream's mask and path unchanged.
//
// Layers in the ring have an attention input of their own, over the ring's cells, which needs only the window's mask.

#pragma once

#include "llama-cparams.h"
#include "llama-swaa-plan.h"

#include "ggml.h"

#include <cstdint>
#include <utility>

struct llama_hparams;
struct llama_swaa_context;
struct llama_ubatch;

class llama_kv_cache_context;
class llm_graph_input_attn_kv;

class llama_swaa_input {
public:
    // Plans the ubatch and creates the input tensors it needs. in_ring: mctx is the ring's, and the input its layers'.
    llama_swaa_input(
                        ggml_context  * ctx,
            const llama_cparams       & cparams,
            const llama_ubatch        & ubatch,
            const llama_kv_cache_context * mctx,
                              bool      in_ring);

    // The ring's context within that of a batch; nullptr without a ring.
    static const llama_kv_cache_context * ring_of(const llama_kv_cache_context * mctx);

    // The context of this input's cache within that of a batch.
    const llama_kv_cache_context * own(const llama_kv_cache_context * mctx) const {
        return in_ring ? ring_of(mctx) : mctx;
    }

    // The attention input of layer il: the full cache's or the ring's.
    llm_graph_input_attn_kv * input_of_layer(llm_graph_input_attn_kv * full, int il) const;

    llm_graph_input_attn_kv * ring = nullptr; // the ring's input, beside an input over the full cache

    // Replaces K, V and mask of layer il, as build_attn has them, and sets the table.
    void apply(
            ggml_context            * ctx,
            const llama_kv_cache_context * mctx,
            int                       il,
            ggml_tensor           * & k,
            ggml_tensor           * & v,
            ggml_tensor           * & kq_mask,
            ggml_tensor           * & kv_blocks) const;

    // Plans the next ubatch. Returns whether the graph built for the last one fits it.
    bool can_reuse(const llama_ubatch & ubatch, const llama_cparams & cparams, const llama_kv_cache_context * mctx);

    void set_input(
            const llama_ubatch & ubatch, const llama_hparams & hparams, const llama_kv_cache_context * mctx) const;

private:
    struct tensors {
        ggml_tensor * mask   = nullptr; // F16/F32 [n_masked*256, n_tps, 1, n_stream]; n_tps: tokens per stream
        ggml_tensor * blocks = nullptr; // I32     [n_blocks, 1, 1, n_stream], only with a table
    };

    llama_swaa_view make_view(
            const llama_ubatch & ubatch, const llama_kv_cache_context * mctx, uint32_t n_stream) const;

    llama_swaa_plan make_plan(
            const llama_ubatch & ubatch, const llama_cparams & cparams, const llama_kv_cache_context * mctx) const;

    // The columns and input tensors of a layer; null for upstream's path.
    std::pair<const llama_swaa_columns *, const tensors *> of_layer(int il) const;

    tensors build(
            ggml_context             * ctx,
            const llama_swaa_columns & columns,
            ggml_type                  type,
            int64_t                    n_tps,
            const char               * name) const;

    const llama_swaa_context & swaa;

    const bool in_ring;

    llama_swaa_plan plan;

    tensors window;
    tensors mixed;
    tensors causal;
};
