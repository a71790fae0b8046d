// SWAA (Sliding Window Attention Adaptation, arXiv 2512.10411) for llama.cpp: the C interface.
//
// A model whose metadata has the `swaa.*` keys (or that is loaded with them as kv_overrides) runs some of its layers
// with a sliding window, sink tokens, and optionally full attention in decode. Nothing else changes:
// llama_model_load_from_file, llama_init_from_model and llama_decode work as before. These functions report the
// settings in effect and set where the tokens of a sequence begin to decode.
//
// As in llama.h, a context must not be used by two threads at the same time.

#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// Raised when a function here changes its meaning; bindings check it when they load the library.
#define LLAMA_SWAA_ABI_VERSION 3

// How sliding layers skip the keys that the window hides.
enum llama_swaa_policy {
    LLAMA_SWAA_POLICY_AUTO  = 0, // the best that each device supports
    LLAMA_SWAA_POLICY_TABLE = 1, // kernels that read a KV block table
    LLAMA_SWAA_POLICY_COPY  = 2, // gather the live blocks, then the stock flash attention kernel
    LLAMA_SWAA_POLICY_DENSE = 3, // a mask over the whole cache; the only one without flash attention
};

struct llama_swaa_config {
    uint32_t enabled;     // 1 if the model runs under SWAA
    uint32_t window_size; // tokens, the current one included
    uint32_t sink_count;  // first tokens that stay visible
    uint32_t n_layer;     // entries in the per-layer arrays
    uint32_t tail_count;  // last tokens of a prompt that decode; the caller applies it with llama_swaa_set_decode_from
};

LLAMA_API uint32_t llama_swaa_abi_version(void);

// Why SWAA refused the last model load, context creation, batch, state or sequence request on this thread; "" if it did
// not.
LLAMA_API const char * llama_swaa_last_error(void);

// The configuration in effect: the file's keys, then the overrides. Returns false if SWAA is off.
//   sliding, fa_decode   [n] or NULL: 1 where the layer slides / slides and decodes with full attention;
//                        the first min(n, n_layer) entries are written
LLAMA_API bool llama_swaa_model_config(
        const struct llama_model       * model,
              struct llama_swaa_config * config,
                             uint8_t   * sliding,
                             uint8_t   * fa_decode,
                             uint32_t    n);

// Sets the decode boundary of a sequence: in later llama_decode calls its tokens at positions >= pos decode, those before
// are prompt. For a prompt that ends before position n, n - tail_count is right; tokens under verification, such as
// drafted ones, lie behind it.
//   seq_id   -1: all sequences
//   pos      -1: AUTO, the default: a sequence with one token in the batch decodes, one with more does not
// The boundary follows the tokens: llama_memory_seq_add moves it, llama_memory_seq_cp copies it. A sequence that loses all
// its tokens, or is loaded from a state, returns to AUTO.
// Returns 0, or -1 if the sequence or the position can't exist.
LLAMA_API int32_t llama_swaa_set_decode_from(struct llama_context * ctx, llama_seq_id seq_id, llama_pos pos);

// The policy in use: the weakest over the layers; 0 if SWAA is off in this context.
LLAMA_API int32_t llama_swaa_get_policy(const struct llama_context * ctx);

// Equal in contexts with the same model, SWAA settings and position encoding: K and V of one are valid in the other.
LLAMA_API uint64_t llama_swaa_fingerprint(const struct llama_context * ctx);

// If the sequence were cut back so that its next token had position pos, would all the keys be there that this token
// must see? If not, llama_memory_seq_rm refuses to cut there.
LLAMA_API bool llama_swaa_can_continue(const struct llama_context * ctx, llama_seq_id seq_id, llama_pos pos);

// Do all layers hold K and V of the sequence's tokens at positions [p0, p1)? Only such tokens may be moved.
LLAMA_API bool llama_swaa_holds(const struct llama_context * ctx, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

// Bytes allocated for K and V.
LLAMA_API uint64_t llama_swaa_kv_bytes(const struct llama_context * ctx);

// Cells of the ring, per stream; 0 if no layer is in a ring.
LLAMA_API uint32_t llama_swaa_ring_cells(const struct llama_context * ctx);

// The policy for contexts made later in this process. Returns 0, or -1 for an unknown policy.
LLAMA_API int32_t llama_swaa_set_default_policy(int32_t policy);

#ifdef __cplusplus
}
#endif
