// SWAA settings of a model: read once at load, from the file's `swaa.*` keys, then the overrides.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct llama_model;
struct llama_model_loader;

struct llama_swaa_params {
    bool enabled = false;

    uint32_t window_size = 0;
    uint32_t sink_count  = 0;

    std::vector<bool> sliding;   // [n_layer_all]
    std::vector<bool> fa_decode; // [n_layer_all], true only where the layer slides

    bool any_sliding() const;

    // Full attention sees no more than the window does from a token at this position.
    bool hides_nothing_from(int32_t pos) const {
        return (int64_t) pos < (int64_t) window_size + sink_count;
    }
};

// Fills model.swaa. Throws std::runtime_error naming key, value and limit if a key is wrong, or the reason
// if the architecture can't run under SWAA.
void llama_swaa_params_load(const llama_model_loader & ml, llama_model & model);

// Records the message for llama_swaa_last_error() and throws it.
[[noreturn]] void llama_swaa_refuse(const std::string & message);

void llama_swaa_clear_error();
