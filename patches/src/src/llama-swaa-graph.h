// SWAA in the compute graph: which KV blocks a ubatch needs, the compact masks over them, and the inputs that
// carry both into the attention of the sliding layers.
//
// The rule (one definition for everything here): in a sliding layer the query at position p sees the key at
// position j of its sequence iff
//
//     j <= p  and  ( p - j < W  or  j < S  or  the layer decodes with full attention and the query is a decode token )
//
// A ubatch can need up to three masks besides upstream's full one:
//
//     window   sliding layers, no token sees past the window
//     mixed    sliding layers with FA decode, in a ubatch that mixes prefill and decode tokens
//     causal   FA layers in prefill: only the blocks that not every token sees have a mask, so that it stays
//              small however long the context is
//
// Everything else (FA decode in a ubatch of decode tokens, any layer while the sequence is still shorter than
// window and sinks together, devices that read no table) takes upstream's mask and path unchanged.
//
// Layers in the ring have an attention input of their own, over the ring's cells, that needs the window's mask alone.

#pragma once

#include "llama-cparams.h"

#include "ggml.h"

#include <cstdint>
#include <utility>
#include <vector>

struct llama_hparams;
struct llama_swaa_context;
struct llama_ubatch;

class llama_kv_cache;
class llama_kv_cache_context;
class llm_graph_input_attn_kv;

// The columns that the layers of one kind attend over.
struct llama_swaa_columns {
    uint32_t n_blocks = 0;     // columns / 256; 0: no layer needs them
    uint32_t n_masked = 0;     // of these blocks, the leading ones that have a mask
    bool     table    = false; // false: the columns are the cache's first n_blocks*256 cells

    // [n_stream][n_blocks], masked blocks in ascending order, padding, unmasked blocks; empty at reservation
    std::vector<int32_t>  blocks;
    std::vector<uint32_t> n_live; // [n_stream], masked blocks that are no padding

    bool same_shape(const llama_swaa_columns & other) const {
        return n_blocks == other.n_blocks && n_masked == other.n_masked && table == other.table;
    }
};

// What one ubatch needs. A pure function of cells, ubatch and phases.
struct llama_swaa_plan {
    enum decode_share { NONE, SOME, ALL }; // of the ubatch's tokens that are decode tokens

    bool         active = false; // some token could lose a key to the window
    decode_share decode = NONE;

    uint32_t n_stream = 1;

    llama_swaa_columns window;
    llama_swaa_columns mixed;
    llama_swaa_columns causal;

    static constexpr uint32_t N_SHAPES = 324;

    // Which layers read which input, as a number from 1 below N_SHAPES. Two graphs of one shape may still differ in sizes.
    uint32_t shape() const {
        uint32_t res = 1;
        for (const auto * columns : { &window, &mixed, &causal }) {
            res = 3*res + (columns->n_blocks == 0 ? 0 : columns->table ? 2 : 1);
        }
        return 2*(3*res + decode) + active;
    }

    bool same_graph(const llama_swaa_plan & other) const {
        return active == other.active && decode == other.decode && n_stream == other.n_stream &&
            window.same_shape(other.window) && mixed.same_shape(other.mixed) && causal.same_shape(other.causal);
    }
};

class llama_swaa_input {
public:
    // Plans the ubatch and creates the input tensors it needs. in_ring: mctx is the ring's, and the input its layers'.
    llama_swaa_input(
                        ggml_context  * ctx,
            const llama_cparams       & cparams,
            const llama_ubatch        & ubatch,
            const llama_kv_cache_context * mctx,
                              bool      in_ring);

    // The ring's part of a batch's memory; nullptr without a ring.
    static const llama_kv_cache_context * ring_of(const llama_kv_cache_context * mctx);

    // The part of a batch's memory that this input is about.
    const llama_kv_cache_context * own(const llama_kv_cache_context * mctx) const {
        return in_ring ? ring_of(mctx) : mctx;
    }

    // The attention input of layer il, of these two.
    llm_graph_input_attn_kv * input_of_layer(llm_graph_input_attn_kv * full, int il) const;

    llm_graph_input_attn_kv * ring = nullptr; // set beside an input over the full cache

    // Replaces what the attention of layer il reads: K, V and mask as build_attn has them, and sets the table.
    void apply(
            ggml_context            * ctx,
            const llama_kv_cache_context * mctx,
            int                       il,
            ggml_tensor           * & k,
            ggml_tensor           * & v,
            ggml_tensor           * & kq_mask,
            ggml_tensor           * & kv_blocks) const;

    // Plans the next ubatch; true if the graph built for the last one fits it.
    bool can_reuse(const llama_ubatch & ubatch, const llama_cparams & cparams, const llama_kv_cache_context * mctx);

    void set_input(const llama_ubatch & ubatch, const llama_hparams & hparams, const llama_kv_cache_context * mctx) const;

private:
    struct tensors {
        ggml_tensor * mask   = nullptr; // F16/F32 [n_masked*256, n_tokens/n_stream, 1, n_stream]
        ggml_tensor * blocks = nullptr; // I32     [n_blocks, 1, 1, n_stream], only with a table
    };

    // What a layer attends over, as columns and input tensors; null for upstream's path.
    std::pair<const llama_swaa_columns *, const tensors *> of_layer(int il) const;

    tensors build(ggml_context * ctx, const llama_swaa_columns & columns, ggml_type type, int64_t n_tokens_per_stream, const char * name) const;

    const llama_swaa_context & swaa;

    const bool in_ring;

    llama_swaa_plan plan;

    tensors window;
    tensors mixed;
    tensors causal;
};
