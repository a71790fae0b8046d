// KV cache of a context under SWAA: a full cache, and a ring for the layers that never look past their window.
//
//     FA layer                        full
//     sliding layer with FA decode    full
//     sliding layer without           ring of S + W cells per sequence and one ubatch, unless swa_full
//
// The full cache keeps the position of every token of every sequence, even if it holds no layer. The ring has lost the
// tokens that the full cache lists and the ring does not: nothing else records this, so nothing can get out of step.
//
// The ring evicts its oldest cells, only when it needs them, and never a sink token or a key that the next token of any
// of its sequences could see. A request that would bring a lost key back into view is refused.

#pragma once

#include "llama-kv-cache.h"

#include <bitset>
#include <memory>

struct llama_swaa_context;
struct llama_swaa_params;

// The advice in errors about a key that the ring has lost.
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

    // Returns false and removes nothing if the rest could not be continued.
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift)             override;
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d)                       override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: only the ring, to rewind further than it reaches back.
    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // of SWAA
    //

    // context: knows which tokens of a batch decode
    void attach(const llama_swaa_context & context) { swaa = &context; }

    bool in_ring(uint32_t il) const;

    uint32_t n_ring_cells() const { return kv_ring ? kv_ring->get_size() : 0; }

    // If the sequence ended before pos, would all the keys be there that its next token sees?
    bool can_continue(llama_seq_id seq_id, llama_pos pos) const;

    // Does the ring hold all tokens of the sequence in [p0, p1)?
    bool holds(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // Returns false, with the last error set, if a sequence of the batch would miss a key. all: it sees its whole past.
    bool check_batch(const llama_batch & batch, bool all);

    // Finds cells of the ring for a ubatch, evicting what no sequence needs. Returns an empty slot without room.
    llama_kv_cache::slot_info place_in_ring(const llama_ubatch & ubatch);

    llama_kv_cache * get_ring() const { return kv_ring.get(); }

    // The decode boundary of a sequence: its tokens from this position on decode; -1: AUTO (llama-swaa.h).
    llama_pos get_decode_from(llama_seq_id seq_id) const { return decode_from[seq_id]; }

    // seq_id: -1 for all sequences
    void set_decode_from(llama_seq_id seq_id, llama_pos pos);

private:
    // The smallest position in [p0, p1) that the ring has lost; -1 if there is none.
    llama_pos find_lost(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // The same among the positions that a token at pos sees. all: it sees its whole past.
    llama_pos find_missed(llama_seq_id seq_id, llama_pos pos, bool all) const;

    // The first position in the window of a token at pos.
    llama_pos window_start(llama_pos pos) const;

    bool is_valid(llama_seq_id seq_id) const;
    bool has_shared_cells(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // Evicts until n_cells are free in the stream of seq_id; false if it can't. ubatch: the next tokens, or nullptr.
    bool make_room(llama_seq_id seq_id, uint32_t n_cells, const llama_ubatch * ubatch);

    // Removes what a saved state leaves out: ring cells of the sequence that are older than window and ubatch.
    void trim_ring(llama_seq_id seq_id) const;

    // Empties a sequence, or everything (-1), even with the invalid positions that a damaged state can bring.
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

    std::vector<llama_pos> decode_from; // [n_seq_max]

    // sequences whose cells were moved, copied or loaded since they were last evaluated
    std::bitset<LLAMA_MAX_SEQ> unchecked;
};

// To upstream this is the full cache's context, which it derives from; the ring's context is beside it.
class llama_swaa_memory_context : public llama_kv_cache_context {
public:
    explicit llama_swaa_memory_context(llama_memory_status status);

    // For reservations and updates: both caches do the same.
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
