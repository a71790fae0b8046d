// KV cache of a context under SWAA: a full cache, and a ring for the layers that never look past their window.
//
//     FA layer                        full
//     sliding layer with FA decode    full
//     sliding layer without           ring of S + W cells per sequence and one ubatch, unless swa_full
//
// The full cache keeps the position of every token of every sequence, also when it holds no layer. What the ring has
// lost is what the full cache lists and the ring does not: no other state says so, so nothing can go out of step.
//
// The ring gives up its oldest cells, only when it needs them, and never a sink or a key that the next token of any
// of its sequences could see. A request that would bring a lost key back into view is refused.

#pragma once

#include "llama-kv-cache.h"

#include <bitset>
#include <memory>

struct llama_swaa_context;
struct llama_swaa_params;

// What helps where a ring has lost a key.
inline constexpr const char * LLAMA_SWAA_EVALUATE_AGAIN = "remove the whole sequence and evaluate it again";

class llama_swaa_memory : public llama_memory_i {
public:
    // filter: the layers that the model keeps K and V of; nullptr for all
    llama_swaa_memory(
            const llama_model         & model,
            const llama_memory_params & params,
            const llama_cparams       & cparams,
            const layer_filter_cb     & filter);

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    // False, and nothing is removed, if the rest could not be continued.
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: the ring alone, to rewind further than it reaches back.
    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // of SWAA
    //

    // The phases of the batch that comes next are asked of it.
    void attach(const llama_swaa_context & context) { swaa = &context; }

    bool in_ring(uint32_t il) const;

    uint32_t n_ring_cells() const { return kv_ring ? kv_ring->get_size() : 0; }

    // If the sequence ended before pos, would its next token find all the keys it sees?
    bool can_continue(llama_seq_id seq_id, llama_pos pos) const;

    // Does the ring hold all tokens of the sequence from p0 on and before p1?
    bool holds(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // False, with the last error set, if a sequence of the batch would miss a key. all: it sees its whole past.
    bool check_batch(const llama_batch & batch, bool all);

    // Finds cells of the ring for a ubatch, evicting what no sequence needs. Empty if there are none.
    llama_kv_cache::slot_info place_in_ring(const llama_ubatch & ubatch);

    llama_kv_cache * get_ring() const { return kv_ring.get(); }

private:
    // The least position from p0 on and before p1 that the ring has lost; -1 if there is none.
    llama_pos find_lost(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // The same of those that a token at pos sees. all: it sees its whole past.
    llama_pos find_missed(llama_seq_id seq_id, llama_pos pos, bool all) const;

    // The first position that a token at pos sees by the window.
    llama_pos window_start(llama_pos pos) const;

    bool is_valid(llama_seq_id seq_id) const;
    bool has_shared_cells(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // Evicts until n_cells are free in the stream of seq_id. ubatch: the tokens that come next, or nullptr.
    bool make_room(llama_seq_id seq_id, uint32_t n_cells, const llama_ubatch * ubatch);

    // Removes what a state does not carry: ring cells of the sequence that are older than window and ubatch.
    void trim_ring(llama_seq_id seq_id) const;

    // Empties a sequence, or everything (-1), whatever a damaged state has put there.
    void forget(llama_seq_id seq_id);

    void check_positions() const;

    const llama_swaa_params & params;

    const uint64_t model_hash;
    const uint32_t n_seq_max;
    const uint32_t n_ubatch;
    const bool     unified;

    bool has_ring = false;

    std::unique_ptr<llama_kv_cache> kv_full;
    std::unique_ptr<llama_kv_cache> kv_ring; // null if no layer is in a ring

    const llama_swaa_context * swaa = nullptr;

    // sequences whose cells were moved, copied or loaded since they were last evaluated
    std::bitset<LLAMA_MAX_SEQ> unchecked;
};

// Upstream takes it for the full cache's context, which it is; the ring's comes beside it.
class llama_swaa_memory_context : public llama_kv_cache_context {
public:
    explicit llama_swaa_memory_context(llama_memory_status status);

    // For reservation and updates: both caches do the same.
    llama_swaa_memory_context(const llama_kv_cache_context & full, std::unique_ptr<llama_kv_cache_context> ring);

    // For a batch. The ring's cells are found ubatch by ubatch, since one ubatch makes room for the next.
    llama_swaa_memory_context(const llama_kv_cache_context & full, llama_swaa_memory & memory);

    bool apply() override;

    llama_memory_status get_status() const override;

    // Null if no layer is in a ring; valid until the next apply().
    const llama_kv_cache_context * get_ring() const { return ring.get(); }

private:
    llama_swaa_memory * memory = nullptr; // null unless for a batch

    std::unique_ptr<llama_kv_cache_context> ring;
};
