// The KV plan of a ubatch (see llama-swaa-plan.h).

#include "llama-swaa-plan.h"

#include "llama-batch.h"
#include "llama-kv-cells.h"

#include <algorithm>
#include <limits>

namespace {

using sight = llama_swaa_sight;

constexpr int64_t BLOCK = GGML_KV_BLOCK_SIZE;

// Tables longer than usual grow in this step, so that a graph outlives small changes.
constexpr uint32_t N_BLOCKS_STEP = 4;

constexpr llama_pos POS_MAX = std::numeric_limits<llama_pos>::max();

// The tokens of one sequence in one stream of the ubatch.
struct span {
    llama_seq_id seq_id;

    llama_pos pos_min  = POS_MAX;
    llama_pos pos_max  = -1;
    llama_pos pos_from = POS_MAX; // smallest over the tokens that see only window and sink tokens
    bool      sees_all = false;   // some token sees its whole past
};

// The live blocks of one stream.
struct live_blocks {
    std::vector<int32_t> masked;
    std::vector<int32_t> unmasked;
};

uint32_t div_up(int64_t n, int64_t d) {
    return (n + d - 1)/d;
}

bool shares_stream(const llama_swaa_view & view) {
    return view.n_stream == 1 && view.ubatch.n_seqs_unq > 1;
}

std::vector<span> find_spans(const llama_swaa_view & view, uint32_t stream, sight kind) {
    std::vector<span> res;

    const uint32_t n_tps = view.n_tokens_per_stream();

    for (uint32_t i = stream*n_tps; i < (stream + 1)*n_tps; ++i) {
        const llama_seq_id seq_id = view.ubatch.seq_id[i][0];
        const llama_pos    pos    = view.ubatch.pos[i];

        auto it = std::find_if(res.begin(), res.end(), [&](const span & s) { return s.seq_id == seq_id; });
        if (it == res.end()) {
            it = res.insert(res.end(), span { seq_id });
        }

        it->pos_min = std::min(it->pos_min, pos);
        it->pos_max = std::max(it->pos_max, pos);
        if (view.sees_all(i, kind)) {
            it->sees_all = true;
        } else {
            it->pos_from = std::min(it->pos_from, pos);
        }
    }

    return res;
}

// Does some token see this cell?
bool is_live(
        const llama_kv_cells & cells, uint32_t i, const std::vector<span> & spans, const llama_swaa_params & params) {
    if (cells.is_empty(i)) {
        return false;
    }

    const llama_pos pos = cells.pos_get(i);

    return std::any_of(spans.begin(), spans.end(), [&](const span & s) {
        return pos <= s.pos_max && cells.seq_has(i, s.seq_id) &&
            (s.sees_all || (int64_t) pos > (int64_t) s.pos_from - params.window_size ||
             (uint32_t) pos < params.sink_count);
    });
}

// Is this cell in the past of every token? Then every token of a causal layer sees it.
bool is_past_of_all(const llama_kv_cells & cells, uint32_t i, const std::vector<span> & spans) {
    return !cells.is_empty(i) && std::all_of(spans.begin(), spans.end(), [&](const span & s) {
        return cells.seq_has(i, s.seq_id) && cells.pos_get(i) < s.pos_min;
    });
}

// All blocks of a window have a mask. A causal layer needs one only where some token sees a cell and another does not,
// which is usually in the blocks of the ubatch itself.
live_blocks find_live(const llama_swaa_view & view, uint32_t stream, sight kind) {
    live_blocks res;

    const auto & cells = *view.cells[stream];
    const auto   spans = find_spans(view, stream, kind);

    for (uint32_t b = 0; b < view.n_kv/BLOCK; ++b) {
        bool live = false;
        bool past = kind == sight::CAUSAL;
        for (uint32_t i = b*BLOCK; i < (b + 1)*BLOCK && (past || !live); ++i) {
            past = past && is_past_of_all(cells, i, spans);
            live = live || is_live(cells, i, spans, view.params);
        }
        if (live) {
            (past ? res.unmasked : res.masked).push_back(b);
        }
    }

    return res;
}

// All streams list as many unmasked blocks as the stream that has fewest: in the others the newest take a mask.
uint32_t level_unmasked(std::vector<live_blocks> & streams) {
    size_t n_unmasked = streams[0].unmasked.size();
    for (const auto & s : streams) {
        n_unmasked = std::min(n_unmasked, s.unmasked.size());
    }

    for (auto & s : streams) {
        s.masked.insert(s.masked.begin(), s.unmasked.begin() + n_unmasked, s.unmasked.end());
        s.unmasked.resize(n_unmasked);
    }

    return n_unmasked;
}

// Masked blocks of a window of which n_live are live. At least as many as sequences without gaps can need: the sink
// tokens of each, and a window that starts anywhere in a block.
uint32_t n_window_masked(const llama_swaa_view & view, uint32_t n_live) {
    const int64_t n_seqs   = view.n_stream == 1 ? view.ubatch.n_seqs_unq : 1; // in a stream
    const int64_t n_sink   = div_up(view.params.sink_count, BLOCK);
    const int64_t n_window = div_up((int64_t) view.params.window_size - 1, BLOCK) + 1;
    const int64_t n_usual  = n_seqs*(n_sink + n_window) + div_up(view.n_tokens_per_stream(), BLOCK);

    const uint32_t capacity = std::min<int64_t>(n_usual, std::numeric_limits<int32_t>::max());

    return n_live <= capacity ? capacity : GGML_PAD(n_live, N_BLOCKS_STEP);
}

// The same for an FA layer: the tokens of the ubatch start and end anywhere in a block.
uint32_t n_causal_masked(const llama_swaa_view & view, uint32_t n_live) {
    return std::max(n_live, div_up((int64_t) view.n_tokens_per_stream() - 1, BLOCK) + 1);
}

// At reservation: the shape of sequences without gaps that takes most memory.
void reserve_causal(const llama_swaa_view & view, uint32_t & n_masked, uint32_t & n_unmasked) {
    const uint32_t n_kv_blocks = view.n_kv/BLOCK;

    if (view.has_ring) {
        // while the window hides nothing, both caches take upstream's mask
        n_masked = std::max<uint32_t>(n_masked, std::min<uint64_t>(view.n_kv,
                    (uint64_t) view.params.window_size + view.params.sink_count + BLOCK - 1)/BLOCK);
    }

    // sequences that share a stream see little in common: reserve upstream's mask
    n_unmasked = shares_stream(view) || n_masked >= n_kv_blocks ? 0 : n_kv_blocks - n_masked;
}

// A mask over the cache's first cells, without a table.
llama_swaa_columns whole_width(const llama_swaa_view & view) {
    llama_swaa_columns res;

    res.n_blocks = view.n_kv/BLOCK;
    res.n_masked = view.n_kv/BLOCK;

    return res;
}

// Where a table would leave nothing out, a sliding layer gets a mask over the whole width; an FA layer gets no columns
// and takes upstream's mask.
llama_swaa_columns find_columns(const llama_swaa_view & view, sight kind) {
    if (view.dense) {
        return whole_width(view);
    }

    llama_swaa_columns res;

    const bool     reserve     = view.cells.empty();
    const uint32_t n_kv_blocks = view.n_kv/BLOCK;

    std::vector<live_blocks> streams;
    for (uint32_t s = 0; s < view.cells.size(); ++s) {
        streams.push_back(find_live(view, s, kind));
    }

    uint32_t n_unmasked = reserve ? 0 : level_unmasked(streams);
    uint32_t n_live     = 0;
    for (const auto & s : streams) {
        res.n_live.push_back(s.masked.size());
        n_live = std::max<uint32_t>(n_live, s.masked.size());
    }

    if (kind == sight::CAUSAL) {
        res.n_masked = n_causal_masked(view, n_live);
        if (reserve) {
            reserve_causal(view, res.n_masked, n_unmasked);
        }
        if (n_unmasked == 0 || res.n_masked >= n_kv_blocks) {
            return {};
        }
    } else {
        res.n_masked = n_window_masked(view, n_live);
        if (res.n_masked >= n_kv_blocks) {
            return whole_width(view);
        }
    }

    res.n_blocks = res.n_masked + n_unmasked;
    res.table    = true;
    for (auto & s : streams) {
        s.masked.resize(res.n_masked, 0);
        res.blocks.insert(res.blocks.end(), s.masked.begin(),   s.masked.end());
        res.blocks.insert(res.blocks.end(), s.unmasked.begin(), s.unmasked.end());
    }

    return res;
}

} // namespace

uint32_t llama_swaa_view::n_tokens_per_stream() const {
    return ubatch.n_tokens/n_stream;
}

llama_swaa_plan llama_swaa_make_plan(const llama_swaa_view & view) {
    llama_swaa_plan res;

    const bool reserve = view.cells.empty();

    res.n_stream = view.n_stream;
    res.active   = reserve;

    uint32_t n_decode = 0;
    for (uint32_t i = 0; i < view.ubatch.n_tokens; ++i) {
        n_decode   += view.is_decode[i];
        res.active |= !reserve && !view.params.hides_nothing_from(view.ubatch.pos[i]);
    }

    res.decode = n_decode == 0 ? llama_swaa_plan::NONE :
        n_decode == view.ubatch.n_tokens ? llama_swaa_plan::ALL : llama_swaa_plan::SOME;

    if (!res.active) {
        return res;
    }

    if (view.kinds.swa_decode || (view.kinds.fa_decode && res.decode == llama_swaa_plan::NONE)) {
        res.window = find_columns(view, sight::WINDOW);
    }

    if (view.kinds.fa_decode && res.decode == llama_swaa_plan::SOME) {
        res.mixed = find_columns(view, sight::MIXED);
    }

    if (view.kinds.causal_table && !view.dense && res.decode != llama_swaa_plan::ALL && !view.ubatch.is_pos_2d()) {
        res.causal = find_columns(view, sight::CAUSAL);
    }

    return res;
}
