// SWAA in the compute graph (see llama-swaa-graph.h).

#include "llama-swaa-graph.h"

#include "llama-swaa-context.h"
#include "llama-swaa-mask.h"
#include "llama-swaa-memory.h"

#include "llama-batch.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

namespace {

constexpr int64_t BLOCK = GGML_KV_BLOCK_SIZE;

// The whole cache behind a view of its first n_kv cells, [n_embd_head, n_head_kv, n_kv, n_stream].
ggml_tensor * whole_cache(ggml_context * ctx, ggml_tensor * t, int64_t kv_size) {
    return ggml_view_4d(
            ctx, t->view_src, t->ne[0], t->ne[1], kv_size, t->ne[3], t->nb[1], t->nb[2], t->nb[3], t->view_offs);
}

// The listed blocks of the cache, one after the other: [n_embd_head, n_head_kv, n_blocks*256, n_stream], F32.
ggml_tensor * gather(ggml_context * ctx, ggml_tensor * t, ggml_tensor * blocks) {
    const int64_t n_block = t->ne[0]*t->ne[1]*BLOCK; // elements of a block: a row of the gather

    GGML_ASSERT(t->nb[2] == ggml_row_size(t->type, t->ne[0]*t->ne[1]));

    ggml_tensor * rows = ggml_view_3d(
            ctx, t->view_src, n_block, t->ne[2]/BLOCK, t->ne[3], t->nb[2]*BLOCK, t->nb[3], t->view_offs);
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
    swaa(*cparams.swaa), in_ring(in_ring), plan(make_plan(ubatch, cparams, mctx)) {
    auto & context = *cparams.swaa;

    context.attached     = true;
    context.graph_wiring = plan.wiring() + (in_ring ? llama_swaa_plan::N_WIRINGS*context.graph_wiring : 0);
    if (mctx->is_reserve()) {
        context.reserved_wiring = 0;
    }

    const ggml_type type  = cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32;
    const int64_t   n_tps = ubatch.n_tokens/plan.n_stream;

    window = build(ctx, plan.window, type, n_tps, "window");
    mixed  = build(ctx, plan.mixed,  type, n_tps, "mixed");
    causal = build(ctx, plan.causal, type, n_tps, "causal");
}

llama_swaa_view llama_swaa_input::make_view(
        const llama_ubatch & ubatch, const llama_kv_cache_context * mctx, uint32_t n_stream) const {
    const bool reserve = mctx->is_reserve();

    llama_swaa_layer_kinds ring_kinds;
    ring_kinds.swa_decode = true;

    llama_swaa_view res {
        /*.params    =*/ swaa.params,
        /*.ubatch    =*/ ubatch,
        /*.kinds     =*/ in_ring ? ring_kinds : swaa.kinds,
        /*.n_stream  =*/ n_stream,
        /*.n_kv      =*/ mctx->get_n_kv(),
        /*.dense     =*/ false,
        /*.has_ring  =*/ swaa.memory.n_ring_cells() > 0,
        /*.is_decode =*/ {},
        /*.cells     =*/ {},
    };

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        // a reserved graph with one token per sequence is for decode; the ring's layers see the window in either phase
        const bool decode = reserve ? ubatch.n_tokens == ubatch.n_seqs_unq :
            swaa.is_decode(ubatch.seq_id[i][0], ubatch.pos[i]);
        res.is_decode.push_back(decode && !in_ring);
    }

    for (uint32_t s = 0; s < n_stream && !reserve; ++s) {
        res.cells.push_back(&mctx->get_kv().get_cells(ubatch.seq_id[s*res.n_tokens_per_stream()][0]));
    }

    return res;
}

llama_swaa_plan llama_swaa_input::make_plan(
        const llama_ubatch & ubatch, const llama_cparams & cparams, const llama_kv_cache_context * mctx) const {
    const uint32_t n_stream = cparams.kv_unified ? 1 : ubatch.n_seqs_unq;

    if (!cparams.causal_attn || cparams.training) {
        llama_swaa_plan res;
        res.n_stream = n_stream;
        return res;
    }

    auto view = make_view(ubatch, mctx, n_stream);
    view.dense = swaa.is_dense(cparams);

    return llama_swaa_make_plan(view);
}

const llama_kv_cache_context * llama_swaa_input::ring_of(const llama_kv_cache_context * mctx) {
    return static_cast<const llama_swaa_memory_context *>(mctx)->get_ring();
}

llm_graph_input_attn_kv * llama_swaa_input::input_of_layer(llm_graph_input_attn_kv * full, int il) const {
    return ring && swaa.memory.in_ring(il) ? ring : full;
}

llama_swaa_input::tensors llama_swaa_input::build(
        ggml_context             * ctx,
        const llama_swaa_columns & columns,
        ggml_type                  type,
        int64_t                    n_tps,
        const char               * name) const {
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
    // a graph may have layers beyond those that the file counts
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

    // views of the whole cache stay the same while it fills, so the graph can be reused
    k = whole_cache(ctx, k, mctx->get_kv().get_size());
    v = whole_cache(ctx, v, mctx->get_kv().get_size());

    if (swaa.layer_reads_table[il]) {
        kv_blocks = inputs->blocks;
    } else {
        k = gather(ctx, k, inputs->blocks);
        v = gather(ctx, v, inputs->blocks);
    }
}

bool llama_swaa_input::can_reuse(
        const llama_ubatch & ubatch, const llama_cparams & cparams, const llama_kv_cache_context * mctx) {
    auto next = make_plan(ubatch, cparams, mctx);

    const bool res = next.same_graph(plan);

    plan = std::move(next);

    return res;
}

void llama_swaa_input::set_input(
        const llama_ubatch & ubatch, const llama_hparams & hparams, const llama_kv_cache_context * mctx) const {
    if (!plan.active) {
        return;
    }

    const auto view = make_view(ubatch, mctx, plan.n_stream);

    const auto set = [&](const tensors & inputs, const llama_swaa_columns & columns, llama_swaa_sight kind) {
        if (inputs.mask && inputs.mask->buffer) {
            GGML_ASSERT(ggml_backend_buffer_is_host(inputs.mask->buffer));
            llama_swaa_fill_mask(inputs.mask->data, inputs.mask->type, columns, view, kind, hparams.use_alibi);
        }

        if (inputs.blocks && inputs.blocks->buffer) {
            ggml_backend_tensor_set(inputs.blocks, columns.blocks.data(), 0, ggml_nbytes(inputs.blocks));
        }
    };

    set(window, plan.window, llama_swaa_sight::WINDOW);
    set(mixed,  plan.mixed,  llama_swaa_sight::MIXED);
    set(causal, plan.causal, llama_swaa_sight::CAUSAL);
}
