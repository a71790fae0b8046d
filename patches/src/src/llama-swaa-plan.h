// The KV plan of a ubatch: which blocks of the KV cache each kind of layer attends over.
//
// Why: a ubatch of a sliding layer needs a few blocks of the cache, whatever the layout of its cells. The plan is a
// pure function of cells, positions and decode boundaries: it needs no model, context or graph, and is tested without
// them.
//
// The rule (one definition for plan and mask): in a sliding layer the query at position p sees the key at position j of
// its sequence iff
//
//     j <= p  and  ( p - j < W  or  j < S  or  the layer decodes with full attention and the query is a decode token )
//
// Glossary
//
//     block         256 cells of the cache, the unit of a KV block table (ggml-kv-blocks.h)
//     stream        the cells that some sequences share: all sequences of a unified cache, otherwise one sequence. The
//                   tokens of a ubatch lie stream by stream, equally many in each
//     column        a key as attention sees it: the cells of the listed blocks, one after the other
//     live block    some token of the ubatch sees a cell of it
//     masked block  a block whose columns have a mask; every token sees every cell of an unmasked block
//     padding       table entries that repeat block 0 under wholly masked columns, to equal length in all streams
//     shape         the numbers of blocks and of masked blocks, and whether there is a table: all that graphs depend on
//     plan          the columns of every kind of layer, for one ubatch
//     sink token    one of the first S tokens of a sequence, which stay visible. Upstream's "sinks" are logits
//     decode token  a token that the model generated; all others are prompt tokens
//     ring          the smaller cache of the layers that never look past their window (llama-swaa-memory.h)

#pragma once

#include "llama-swaa-params.h"

#include "ggml-kv-blocks.h"

#include <cstdint>
#include <vector>

struct llama_ubatch;

class llama_kv_cells;

// Which tokens see their whole past.
enum class llama_swaa_sight { WINDOW, MIXED, CAUSAL }; // none, decode tokens, all

// The kinds of layers in one cache, each with columns of its own.
struct llama_swaa_layer_kinds {
    bool fa_decode    = false; // sliding layers that decode with full attention
    bool swa_decode   = false; // sliding layers that slide in decode too
    bool causal_table = false; // FA layers whose device reads a table with a mask over its first columns
};

// A ubatch and the cells that hold its past: what plan and masks are computed from.
struct llama_swaa_view {
    const llama_swaa_params & params;
    const llama_ubatch      & ubatch;

    llama_swaa_layer_kinds kinds;

    uint32_t n_stream = 1;
    uint32_t n_kv     = 0;     // cells of a stream that attention covers without a table, a multiple of 256
    bool     dense    = false; // sliding layers read no table: their mask covers all n_kv cells
    bool     has_ring = false; // other layers are in a ring

    std::vector<bool>                   is_decode; // [n_tokens]
    std::vector<const llama_kv_cells *> cells;     // [n_stream]; empty to reserve a graph before there are cells

    uint32_t n_tokens_per_stream() const;

    // Does token i see its whole past?
    bool sees_all(uint32_t i, llama_swaa_sight kind) const {
        return kind == llama_swaa_sight::CAUSAL || (kind == llama_swaa_sight::MIXED && is_decode[i]);
    }
};

// The columns that the layers of one kind attend over.
struct llama_swaa_columns {
    uint32_t n_blocks = 0;     // 0: no layer needs them
    uint32_t n_masked = 0;     // of these blocks, the leading ones that have a mask
    bool     table    = false; // false: the columns are the cache's first n_blocks*256 cells

    // [n_stream][n_blocks]: masked blocks, padding, unmasked blocks; empty at reservation
    std::vector<int32_t>  blocks;
    std::vector<uint32_t> n_live; // [n_stream], masked blocks that are not padding

    bool same_shape(const llama_swaa_columns & other) const {
        return n_blocks == other.n_blocks && n_masked == other.n_masked && table == other.table;
    }

    // Entries of one stream, or null without a table.
    const int32_t * blocks_of_stream(uint32_t s) const {
        return table ? blocks.data() + s*n_blocks : nullptr;
    }

    // Leading columns of one stream that are not padding.
    int64_t n_live_cols(uint32_t s) const {
        return (int64_t) GGML_KV_BLOCK_SIZE*(table ? n_live[s] : n_masked);
    }
};

struct llama_swaa_plan {
    enum decode_tokens { NONE, SOME, ALL }; // of the ubatch

    bool          active = false; // some token could lose a key to the window
    decode_tokens decode = NONE;

    uint32_t n_stream = 1;

    llama_swaa_columns window;
    llama_swaa_columns mixed;
    llama_swaa_columns causal;

    static constexpr uint32_t N_WIRINGS = 324;

    // Which layers read which input, as a number from 1 below N_WIRINGS. Graphs of one wiring may differ in shape.
    uint32_t wiring() const {
        uint32_t res = 1;
        for (const auto * columns : { &window, &mixed, &causal }) {
            res = 3*res + (columns->n_blocks == 0 ? 0 : columns->table ? 2 : 1);
        }
        return 2*(3*res + decode) + active;
    }

    bool same_graph(const llama_swaa_plan & other) const {
        return active == other.active && decode == other.decode && n_stream == other.n_stream &&
            window.same_shape(other.window) && mixed.same_shape(other.mixed) && causal.same_shape(other.causal);
    }
};

llama_swaa_plan llama_swaa_make_plan(const llama_swaa_view & view);
