// KV block table in the MMA kernel: a CUDA block's range of a query tile, scaled to the tile's live columns.
//
// Why: stream-k divides all columns of the table evenly, but a tile's masked blocks are last in its list, so the CUDA
// block with the last range would idle. Scaled ranges still meet where the unscaled ones met.
//
// Use: fattn_kv_share(k_start, k_stop, n_live, n_all); in KV tiles, 0 <= k_start < k_stop <= n_all.

#pragma once

#include "fattn-kv-blocks.cuh"

// A bound is 0 afterwards only if it was 0 before, since only a range that starts at 0 begins a tile. An empty range
// becomes one KV tile past the live ones, masked for every query, since the kernel computes at least one.
FATTN_KV_FUNC void fattn_kv_share(int & k_start, int & k_stop, const int n_live, const int n_all) {
    const bool begins = k_start == 0;

    k_start = (int) (((int64_t) k_start*n_live + n_all - 1) / n_all);
    k_stop  = (int) (((int64_t) k_stop *n_live + n_all - 1) / n_all);

    if (k_start == k_stop) {
        k_start = begins ? 0 : n_live > 1 ? n_live : 1;
        k_stop  = k_start + 1;
    }
}
