// Saved states of llama_swaa_memory: each names the model and settings it belongs to, and is loaded whole or not at all
// (see llama-swaa-memory.h).

#include "llama-swaa-memory.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-swaa-params.h"
#include "llama-swaa.h"

#include <algorithm>
#include <stdexcept>

namespace {

// "SWAA", in front of the part that upstream writes
constexpr uint32_t STATE_MAGIC   = 0x41415753;
constexpr uint32_t STATE_VERSION = 1;

template<typename T> void write(llama_io_write_i & io, T value) {
    io.write(&value, sizeof(value));
}

template<typename T> T read(llama_io_read_i & io) {
    T res;
    io.read(&res, sizeof(res));
    return res;
}

} // namespace

void llama_swaa_memory::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (seq_id != -1 && !is_valid(seq_id)) {
        throw std::runtime_error(llama_swaa_last_error());
    }

    write(io, STATE_MAGIC);
    write(io, STATE_VERSION);
    write(io, model_hash);
    write(io, params.hash());
    write(io, n_ring_cells());

    if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
        kv_full->state_write(io, seq_id, flags);
    }

    if (kv_ring) {
        if (seq_id != -1) {
            // so that it fits beside the windows of other sequences
            trim_ring(seq_id);
        }
        kv_ring->state_write(io, seq_id, flags);
    }
}

void llama_swaa_memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    llama_swaa_clear_error();

    if (seq_id != -1 && !is_valid(seq_id)) {
        throw std::runtime_error(llama_swaa_last_error());
    }

    const auto refuse = [](const char * what) {
        llama_swaa_refuse(format("the state was saved %s; evaluate the prompt again, or load a state of this model and "
                    "recipe", what));
    };

    if (read<uint32_t>(io) != STATE_MAGIC) {
        refuse("without SWAA");
    }
    if (read<uint32_t>(io) != STATE_VERSION) {
        refuse("by another version");
    }
    if (read<uint64_t>(io) != model_hash) {
        refuse("with another model");
    }
    if (read<uint64_t>(io) != params.hash()) {
        refuse("under other SWAA settings");
    }

    const uint32_t n_saved = read<uint32_t>(io);
    if (n_saved == 0 && kv_ring) {
        refuse("in a context without a ring (swa_full, or a short n_ctx)");
    }
    if (n_saved > 0 && !kv_ring) {
        refuse("in a context with a ring (without swa_full, and a long n_ctx)");
    }
    if (n_saved > n_ring_cells() && seq_id == -1) {
        refuse("in a context with a larger ring (n_ubatch, n_seq_max)");
    }

    const bool partial = flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;

    try {
        if (!partial) {
            kv_full->state_read(io, seq_id, flags);
        }

        if (kv_ring) {
            if (seq_id != -1) {
                kv_ring->seq_rm(seq_id, -1, -1);
                make_room(seq_id, (uint32_t) std::min<uint64_t>(kv_ring->get_size(),
                            (uint64_t) params.window_size + params.sink_count + n_ubatch), nullptr);
            }

            kv_ring->state_read(io, seq_id, flags);

            if (partial && seq_id != -1) {
                kv_ring->seq_rm(seq_id, kv_full->seq_pos_max(seq_id) + 1, -1);
            }
        }

        check_positions();
    } catch (const std::exception & err) {
        // half a state must not be used
        forget(seq_id);
        llama_swaa_refuse(format("the state is damaged or does not fit this context (%s); evaluate the prompt again",
                    err.what()));
    }

    if (seq_id == -1) {
        unchecked.set();
    } else {
        unchecked.set(seq_id);
    }
    if (!partial) {
        set_decode_from(seq_id, -1);
    }
}

void llama_swaa_memory::forget(llama_seq_id seq_id) {
    set_decode_from(seq_id, -1);

    for (auto * kv : { kv_full.get(), kv_ring.get() }) {
        if (!kv) {
            continue;
        }

        kv->state_clear(seq_id);

        if (seq_id != -1) {
            // seq_rm would take a negative position, which a damaged state can bring, as "from the start"
            auto & cells = kv->v_cells[kv->get_stream(seq_id)];
            for (uint32_t i = 0; i < cells.size(); ++i) {
                if (cells.seq_has(i, seq_id)) {
                    cells.seq_rm(i, seq_id);
                }
            }
        }
    }
}

void llama_swaa_memory::check_positions() const {
    for (uint32_t s = 0; s < n_seq_max; ++s) {
        for (const auto * kv : { kv_full.get(), kv_ring.get() }) {
            if (kv) {
                const auto & held = kv->get_cells(s).seq_pos_get(s);
                if (!held.empty() && held.begin()->first < 0) {
                    throw std::runtime_error("a position is negative");
                }
            }
        }
    }
}
