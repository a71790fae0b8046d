// Masks over the columns of a KV plan.
//
// Why: a mask is filled from the same view of the ubatch as the plan, so the two can't disagree about a cell.
//
// Use: llama_swaa_fill_mask(mask->data, mask->type, plan.window, view, llama_swaa_sight::WINDOW, hparams.use_alibi);

#pragma once

#include "llama-swaa-plan.h"

#include "ggml.h"

// data: F16 or F32 [n_tokens][n_masked*256]. 0 where the token sees the column (with ALiBi, minus their distance),
// -INFINITY elsewhere.
void llama_swaa_fill_mask(
        void                     * data,
        ggml_type                  type,
        const llama_swaa_columns & columns,
        const llama_swaa_view    & view,
        llama_swaa_sight           kind,
        bool                       alibi);
