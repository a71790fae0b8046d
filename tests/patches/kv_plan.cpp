// The KV plan and its masks as C functions, for tests/patches/test_kv_plan.py.
//
//   g++ -shared -fPIC kv_plan.cpp ../../patches/src/src/llama-swaa-plan.cpp ../../patches/src/src/llama-swaa-mask.cpp

#include "llama-swaa-mask.h"
#include "llama-swaa-plan.h"

#include "llama-batch.h"
#include "llama-kv-cells.h"

#include <cmath>
#include <memory>

// All that masks convert is 0 and -INFINITY.
extern "C" ggml_fp16_t ggml_fp32_to_fp16(float x) {
    return x == 0.0f ? 0 : 0xFC00;
}

namespace {

struct subject {
    llama_swaa_params params;
    llama_ubatch      ubatch {};

    std::vector<llama_pos>      pos;
    std::vector<llama_seq_id>   seq;
    std::vector<llama_seq_id *> seq_of_token;

    std::vector<std::unique_ptr<llama_kv_cells>> cells;

    std::unique_ptr<llama_swaa_view> view;

    llama_swaa_plan plan;
};

const llama_swaa_columns & columns_of(const subject * s, int kind) {
    return kind == 0 ? s->plan.window : kind == 1 ? s->plan.mixed : s->plan.causal;
}

} // namespace

extern "C" {

struct settings {
    int32_t window, sinks, n_stream, n_kv, n_seqs, n_pos, dense, has_ring, fa_decode, swa_decode, causal_table, reserve;
};

// pos [n_pos][n_tokens]; seq, decode [n_tokens]; cell_pos [n_stream][n_kv], -1 where empty; cell_seqs likewise, one bit
// for each sequence.
subject * plan_new(const settings * set, int32_t n_tokens, const int32_t * pos, const int32_t * seq, const int32_t * decode,
        const int32_t * cell_pos, const uint32_t * cell_seqs) {
    auto * s = new subject;

    s->params.window_size = set->window;
    s->params.sink_count  = set->sinks;

    s->pos.assign(pos, pos + n_tokens*set->n_pos);
    s->seq.assign(seq, seq + n_tokens);
    for (auto & id : s->seq) {
        s->seq_of_token.push_back(&id);
    }

    s->ubatch.n_tokens   = n_tokens;
    s->ubatch.n_seqs_unq = set->n_seqs;
    s->ubatch.n_pos      = set->n_pos;
    s->ubatch.pos        = s->pos.data();
    s->ubatch.seq_id     = s->seq_of_token.data();

    s->view.reset(new llama_swaa_view {
        s->params, s->ubatch, { set->fa_decode != 0, set->swa_decode != 0, set->causal_table != 0 },
        (uint32_t) set->n_stream, (uint32_t) set->n_kv, set->dense != 0, set->has_ring != 0,
        std::vector<bool>(decode, decode + n_tokens), {},
    });

    for (int32_t is = 0; is < set->n_stream && !set->reserve; ++is) {
        s->cells.push_back(std::make_unique<llama_kv_cells>());
        s->view->cells.push_back(s->cells.back().get());
        s->cells.back()->resize(set->n_kv);
        for (int32_t i = 0; i < set->n_kv; ++i) {
            if (cell_pos[is*set->n_kv + i] < 0) {
                continue;
            }
            s->cells.back()->pos_set(i, cell_pos[is*set->n_kv + i]);
            for (int32_t id = 0; id < 32; ++id) {
                if (cell_seqs[is*set->n_kv + i] >> id & 1) {
                    s->cells.back()->seq_add(i, id);
                }
            }
        }
    }

    s->plan = llama_swaa_make_plan(*s->view);

    return s;
}

void plan_free(subject * s) {
    delete s;
}

// active, tokens that decode (none, some, all), wiring
void plan_about(const subject * s, int32_t * about) {
    about[0] = s->plan.active;
    about[1] = s->plan.decode;
    about[2] = s->plan.wiring();
}

int32_t plan_wirings(void) {
    return llama_swaa_plan::N_WIRINGS;
}

bool plan_same_graph(const subject * a, const subject * b) {
    return a->plan.same_graph(b->plan);
}

// n_blocks, n_masked, table, length of blocks, length of n_live
void plan_columns(const subject * s, int kind, int32_t * shape, const int32_t ** blocks, const uint32_t ** n_live) {
    const auto & columns = columns_of(s, kind);

    shape[0] = columns.n_blocks;
    shape[1] = columns.n_masked;
    shape[2] = columns.table;
    shape[3] = columns.blocks.size();
    shape[4] = columns.n_live.size();

    *blocks = columns.blocks.data();
    *n_live = columns.n_live.data();
}

// mask: [n_tokens][n_masked*256], floats, or halves
void plan_mask(const subject * s, int kind, bool half, bool alibi, void * mask) {
    llama_swaa_fill_mask(mask, half ? GGML_TYPE_F16 : GGML_TYPE_F32, columns_of(s, kind), *s->view, (llama_swaa_sight) kind, alibi);
}

}
