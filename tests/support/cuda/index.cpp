// The index arithmetic of the CUDA kernels as a C library, for tests/patches/test_cuda_index.py.
//
// Why: the kernels call fattn-kv-blocks.cuh; here a host compiler compiles the same functions.

#include "fattn-kv-blocks.cuh"
#include "fattn-kv-split.cuh"

extern "C" {

int32_t block_size() {
    return FATTN_KV_BLOCK;
}

int64_t plan_size(int n_blocks, int n_tiles, int n_seqs) {
    return fattn_kv_lists_size(n_blocks, n_tiles, n_seqs);
}

int is_visible(uint32_t pair) {
    return fattn_kv_is_visible(pair);
}

// One list of a plan, as fattn_kv_list_blocks writes it; live holds one flag per masked block.
void write_list(int32_t * plan, const int32_t * table_K, const int32_t * table_V, const uint8_t * live,
        int n_blocks, int n_masked_blocks, int n_tiles, int n_seqs, int seq, int tile) {
    fattn_kv_entry * list = (fattn_kv_entry *) (plan + fattn_kv_list_offset(n_blocks, n_tiles, seq, tile));
    int n_live = 0;
    for (int b = 0; b < n_blocks; ++b) {
        const bool is_live = b >= n_masked_blocks || live[b];
        list[fattn_kv_place_in_list(is_live, b, n_live, n_blocks)] = fattn_kv_entry_of(table_K, table_V, n_masked_blocks, b);
        n_live += is_live;
    }
    plan[fattn_kv_count_offset(n_blocks, n_tiles, n_seqs, seq, tile)] = n_live;
}

int n_live(const int32_t * plan_or_table, int n_masked, int n_cols, int n_tiles, int n_seqs, int seq, int tile) {
    return fattn_kv_columns_of(plan_or_table, n_masked, n_cols, n_tiles, n_seqs, seq, tile).n_live;
}

void tile_at(int32_t * out, const int32_t * plan_or_table, int n_masked, int n_cols, int n_tiles, int n_seqs, int seq, int tile, int k) {
    const fattn_kv_tile at = fattn_kv_tile_at(fattn_kv_columns_of(plan_or_table, n_masked, n_cols, n_tiles, n_seqs, seq, tile), k);
    out[0] = at.row_K;
    out[1] = at.row_V;
    out[2] = at.col;
}

void share(int32_t * range, int n_live, int n_all) {
    fattn_kv_share(range[0], range[1], n_live, n_all);
}

int64_t row_of_column(const int32_t * table, int col) {
    return fattn_kv_row_of_column(table, col);
}

}
