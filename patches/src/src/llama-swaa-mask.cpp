// Masks over the columns of a KV plan (see llama-swaa-mask.h).

#include "llama-swaa-mask.h"

#include "llama-batch.h"
#include "llama-kv-cells.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

constexpr llama_pos POS_NONE = std::numeric_limits<llama_pos>::max(); // the column holds no token of the sequence

template<typename T> T mask_value(float x);

template<> float       mask_value<float>      (float x) { return x; }
template<> ggml_fp16_t mask_value<ggml_fp16_t>(float x) { return ggml_fp32_to_fp16(x); }

// The position behind every column, for one sequence.
struct column_positions {
    llama_seq_id           seq_id;
    std::vector<llama_pos> pos; // [n_masked*256]
};

column_positions find_positions(
        const llama_kv_cells & cells, const int32_t * blocks, int64_t n_live, int64_t n_cols, llama_seq_id seq_id) {
    column_positions res { seq_id, std::vector<llama_pos>(n_cols, POS_NONE) };

    for (int64_t c = 0; c < n_live; ++c) {
        const uint32_t cell = ggml_kv_blocks_row(blocks, c);
        if (!cells.is_empty(cell) && cells.seq_has(cell, seq_id)) {
            res.pos[c] = cells.pos_get(cell);
        }
    }

    return res;
}

template<typename T>
void fill_mask(
        T                        * data,
        const llama_swaa_columns & columns,
        const llama_swaa_view    & view,
        llama_swaa_sight           kind,
        bool                       alibi) {
    const auto & ubatch = view.ubatch;

    const int64_t n_cols = columns.n_masked*GGML_KV_BLOCK_SIZE;
    const int64_t n_tps  = view.n_tokens_per_stream();

    // all of W, S and positions fit this type if p - j < W is written as p - j <= W - 1
    const llama_pos w = (llama_pos) (view.params.window_size - 1);
    const llama_pos s = (llama_pos) view.params.sink_count;

    const T keep = mask_value<T>(0.0f);
    const T drop = mask_value<T>(-INFINITY);

    for (uint32_t is = 0; is < view.n_stream; ++is) {
        const auto & cells = *view.cells[is];

        const int32_t * blocks = columns.blocks_of_stream(is);
        const int64_t   n_live = columns.n_live_cols(is);

        std::vector<column_positions> known;

        for (int64_t i = is*n_tps; i < (is + 1)*n_tps; ++i) {
            const llama_seq_id seq_id = ubatch.seq_id[i][0];
            const llama_pos    p      = ubatch.pos[i];
            const bool         all    = view.sees_all(i, kind);

            auto found = std::find_if(known.begin(), known.end(), [&](const column_positions & k) {
                return k.seq_id == seq_id;
            });
            if (found == known.end()) {
                found = known.insert(known.end(), find_positions(cells, blocks, n_live, n_cols, seq_id));
            }

            const llama_pos * pos = found->pos.data();

            T * row = data + i*n_cols;

            for (int64_t c = 0; c < n_cols; ++c) {
                const llama_pos j = pos[c];

                row[c] = j <= p && (p - j <= w || j < s || all) ? keep : drop;
            }

            if (ubatch.is_pos_2d()) {
                // tokens of one image share a position: upstream orders them by their place in the image
                const llama_pos x = ubatch.pos[i + ubatch.n_tokens*2];
                const llama_pos y = ubatch.pos[i + ubatch.n_tokens];

                for (int64_t c = 0; c < n_live; ++c) {
                    if (pos[c] == p && cells.ext_get(ggml_kv_blocks_row(blocks, c)).is_2d_gt(x, y)) {
                        row[c] = drop;
                    }
                }
            }

            if (alibi) {
                for (int64_t c = 0; c < n_live; ++c) {
                    if (pos[c] <= p && row[c] == keep) {
                        row[c] = mask_value<T>(-std::abs((float) (pos[c] - p)));
                    }
                }
            }
        }
    }
}

} // namespace

void llama_swaa_fill_mask(
        void                     * data,
        ggml_type                  type,
        const llama_swaa_columns & columns,
        const llama_swaa_view    & view,
        llama_swaa_sight           kind,
        bool                       alibi) {
    if (type == GGML_TYPE_F16) {
        fill_mask((ggml_fp16_t *) data, columns, view, kind, alibi);
    } else {
        fill_mask((float *) data, columns, view, kind, alibi);
    }
}
