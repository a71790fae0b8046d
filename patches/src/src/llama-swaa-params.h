// SWAA settings of a model, read when it is loaded: from the file's `swaa.*` keys, then the overrides.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct llama_cparams;
struct llama_model;
struct llama_model_loader;

struct llama_swaa_params {
    bool enabled = false;

    uint32_t window_size = 0;
    uint32_t sink_count  = 0;
    uint32_t tail_count  = 0; // reported to callers, which know where a prompt ends

    std::vector<bool> sliding;   // [n_layer_all]
    std::vector<bool> fa_decode; // [n_layer_all], true only where the layer slides

    uint64_t file_hash = 0; // of the model: its shape and a sample of its weights

    bool any_sliding() const;

    // Hash of the settings in effect; 0 if nothing slides.
    uint64_t hash() const;

    // A token at this position sees its whole past through window and sink tokens.
    bool hides_nothing_from(int32_t pos) const {
        return (int64_t) pos < (int64_t) window_size + sink_count;
    }
};

// Fills model.swaa. Throws std::runtime_error naming key, value and limit if a key is wrong, or the reason
// if the architecture can't run under SWAA.
void llama_swaa_params_load(const llama_model_loader & ml, llama_model & model);

// Hash of what K and V depend on besides SWAA: the model and the encoding of positions.
uint64_t llama_swaa_model_hash(const llama_model & model, const llama_cparams & cparams);

// Records the message for llama_swaa_last_error().
void llama_swaa_set_error(const std::string & message);

// Records the message and throws it.
[[noreturn]] void llama_swaa_refuse(const std::string & message);

// Records and logs the message, for requests that return no result in llama.h; the request changes nothing.
void llama_swaa_refuse_request(const std::string & message);

void llama_swaa_clear_error();
