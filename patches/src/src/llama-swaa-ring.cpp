// The ring of llama_swaa_memory: what it has lost, and which cells it evicts next (see llama-swaa-memory.h).

#include "llama-swaa-memory.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-swaa-params.h"

#include <algorithm>
#include <limits>

//
// what the ring has lost
//

llama_pos llama_swaa_memory::window_start(llama_pos pos) const {
    return (llama_pos) std::max<int64_t>(0, (int64_t) pos - params.window_size + 1);
}

llama_pos llama_swaa_memory::find_lost(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    if (!kv_ring) {
        return -1;
    }

    const auto & listed = kv_full->get_cells(seq_id).seq_pos_get(seq_id);
    const auto & held   = kv_ring->get_cells(seq_id).seq_pos_get(seq_id);

    auto it = held.lower_bound({ p0, 0 });
    for (auto cur = listed.lower_bound({ p0, 0 }); cur != listed.end() && cur->first < p1; ++cur) {
        if (it == held.end() || it->first != cur->first) {
            return cur->first;
        }
        ++it;
    }

    return -1;
}

llama_pos llama_swaa_memory::find_missed(llama_seq_id seq_id, llama_pos pos, bool all) const {
    const llama_pos start = all ? 0 : window_start(pos);
    const llama_pos sinks = (llama_pos) std::min<int64_t>(params.sink_count, start);

    const llama_pos lost = find_lost(seq_id, 0, sinks);

    return lost >= 0 ? lost : find_lost(seq_id, start, pos);
}

bool llama_swaa_memory::can_continue(llama_seq_id seq_id, llama_pos pos) const {
    return seq_id >= 0 && (uint32_t) seq_id < n_seq_max && find_missed(seq_id, pos, false) < 0;
}

bool llama_swaa_memory::holds(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    return seq_id >= 0 && (uint32_t) seq_id < n_seq_max && find_lost(seq_id, p0, p1) < 0;
}

bool llama_swaa_memory::check_batch(const llama_batch & batch, bool all) {
    if (!kv_ring || (unchecked.none() && !all)) {
        return true;
    }

    std::vector<llama_pos> first(n_seq_max, std::numeric_limits<llama_pos>::max());

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t s = 0; s < batch.n_seq_id[i]; ++s) {
            auto & pos = first[batch.seq_id[i][s]];
            pos = std::min(pos, batch.pos[i]);
        }
    }

    for (uint32_t s = 0; s < n_seq_max; ++s) {
        if (first[s] == std::numeric_limits<llama_pos>::max() || (!unchecked.test(s) && !all)) {
            continue;
        }

        const llama_pos lost = find_missed(s, first[s], all);
        if (lost >= 0) {
            llama_swaa_refuse_request(format("sequence %u can't continue at position %d: its sliding layers no longer hold "
                        "the key at position %d; %s", s, first[s], lost, LLAMA_SWAA_EVALUATE_AGAIN));
            return false;
        }

        unchecked.reset(s);
    }

    return true;
}

//
// cells of the ring
//

bool llama_swaa_memory::make_room(llama_seq_id seq_id, uint32_t n_cells, const llama_ubatch * ubatch) {
    const auto & cells = kv_ring->get_cells(seq_id);

    const uint32_t stream = kv_ring->get_stream(seq_id);

    // for each sequence, the first position that may still be seen
    std::vector<llama_pos> needed(n_seq_max, -1);

    for (uint32_t s = 0; s < n_seq_max; ++s) {
        if (kv_ring->get_stream(s) == stream) {
            needed[s] = cells.seq_pos_max(s) + 1;
        }
    }
    if (ubatch) {
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            for (int32_t s = 0; s < ubatch->n_seq_id[i]; ++s) {
                auto & pos = needed[ubatch->seq_id[i][s]];
                pos = std::min(pos, ubatch->pos[i]);
            }
        }
    }
    for (auto & pos : needed) {
        pos = pos < 0 ? -1 : window_start(pos);
    }

    const std::pair<llama_pos, uint32_t> after_sinks { (llama_pos) params.sink_count, 0 };

    while (cells.size() - cells.get_used() < n_cells) {
        // evict from the sequence whose oldest cell is furthest out of its window
        llama_seq_id best    = -1;
        llama_pos    n_spare = 0;

        for (uint32_t s = 0; s < n_seq_max; ++s) {
            const auto & held   = cells.seq_pos_get(s);
            const auto   oldest = held.lower_bound(after_sinks);
            if (oldest != held.end() && needed[s] - oldest->first > n_spare) {
                best    = s;
                n_spare = needed[s] - oldest->first;
            }
        }

        if (best < 0) {
            return false;
        }

        const auto & held = cells.seq_pos_get(best);

        const auto first = held.lower_bound(after_sinks);

        auto last = first;
        for (uint32_t n = n_cells - (cells.size() - cells.get_used()); n > 1; --n) {
            const auto next = std::next(last);
            if (next == held.end() || next->first >= needed[best]) {
                break;
            }
            last = next;
        }

        kv_ring->seq_rm(best, first->first, last->first + 1);
    }

    return true;
}

llama_kv_cache::slot_info llama_swaa_memory::place_in_ring(const llama_ubatch & ubatch) {
    const uint32_t n_streams = unified ? 1 : ubatch.n_seqs_unq;

    for (uint32_t s = 0; s < n_streams; ++s) {
        if (!make_room(ubatch.seq_id_unq[s], ubatch.n_tokens/n_streams, &ubatch)) {
            llama_swaa_refuse_request(format("the ring of %u cells has no room for %u tokens: several tokens of a "
                        "sequence share positions", kv_ring->get_size(), ubatch.n_tokens));
            return {};
        }
    }

    return kv_ring->find_slot(ubatch, false);
}

void llama_swaa_memory::trim_ring(llama_seq_id seq_id) const {
    const int64_t end = (int64_t) kv_ring->seq_pos_max(seq_id) + 1 - params.window_size - n_ubatch;

    if (end > params.sink_count) {
        kv_ring->seq_rm(seq_id, params.sink_count, (llama_pos) end);
    }
}
