// SWAA state of a llama_context: the policy of each layer, and which tokens of the batch are decode tokens.

#pragma once

#include "llama-swaa.h"

#include "llama-cparams.h"
#include "llama-swaa-params.h"
#include "llama-swaa-plan.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <bitset>
#include <memory>
#include <vector>

struct llama_batch;
struct llama_memory_i;
struct llama_model;

class llama_swaa_memory;

struct llama_swaa_context {
    // Chooses the policy of every sliding layer. Returns nullptr if SWAA is off for the model or no layer slides.
    // Throws std::runtime_error if SWAA does not support the memory, or a device does not support the forced policy.
    static std::unique_ptr<llama_swaa_context> create(
            const llama_model   & model,
            const llama_cparams & cparams,
                 llama_memory_i * memory,
                  ggml_type       type_k,
                  ggml_type       type_v);

    // Throws if the graph just built does not use the attention input that SWAA hooks into.
    void check_attached(const llama_model & model) const;

    // Finds the sequences with one token in the batch before it is split into ubatches. Returns false, with the last
    // error set, if a sequence would miss a key that it must see.
    bool begin_batch(const llama_batch & batch, const llama_cparams & cparams);

    // Is the token of this sequence at this position a decode token, or one of the tail?
    bool is_decode(llama_seq_id seq_id, llama_pos pos) const;

    bool is_dense(const llama_cparams & cparams) const {
        return forced_dense || !cparams.flash_attn;
    }

    // The weakest policy in use.
    llama_swaa_policy policy(const llama_cparams & cparams) const;

    const llama_swaa_params params;

    llama_swaa_memory & memory;

    llama_swaa_layer_kinds kinds; // in the full cache

    std::vector<bool> layer_reads_table; // [n_layer_all]; false: policy copy, or upstream's path in an FA layer

    bool attached = false; // a graph input of ours was built

    // Our graphs differ in which layers read which input, and so in how long each input lives. ggml's allocator keeps a
    // layout of memory while counts and sizes fit, which would let a temporary overwrite an input that is still needed.
    uint32_t graph_wiring    = 0; // of the graph built last
    uint32_t reserved_wiring = 0; // of the graph that memory was last laid out for; 0: unknown

    // Returns whether memory must be laid out for the graph just built, and assumes that the caller does so.
    bool needs_reserve() {
        const bool res = reserved_wiring != graph_wiring;
        reserved_wiring = graph_wiring;
        return res;
    }

private:
    llama_swaa_context(const llama_swaa_params & params, llama_swaa_memory & memory);

    bool forced_dense = false;

    std::bitset<LLAMA_MAX_SEQ> alone; // sequences with one token in the batch
};
