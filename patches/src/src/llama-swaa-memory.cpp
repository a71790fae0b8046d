// KV cache of a context under SWAA (see llama-swaa-memory.h).

#include "llama-swaa-memory.h"

#include "llama-swaa-context.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>

namespace {

constexpr llama_pos POS_MAX = std::numeric_limits<llama_pos>::max();

void normalize(llama_pos & p0, llama_pos & p1) {
    p0 = p0 < 0 ? 0       : p0;
    p1 = p1 < 0 ? POS_MAX : p1;
}

} // namespace

// Up to n_ubatch unused tokens of the batch for whose index `wanted` is true; none if none are left. one_seq: the whole
// batch is of one sequence. A member of upstream's class, declared by 0007-llama-swaa-memory.patch, since only a member
// can mark tokens as used.
llama_ubatch llama_batch_allocr::split_if(
        uint32_t n_ubatch, bool one_seq, const std::function<bool(int32_t)> & wanted) {
    std::vector<int32_t> idxs;

    for (uint32_t i = 0; i < used.size() && idxs.size() < n_ubatch; ++i) {
        if (!used[i] && wanted(i)) {
            used[i] = true;
            ++n_used;
            idxs.push_back(i);
        }
    }

    return idxs.empty() ? llama_ubatch {} : ubatch_add(idxs, one_seq ? 1 : idxs.size(), one_seq);
}

//
// llama_swaa_memory
//

llama_swaa_memory::llama_swaa_memory(
        const llama_model         & model,
        const llama_memory_params & mparams,
        const llama_cparams       & cparams,
        const layer_filter_cb     & filter) :
    params(model.swaa),
    model_hash(llama_swaa_model_hash(model, cparams)),
    n_seq_max(cparams.n_seq_max),
    n_ubatch(cparams.n_ubatch),
    unified(cparams.kv_unified),
    decode_from(n_seq_max, -1) {

    const auto & hparams = model.hparams;

    const uint64_t n_seqs  = unified ? n_seq_max : 1; // in one stream
    const uint64_t n_cells = GGML_PAD(n_seqs*((uint64_t) params.window_size + params.sink_count) + n_ubatch, 256);

    // a window counts positions: where several cells share one, as those of an image do, it needs any number of cells
    has_ring = !mparams.swa_full && cparams.causal_attn && hparams.n_pos_per_embd() == 1 && n_cells < cparams.n_ctx_seq;

    const auto make = [&](uint32_t size, bool ring, const char * name) {
        const layer_filter_cb in_cache = [&, ring](int32_t il) {
            return (!filter || filter(il)) && in_ring(il) == ring;
        };
        return std::make_unique<llama_kv_cache>(
                model, hparams, mparams.type_k, mparams.type_v, !cparams.flash_attn, cparams.offload_kqv, unified,
                size, n_seq_max, 1, 0, LLAMA_SWA_TYPE_NONE, nullptr, in_cache, nullptr, nullptr, name);
    };

    kv_full = make(cparams.n_ctx_seq, false, "");

    bool any_in_ring = false;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        any_in_ring |= in_ring(il) && hparams.has_kv(il) && (!filter || filter(il));
    }
    if (any_in_ring) {
        kv_ring = make(n_cells, true, "ring_");
    }
}

bool llama_swaa_memory::in_ring(uint32_t il) const {
    return has_ring && il < params.sliding.size() && params.sliding[il] && !params.fa_decode[il];
}

bool llama_swaa_memory::is_valid(llama_seq_id seq_id) const {
    if (seq_id >= 0 && (uint32_t) seq_id < n_seq_max) {
        return true;
    }

    llama_swaa_refuse_request(format("sequence %d does not exist; this context has 0 to %u", seq_id, n_seq_max - 1));

    return false;
}

//
// batches
//

llama_memory_context_ptr llama_swaa_memory::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    const auto & batch = balloc.get_batch();

    const auto decodes = [&](int32_t i) {
        return swaa->is_decode(batch.seq_id[i][0], batch.pos[i]);
    };

    bool decode  = false;
    bool prefill = false;
    bool coupled = false; // one token of several sequences
    bool one_seq = true;
    bool hides   = false; // the window hides a key from some token
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        (decodes(i) ? decode : prefill) = true;
        coupled |= batch.n_seq_id[i] > 1;
        one_seq &= batch.seq_id[i][0] == batch.seq_id[0][0];
        hides   |= !params.hides_nothing_from(batch.pos[i]);
    }

    // A token that decodes with full attention makes its whole past live for all tokens of its ubatch, so prompt and
    // decode tokens get separate ubatches; the prompt's come first, since a sequence decodes after them. Sequences with
    // streams of their own must advance together, so theirs stay mixed. While nothing is hidden, ubatches are upstream's,
    // and so are results.
    const bool by_phase =
        swaa->kinds.fa_decode && decode && prefill && hides && !coupled && (unified || one_seq);

    const auto split = [&]() {
        if (!by_phase) {
            return unified ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, 0);
        }
        auto ubatch = balloc.split_if(n_ubatch, !unified, [&](int32_t i) { return !decodes(i); });
        return ubatch.n_tokens > 0 ? ubatch : balloc.split_if(n_ubatch, !unified, decodes);
    };

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = split();
        if (ubatch.n_tokens == 0) {
            break;
        }
        ubatches.push_back(std::move(ubatch));
    }

    if (balloc.get_n_used() == balloc.get_n_tokens()) {
        auto slots = kv_full->prepare(ubatches);
        if (!slots.empty()) {
            return std::make_unique<llama_swaa_memory_context>(
                    llama_kv_cache_context(kv_full.get(), std::move(slots), std::move(ubatches)), *this);
        }
    }

    return std::make_unique<llama_swaa_memory_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr llama_swaa_memory::init_full() {
    return std::make_unique<llama_swaa_memory_context>(
            llama_kv_cache_context(kv_full.get()),
            kv_ring ? std::make_unique<llama_kv_cache_context>(kv_ring.get()) : nullptr);
}

llama_memory_context_ptr llama_swaa_memory::init_update(llama_context * lctx, bool optimize) {
    const auto update_of = [&](llama_kv_cache & kv) {
        const auto mctx = kv.init_update(lctx, optimize);
        return static_cast<const llama_kv_cache_context &>(*mctx);
    };

    return std::make_unique<llama_swaa_memory_context>(
            update_of(*kv_full), kv_ring ? std::make_unique<llama_kv_cache_context>(update_of(*kv_ring)) : nullptr);
}

//
// sequences
//

bool llama_swaa_memory::get_can_shift() const {
    return kv_full->get_can_shift();
}

void llama_swaa_memory::clear(bool data) {
    kv_full->clear(data);
    if (kv_ring) {
        kv_ring->clear(data);
    }
    unchecked.reset();
    set_decode_from(-1, -1);
}

void llama_swaa_memory::set_decode_from(llama_seq_id seq_id, llama_pos pos) {
    if (seq_id == -1) {
        std::fill(decode_from.begin(), decode_from.end(), pos);
    } else {
        decode_from[seq_id] = pos;
    }
}

bool llama_swaa_memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id != -1 && !is_valid(seq_id)) {
        return false;
    }

    normalize(p0, p1);

    std::vector<uint32_t> changed;

    for (uint32_t s = 0; s < n_seq_max; ++s) {
        const llama_pos pos_max = kv_full->seq_pos_max(s);
        if ((seq_id != -1 && (uint32_t) seq_id != s) || pos_max < p0) {
            continue;
        }

        changed.push_back(s);

        // only the removal of the tail changes which token is next
        if (pos_max < p1) {
            const auto & listed = kv_full->get_cells(s).seq_pos_get(s);
            const auto   rest   = listed.lower_bound({ p0, 0 });

            const llama_pos next = rest == listed.begin() ? 0 : std::prev(rest)->first + 1;
            const llama_pos lost = find_missed(s, next, false);
            if (lost >= 0) {
                llama_swaa_set_error(format("sequence %u can't be cut back to position %d: its sliding layers no longer "
                            "hold the key at position %d; %s", s, next, lost, LLAMA_SWAA_EVALUATE_AGAIN));
                return false;
            }
        }
    }

    if (changed.empty()) {
        return true;
    }

    kv_full->seq_rm(seq_id, p0, p1);
    if (kv_ring) {
        kv_ring->seq_rm(seq_id, p0, p1);
    }

    for (const uint32_t s : changed) {
        const llama_pos pos_max = kv_full->seq_pos_max(s);
        if (pos_max < 0) {
            decode_from[s] = -1;
        } else if (pos_max >= p1 && p0 < decode_from[s] && decode_from[s] < p1) {
            decode_from[s] = p0; // the tokens after the gap decode, also if they are moved to its start
        }
    }

    return true;
}

void llama_swaa_memory::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (!is_valid(seq_id_src) || !is_valid(seq_id_dst) || seq_id_src == seq_id_dst) {
        return;
    }

    normalize(p0, p1);

    for (auto * kv : { kv_full.get(), kv_ring.get() }) {
        if (!kv) {
            continue;
        }
        if (kv->get_stream(seq_id_src) == kv->get_stream(seq_id_dst)) {
            kv->seq_cp(seq_id_src, seq_id_dst, p0, p1);
        } else {
            // between streams the whole sequence is copied
            kv->seq_cp(seq_id_src, seq_id_dst, -1, -1);
            kv->seq_rm(seq_id_dst, 0, p0);
            kv->seq_rm(seq_id_dst, p1, -1);
        }
    }

    unchecked.set(seq_id_dst);
    decode_from[seq_id_dst] = decode_from[seq_id_src];
}

void llama_swaa_memory::seq_keep(llama_seq_id seq_id) {
    if (!is_valid(seq_id)) {
        return;
    }

    const llama_pos kept = decode_from[seq_id];
    set_decode_from(-1, -1);
    decode_from[seq_id] = kept;

    for (auto * kv : { kv_full.get(), kv_ring.get() }) {
        if (!kv) {
            continue;
        }
        kv->seq_keep(seq_id);
        for (uint32_t s = 0; s < n_seq_max; ++s) {
            if (kv->get_stream(s) != kv->get_stream(seq_id)) {
                kv->seq_rm(s, -1, -1);
            }
        }
    }
}

bool llama_swaa_memory::has_shared_cells(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto & cells  = kv_full->get_cells(seq_id);
    const auto & listed = cells.seq_pos_get(seq_id);

    for (auto it = listed.lower_bound({ p0, 0 }); it != listed.end() && it->first < p1; ++it) {
        if (cells.seq_count(it->second) > 1) {
            return true;
        }
    }

    return false;
}

void llama_swaa_memory::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (!is_valid(seq_id)) {
        return;
    }

    normalize(p0, p1);

    if (!get_can_shift()) {
        return llama_swaa_refuse_request("this model's keys can't be moved to other positions");
    }
    if (has_shared_cells(seq_id, p0, p1)) {
        return llama_swaa_refuse_request(format("sequence %d shares cells with another one, which would be moved too; "
                    "copy it into a context with kv_unified = false, or evaluate it again", seq_id));
    }
    if ((int64_t) std::min(p1, kv_full->seq_pos_max(seq_id)) + shift >= POS_MAX) {
        return llama_swaa_refuse_request(format("positions of sequence %d moved by %d end past the largest position",
                    seq_id, shift));
    }

    if (p0 <= decode_from[seq_id] && decode_from[seq_id] <= p1) {
        decode_from[seq_id] = (llama_pos) std::clamp<int64_t>((int64_t) decode_from[seq_id] + shift, 0, POS_MAX);
    }

    kv_full->seq_add(seq_id, p0, p1, shift);
    if (kv_ring) {
        kv_ring->seq_add(seq_id, p0, p1, shift);
    }

    unchecked.set(seq_id);
}

void llama_swaa_memory::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (!is_valid(seq_id)) {
        return;
    }

    normalize(p0, p1);

    if (!get_can_shift()) {
        return llama_swaa_refuse_request("this model's keys can't be moved to other positions");
    }
    if (d < 1) {
        return llama_swaa_refuse_request(format("positions can't be divided by %d; give a number from 1", d));
    }
    if (has_shared_cells(seq_id, p0, p1)) {
        return llama_swaa_refuse_request(format("sequence %d shares cells with another one, which would be moved too",
                    seq_id));
    }

    if (p0 <= decode_from[seq_id] && decode_from[seq_id] <= p1) {
        decode_from[seq_id] /= d;
    }

    kv_full->seq_div(seq_id, p0, p1, d);
    if (kv_ring) {
        kv_ring->seq_div(seq_id, p0, p1, d);
    }

    unchecked.set(seq_id);
}

llama_pos llama_swaa_memory::seq_pos_min(llama_seq_id seq_id) const {
    return is_valid(seq_id) ? kv_full->seq_pos_min(seq_id) : -1;
}

llama_pos llama_swaa_memory::seq_pos_max(llama_seq_id seq_id) const {
    return is_valid(seq_id) ? kv_full->seq_pos_max(seq_id) : -1;
}

std::map<ggml_backend_buffer_type_t, size_t> llama_swaa_memory::memory_breakdown() const {
    auto res = kv_full->memory_breakdown();

    if (kv_ring) {
        for (const auto & [buft, size] : kv_ring->memory_breakdown()) {
            res[buft] += size;
        }
    }

    return res;
}

//
// llama_swaa_memory_context
//

llama_swaa_memory_context::llama_swaa_memory_context(llama_memory_status status) : llama_kv_cache_context(status) {}

llama_swaa_memory_context::llama_swaa_memory_context(
        const llama_kv_cache_context & full, std::unique_ptr<llama_kv_cache_context> ring) :
    llama_kv_cache_context(full), ring(std::move(ring)) {}

llama_swaa_memory_context::llama_swaa_memory_context(const llama_kv_cache_context & full, llama_swaa_memory & memory) :
    llama_kv_cache_context(full), memory(&memory) {}

bool llama_swaa_memory_context::apply() {
    if (!llama_kv_cache_context::apply()) {
        return false;
    }

    if (memory && memory->get_ring()) {
        const auto & ubatch = get_ubatch();

        auto slot = memory->place_in_ring(ubatch);
        if (slot.empty()) {
            return false;
        }

        ring = std::make_unique<llama_kv_cache_context>(memory->get_ring(),
                llama_kv_cache::slot_info_vec_t { std::move(slot) }, std::vector<llama_ubatch> { ubatch });
    }

    return !ring || ring->apply();
}

llama_memory_status llama_swaa_memory_context::get_status() const {
    const auto status = llama_kv_cache_context::get_status();

    return ring ? llama_memory_status_combine(status, ring->get_status()) : status;
}
