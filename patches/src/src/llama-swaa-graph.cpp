// SWAA in the compute graph (see llama-swaa-graph.h).

#include "llama-swaa-graph.h"

#include "llama-swaa-context.h"
#include "llama-swaa-memory.h"

#include "llama-batch.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include "ggml-kv-blocks.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

constexpr int64_t BLOCK = GGML_KV_BLOCK_SIZE;

// Lengths past the capacity grow in this step, so that a graph outlives small changes.
constexpr uint32_t N_BLOCKS_STEP = 4;

// Which tokens see their whole past.
enum class sight { WINDOW, MIXED, CAUSAL }; // none, decode tokens, all

// The tokens of one sequence in one stream of the ubatch.
struct span {
    llama_seq_id seq_id;

    llama_pos pos_min  = std::numeric_limits<llama_pos>::max();
    llama_pos pos_max  = -1;
    llama_pos pos_from = std::numeric_limits<llama_pos>::max(); // smallest over the tokens that see only window and sinks
    bool      sees_all = false;                                 // some token sees its whole past
};

uint32_t n_streams(const llama_ubatch & ubatch, const llama_cparams & cparams) {
    return cparams.kv_unified ? 1 : ubatch.n_seqs_unq;
}

uint32_t div_up(int64_t n, int64_t d) {
    return (n + d - 1)/d;
}

// Blocks that contiguous sequences can need: the sinks of each, and a window that starts anywhere in a block.
uint32_t capacity(const llama_swaa_params & params, uint32_t n_tokens_per_stream, uint32_t n_seqs_per_stream) {
    const int64_t n_sinks  = div_up(params.sink_count, BLOCK);
    const int64_t n_window = div_up((int64_t) params.window_size - 1, BLOCK) + 1;

    const int64_t res = n_seqs_per_stream*(n_sinks + n_window) + div_up(n_tokens_per_stream, BLOCK);

    return std::min<int64_t>(res, std::numeric_limits<int32_t>::max());
}

// Blocks of an FA layer that contiguous sequences mask: the tokens of the ubatch start and end anywhere in one.
uint32_t n_causal_masked(uint32_t n_tokens_per_stream) {
    return div_up((int64_t) n_tokens_per_stream - 1, BLOCK) + 1;
}

// A mask over the cache's first cells, without a table.
llama_swaa_columns whole_width(uint32_t n_blocks) {
    llama_swaa_columns res;

    res.n_blocks = n_blocks;
    res.n_masked = n_blocks;

    return res;
}

bool sees_all(const llama_swaa_context & swaa, sight kind, llama_seq_id seq_id) {
    return kind == sight::CAUSAL || (kind == sight::MIXED && swaa.is_decode(seq_id));
}

std::vector<span> find_spans(const llama_swaa_context & swaa, const llama_ubatch & ubatch, uint32_t i0, uint32_t i1, sight kind) {
    std::vector<span> res;

    for (uint32_t i = i0; i < i1; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];

        auto it = std::find_if(res.begin(), res.end(), [&](const span & s) { return s.seq_id == seq_id; });
        if (it == res.end()) {
            it = res.insert(res.end(), span { seq_id });
        }

        it->pos_min = std::min(it->pos_min, ubatch.pos[i]);
        it->pos_max = std::max(it->pos_max, ubatch.pos[i]);
        if (sees_all(swaa, kind, seq_id)) {
            it->sees_all = true;
        } else {
            it->pos_from = std::min(it->pos_from, ubatch.pos[i]);
        }
    }

    return res;
}

bool is_live(const llama_kv_cells & cells, uint32_t i, const std::vector<span> & spans, const llama_swaa_params & params) {
    if (cells.is_empty(i)) {
        return false;
    }

    const llama_pos pos = cells.pos_get(i);

    for (const auto & s : spans) {
        if (pos <= s.pos_max && cells.seq_has(i, s.seq_id) &&
                (s.sees_all || (int64_t) pos > (int64_t) s.pos_from - params.window_size || (uint32_t) pos < params.sink_count)) {
            return true;
        }
    }

    return false;
}

// Does every token see this cell, given that all see their whole past?
bool is_past_of_all(const llama_kv_cells & cells, uint32_t i, const std::vector<span> & spans) {
    return !cells.is_empty(i) && std::all_of(spans.begin(), spans.end(), [&](const span & s) {
        return cells.seq_has(i, s.seq_id) && cells.pos_get(i) < s.pos_min;
    });
}

// The columns of FA layers in prefill. They need a mask over the blocks that some token sees and another does not:
// those of the ubatch itself, as a rule. None if that leaves nothing out, as when sequences share a stream.
llama_swaa_columns find_causal_columns(
        const llama_swaa_context & swaa,
        const llama_ubatch       & ubatch,
        const llama_kv_cache     & kv,
        uint32_t                   n_stream,
        uint32_t                   n_kv) {
    llama_swaa_columns res;

    const uint32_t n_tps = ubatch.n_tokens/n_stream;

    std::vector<std::vector<int32_t>> masked(n_stream);
    std::vector<std::vector<int32_t>> unmasked(n_stream);

    for (uint32_t s = 0; s < n_stream; ++s) {
        const auto & cells = kv.get_cells(ubatch.seq_id[s*n_tps][0]);
        const auto   spans = find_spans(swaa, ubatch, s*n_tps, (s + 1)*n_tps, sight::CAUSAL);

        for (uint32_t b = 0; b < n_kv/BLOCK; ++b) {
            bool live = false;
            bool past = true;
            for (uint32_t i = b*BLOCK; i < (b + 1)*BLOCK && (past || !live); ++i) {
                past = past && is_past_of_all(cells, i, spans);
                live = live || is_live(cells, i, spans, swaa.params);
            }
            if (past) {
                unmasked[s].push_back(b);
            } else if (live) {
                masked[s].push_back(b);
            }
        }
    }

    // all streams have the same number of unmasked blocks: the newest of the longer ones take a mask
    size_t n_unmasked = unmasked[0].size();
    for (const auto & blocks : unmasked) {
        n_unmasked = std::min(n_unmasked, blocks.size());
    }

    for (uint32_t s = 0; s < n_stream; ++s) {
        masked[s].insert(masked[s].begin(), unmasked[s].begin() + n_unmasked, unmasked[s].end());
        unmasked[s].resize(n_unmasked);

        res.n_live.push_back(masked[s].size());
        res.n_masked = std::max<uint32_t>(res.n_masked, masked[s].size());
    }

    res.n_masked = std::max(res.n_masked, n_causal_masked(n_tps));
    res.n_blocks = res.n_masked + n_unmasked;

    if (n_unmasked == 0 || res.n_masked >= n_kv/BLOCK) {
        return {};
    }

    res.table = true;
    for (uint32_t s = 0; s < n_stream; ++s) {
        masked[s].resize(res.n_masked, 0);
        res.blocks.insert(res.blocks.end(), masked[s].begin(),   masked[s].end());
        res.blocks.insert(res.blocks.end(), unmasked[s].begin(), unmasked[s].end());
    }

    return res;
}

llama_swaa_columns find_columns(
        const llama_swaa_context & swaa,
        const llama_ubatch       & ubatch,
        const llama_kv_cache     & kv,
        uint32_t                   n_stream,
        uint32_t                   n_kv,
        bool                       dense,
        sight                      kind) {
    llama_swaa_columns res;

    const uint32_t n_kv_blocks = n_kv/BLOCK;
    const uint32_t n_tps       = ubatch.n_tokens/n_stream;

    if (dense) {
        return whole_width(n_kv_blocks);
    }

    std::vector<std::vector<int32_t>> live(n_stream);

    for (uint32_t s = 0; s < n_stream; ++s) {
        const auto & cells = kv.get_cells(ubatch.seq_id[s*n_tps][0]);
        const auto   spans = find_spans(swaa, ubatch, s*n_tps, (s + 1)*n_tps, kind);

        for (uint32_t b = 0; b < n_kv_blocks; ++b) {
            for (uint32_t i = b*BLOCK; i < (b + 1)*BLOCK; ++i) {
                if (is_live(cells, i, spans, swaa.params)) {
                    live[s].push_back(b);
                    break;
                }
            }
        }

        res.n_live.push_back(live[s].size());
    }

    const uint32_t n_live_max = *std::max_element(res.n_live.begin(), res.n_live.end());
    const uint32_t n_capacity = capacity(swaa.params, n_tps, n_stream == 1 ? ubatch.n_seqs_unq : 1);

    res.n_blocks = n_live_max <= n_capacity ? n_capacity : GGML_PAD(n_live_max, N_BLOCKS_STEP);
    res.n_masked = res.n_blocks;

    if (res.n_blocks >= n_kv_blocks) {
        return whole_width(n_kv_blocks);
    }

    res.table = true;
    for (auto & blocks : live) {
        blocks.resize(res.n_blocks, 0);
        res.blocks.insert(res.blocks.end(), blocks.begin(), blocks.end());
    }

    return res;
}

// Before there are cells: the widest that contiguous sequences need.
llama_swaa_columns reserve_columns(const llama_swaa_context & swaa, const llama_ubatch & ubatch, uint32_t n_stream, uint32_t n_kv, bool dense) {
    llama_swaa_columns res;

    const uint32_t n_capacity = capacity(swaa.params, ubatch.n_tokens/n_stream, n_stream == 1 ? ubatch.n_seqs_unq : 1);

    if (dense || n_capacity >= n_kv/BLOCK) {
        return whole_width(n_kv/BLOCK);
    }

    res.n_blocks = n_capacity;
    res.n_masked = n_capacity;
    res.table    = true;

    return res;
}

llama_swaa_columns reserve_causal_columns(const llama_swaa_context & swaa, const llama_ubatch & ubatch, uint32_t n_stream, uint32_t n_kv) {
    llama_swaa_columns res;

    uint32_t n_masked = n_causal_masked(ubatch.n_tokens/n_stream);

    if (swaa.memory.n_ring_cells() > 0) {
        // as long as the window hides nothing, both caches take upstream's mask
        n_masked = std::max<uint32_t>(n_masked, std::min<uint64_t>(n_kv,
                    (uint64_t) swaa.params.window_size + swaa.params.sink_count + BLOCK - 1)/BLOCK);
    }

    // sequences that share a stream see little in common: reserve upstream's mask
    if (n_masked < n_kv/BLOCK && (n_stream > 1 || ubatch.n_seqs_unq == 1)) {
        res.n_blocks = n_kv/BLOCK;
        res.n_masked = n_masked;
        res.table    = true;
    }

    return res;
}

llama_swaa_plan make_plan(
        const llama_swaa_context     & swaa,
        const llama_cparams          & cparams,
        const llama_ubatch           & ubatch,
        const llama_kv_cache_context * mctx,
        bool                           in_ring) {
    llama_swaa_plan res;

    res.n_stream = n_streams(ubatch, cparams);

    if (!cparams.causal_attn || cparams.training) {
        return res;
    }

    const bool reserve = mctx->is_reserve();
    const bool dense   = swaa.is_dense(cparams);

    uint32_t n_decode = 0;

    if (reserve) {
        // one token per sequence is decode, more is prefill
        n_decode   = ubatch.n_tokens == ubatch.n_seqs_unq ? ubatch.n_tokens : 0;
        res.active = true;
    } else {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            n_decode   += swaa.is_decode(ubatch.seq_id[i][0]);
            res.active |= !swaa.params.hides_nothing_from(ubatch.pos[i]);
        }
    }

    if (in_ring) {
        // its layers see the window in either phase
        n_decode = 0;
    }

    res.decode = n_decode == 0 ? llama_swaa_plan::NONE : n_decode == ubatch.n_tokens ? llama_swaa_plan::ALL : llama_swaa_plan::SOME;

    if (!res.active) {
        return res;
    }

    if (in_ring || swaa.any_swa_decode || (swaa.any_fa_decode && res.decode == llama_swaa_plan::NONE)) {
        res.window = reserve ?
            reserve_columns(swaa, ubatch, res.n_stream, mctx->get_n_kv(), dense) :
            find_columns   (swaa, ubatch, mctx->get_kv(), res.n_stream, mctx->get_n_kv(), dense, sight::WINDOW);
    }

    if (swaa.any_fa_decode && res.decode == llama_swaa_plan::SOME) {
        res.mixed = find_columns(swaa, ubatch, mctx->get_kv(), res.n_stream, mctx->get_n_kv(), dense, sight::MIXED);
    }

    if (swaa.any_causal_table && !in_ring && !dense && res.decode != llama_swaa_plan::ALL && !ubatch.is_pos_2d()) {
        res.causal = reserve ?
            reserve_causal_columns(swaa, ubatch, res.n_stream, mctx->get_n_kv()) :
            find_causal_columns   (swaa, ubatch, mctx->get_kv(), res.n_stream, mctx->get_n_kv());
    }

    return res;
}

//
// masks
//

template<typename T> T mask_value(float x);

template<> float       mask_value<float>      (float x) { return x; }
template<> ggml_fp16_t mask_value<ggml_fp16_t>(float x) { return ggml_fp32_to_fp16(x); }

// Position behind every column, for one sequence; INT32_MAX where the column shows nothing of it.
struct column_positions {
    llama_seq_id           seq_id;
    std::vector<llama_pos> pos;
};

template<typename T>
void fill_mask(
        T                        * data,
        const llama_swaa_columns & columns,
        const llama_swaa_context & swaa,
        const llama_ubatch       & ubatch,
        const llama_hparams      & hparams,
        const llama_kv_cache     & kv,
        uint32_t                   n_stream,
        sight                      kind) {
    const int64_t n_cols = columns.n_masked*BLOCK;
    const int64_t n_tps  = ubatch.n_tokens/n_stream;
    const bool    is_2d  = ubatch.is_pos_2d();

    const llama_pos none = std::numeric_limits<llama_pos>::max();

    // in this arithmetic all of W, S and positions fit: p - j < W as p - j <= W - 1
    const llama_pos w = (llama_pos) (swaa.params.window_size - 1);
    const llama_pos s = (llama_pos) swaa.params.sink_count;

    const T keep = mask_value<T>(0.0f);
    const T drop = mask_value<T>(-INFINITY);

    for (uint32_t is = 0; is < n_stream; ++is) {
        const auto & cells = kv.get_cells(ubatch.seq_id[is*n_tps][0]);

        const int64_t n_live = columns.table ? columns.n_live[is]*BLOCK : n_cols;

        const int32_t * blocks = columns.table ? columns.blocks.data() + is*columns.n_blocks : nullptr;

        std::vector<column_positions> known;

        for (int64_t it = 0; it < n_tps; ++it) {
            const int64_t      i      = is*n_tps + it;
            const llama_seq_id seq_id = ubatch.seq_id[i][0];
            const llama_pos    p      = ubatch.pos[i];
            const bool         all    = sees_all(swaa, kind, seq_id);

            auto cols = std::find_if(known.begin(), known.end(), [&](const column_positions & c) { return c.seq_id == seq_id; });
            if (cols == known.end()) {
                cols = known.insert(known.end(), column_positions { seq_id, std::vector<llama_pos>(n_cols, none) });
                for (int64_t c = 0; c < n_live; ++c) {
                    const uint32_t cell = ggml_kv_blocks_row(blocks, c);
                    if (!cells.is_empty(cell) && cells.seq_has(cell, seq_id)) {
                        cols->pos[c] = cells.pos_get(cell);
                    }
                }
            }

            const llama_pos * pos = cols->pos.data();

            T * row = data + i*n_cols;

            for (int64_t c = 0; c < n_cols; ++c) {
                const llama_pos j = pos[c];

                row[c] = j <= p && (p - j <= w || j < s || all) ? keep : drop;
            }

            if (is_2d) {
                // tokens of one image share a position: upstream orders them by their place in the image
                const llama_pos x = ubatch.pos[i + ubatch.n_tokens*2];
                const llama_pos y = ubatch.pos[i + ubatch.n_tokens];

                for (int64_t c = 0; c < n_live; ++c) {
                    if (pos[c] == p && cells.ext_get(ggml_kv_blocks_row(blocks, c)).is_2d_gt(x, y)) {
                        row[c] = drop;
                    }
                }
            }

            if (hparams.use_alibi) {
                for (int64_t c = 0; c < n_live; ++c) {
                    if (pos[c] <= p && row[c] == keep) {
                        row[c] = mask_value<T>(-std::abs((float) (pos[c] - p)));
                    }
                }
            }
        }
    }
}

// The whole cache behind a view of its first n_kv cells, [n_embd_head, n_head_kv, n_kv, n_stream].
ggml_tensor * whole_cache(ggml_context * ctx, ggml_tensor * t, int64_t kv_size) {
    return ggml_view_4d(ctx, t->view_src, t->ne[0], t->ne[1], kv_size, t->ne[3], t->nb[1], t->nb[2], t->nb[3], t->view_offs);
}

// The listed blocks of the cache, one after the other: [n_embd_head, n_head_kv, n_blocks*256, n_stream], F32.
ggml_tensor * gather(ggml_context * ctx, ggml_tensor * t, ggml_tensor * blocks) {
    const int64_t n_block = t->ne[0]*t->ne[1]*BLOCK; // elements of a block: a row of the gather

    GGML_ASSERT(t->nb[2] == ggml_row_size(t->type, t->ne[0]*t->ne[1]));

    ggml_tensor * rows = ggml_view_3d(ctx, t->view_src, n_block, t->ne[2]/BLOCK, t->ne[3], t->nb[2]*BLOCK, t->nb[3], t->view_offs);
    ggml_tensor * idxs = ggml_reshape_2d(ctx, blocks, blocks->ne[0], blocks->ne[3]);
    ggml_tensor * res  = ggml_get_rows(ctx, rows, idxs);

    return ggml_reshape_4d(ctx, res, t->ne[0], t->ne[1], blocks->ne[0]*BLOCK, t->ne[3]);
}

} // namespace

//
// llama_swaa_input
//

llama_swaa_input::llama_swaa_input(
                          ggml_context * ctx,
         const llama_cparams           & cparams,
         const llama_ubatch            & ubatch,
         const llama_kv_cache_context  * mctx,
                                  bool   in_ring) :
    swaa(*cparams.swaa), in_ring(in_ring), plan(make_plan(*cparams.swaa, cparams, ubatch, mctx, in_ring)) {
    cparams.swaa->attached    = true;
    cparams.swaa->graph_shape = in_ring ? llama_swaa_plan::N_SHAPES*cparams.swaa->graph_shape + plan.shape() : plan.shape();
    if (mctx->is_reserve()) {
        cparams.swaa->planned_shape = 0;
    }

    const ggml_type type  = cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32;
    const int64_t   n_tps = ubatch.n_tokens/plan.n_stream;

    window = build(ctx, plan.window, type, n_tps, "window");
    mixed  = build(ctx, plan.mixed,  type, n_tps, "mixed");
    causal = build(ctx, plan.causal, type, n_tps, "causal");
}

const llama_kv_cache_context * llama_swaa_input::ring_of(const llama_kv_cache_context * mctx) {
    return static_cast<const llama_swaa_memory_context *>(mctx)->get_ring();
}

llm_graph_input_attn_kv * llama_swaa_input::input_of_layer(llm_graph_input_attn_kv * full, int il) const {
    return ring && swaa.memory.in_ring(il) ? ring : full;
}

llama_swaa_input::tensors llama_swaa_input::build(
        ggml_context * ctx, const llama_swaa_columns & columns, ggml_type type, int64_t n_tps, const char * name) const {
    tensors res;

    if (columns.n_blocks == 0) {
        return res;
    }

    res.mask = ggml_new_tensor_4d(ctx, type, columns.n_masked*BLOCK, n_tps, 1, plan.n_stream);
    ggml_set_input(res.mask);
    ggml_format_name(res.mask, "swaa_mask_%s", name);

    if (columns.table) {
        res.blocks = ggml_new_tensor_4d(ctx, GGML_TYPE_I32, columns.n_blocks, 1, 1, plan.n_stream);
        ggml_set_input(res.blocks);
        ggml_format_name(res.blocks, "swaa_blocks_%s", name);
    }

    return res;
}

std::pair<const llama_swaa_columns *, const llama_swaa_input::tensors *> llama_swaa_input::of_layer(int il) const {
    // a graph may run layers of its own past those that the file counts
    if (!plan.active || il >= (int) swaa.params.sliding.size()) {
        return {};
    }

    if (in_ring) {
        return { &plan.window, &window };
    }

    if (!swaa.params.sliding[il]) {
        if (plan.causal.n_blocks > 0 && swaa.layer_reads_table[il]) {
            return { &plan.causal, &causal };
        }
        return {};
    }

    if (!swaa.params.fa_decode[il] || plan.decode == llama_swaa_plan::NONE) {
        return { &plan.window, &window };
    }

    if (plan.decode == llama_swaa_plan::SOME) {
        return { &plan.mixed, &mixed };
    }

    return {};
}

void llama_swaa_input::apply(
        ggml_context                 * ctx,
        const llama_kv_cache_context * mctx,
        int                            il,
        ggml_tensor                * & k,
        ggml_tensor                * & v,
        ggml_tensor                * & kq_mask,
        ggml_tensor                * & kv_blocks) const {
    const auto [columns, inputs] = of_layer(il);

    if (columns == nullptr) {
        return;
    }

    kq_mask = inputs->mask;

    if (!columns->table) {
        return;
    }

    // views of the whole cache do not change as it fills, so the graph can be reused
    k = whole_cache(ctx, k, mctx->get_kv().get_size());
    v = whole_cache(ctx, v, mctx->get_kv().get_size());

    if (swaa.layer_reads_table[il]) {
        kv_blocks = inputs->blocks;
    } else {
        k = gather(ctx, k, inputs->blocks);
        v = gather(ctx, v, inputs->blocks);
    }
}

bool llama_swaa_input::can_reuse(const llama_ubatch & ubatch, const llama_cparams & cparams, const llama_kv_cache_context * mctx) {
    auto next = make_plan(swaa, cparams, ubatch, mctx, in_ring);

    const bool res = next.same_graph(plan);

    plan = std::move(next);

    return res;
}

void llama_swaa_input::set_input(const llama_ubatch & ubatch, const llama_hparams & hparams, const llama_kv_cache_context * mctx) const {
    const auto set = [&](const tensors & inputs, const llama_swaa_columns & columns, sight kind) {
        if (inputs.mask && inputs.mask->buffer) {
            GGML_ASSERT(ggml_backend_buffer_is_host(inputs.mask->buffer));
            if (inputs.mask->type == GGML_TYPE_F16) {
                fill_mask((ggml_fp16_t *) inputs.mask->data, columns, swaa, ubatch, hparams, mctx->get_kv(), plan.n_stream, kind);
            } else {
                fill_mask((float       *) inputs.mask->data, columns, swaa, ubatch, hparams, mctx->get_kv(), plan.n_stream, kind);
            }
        }

        if (inputs.blocks && inputs.blocks->buffer) {
            ggml_backend_tensor_set(inputs.blocks, columns.blocks.data(), 0, ggml_nbytes(inputs.blocks));
        }
    };

    set(window, plan.window, sight::WINDOW);
    set(mixed,  plan.mixed,  sight::MIXED);
    set(causal, plan.causal, sight::CAUSAL);
}
