// KV block table in CUDA flash attention: the list of blocks of each query tile, and f16 copies of K and V (see
// fattn-kv-launch.cuh).

#include "fattn-kv-launch.cuh"

#ifndef FATTN_KV_AVAILABLE

void * ggml_cuda_fattn_kv_supports_proc() {
    return nullptr;
}

#else

#include "convert.cuh"
#include "dequantize.cuh"

static_assert(FATTN_KV_BLOCK == GGML_KV_BLOCK_SIZE, "bad block size");

#define FATTN_KV_LIST_THREADS  512
#define FATTN_KV_LIST_ROWS       8 // mask rows in flight per warp
#define FATTN_KV_COPY_THREADS  256
#define FATTN_KV_COPY_ROWS      32 // rows per CUDA block

// With few queries the kernels read the table itself: lists would cost a launch and save next to nothing.
#define FATTN_KV_MAX_QUERIES_WITHOUT_LIST 8

// One CUDA block per query tile (x) and stream (y). A warp reads 256 columns of a mask row together: 32 lanes, 16 bytes
// each.
__launch_bounds__(FATTN_KV_LIST_THREADS, 1)
static __global__ void fattn_kv_list_blocks(
        const char * mask, const int64_t nb31, const int64_t nb33, const int ne33,
        const char * table, const int64_t table_nb3, const bool compact_K, const bool compact_V,
        int * lists, const int n_blocks, const int n_masked_blocks, const int n_queries, const int ncols1) {
    ggml_cuda_pdl_sync();

    extern __shared__ uint8_t fattn_kv_live[]; // [n_masked_blocks]

    const int tile   = blockIdx.x;
    const int seq    = blockIdx.y;
    const int lane   = threadIdx.x % WARP_SIZE;
    const int warp   = threadIdx.x / WARP_SIZE;
    const int nwarps = FATTN_KV_LIST_THREADS / WARP_SIZE;

    const int j0     = tile*ncols1;
    const int j_stop = min(j0 + ncols1, n_queries);

    mask += (seq % ne33)*nb33;

    for (int b = warp; b < n_masked_blocks; b += nwarps) {
        int visible = 0;
        for (int j = j0; j < j_stop; j += FATTN_KV_LIST_ROWS) {
#pragma unroll
            for (int jj = 0; jj < FATTN_KV_LIST_ROWS; ++jj) {
                if (j + jj < j_stop) {
                    const uint4 m = ((const uint4 *) (mask + (j + jj)*nb31))[b*WARP_SIZE + lane];
                    visible |= fattn_kv_is_visible(m.x) || fattn_kv_is_visible(m.y) ||
                               fattn_kv_is_visible(m.z) || fattn_kv_is_visible(m.w);
                }
            }
            visible = __any_sync(0xFFFFFFFF, visible);
            if (visible) {
                break;
            }
        }
        if (lane == 0) {
            fattn_kv_live[b] = visible != 0;
        }
    }
    __syncthreads();

    if (warp != 0) {
        return;
    }

    const int * row = (const int *) (table + seq*table_nb3);
    const int * row_K = compact_K ? nullptr : row;
    const int * row_V = compact_V ? nullptr : row;

    fattn_kv_entry * list = (fattn_kv_entry *) (lists + fattn_kv_list_offset(n_blocks, gridDim.x, seq, tile));

    int n_live = 0;
    for (int b0 = 0; b0 < n_blocks; b0 += WARP_SIZE) {
        const int      b     = b0 + lane;
        const bool     live  = b < n_blocks && (b >= n_masked_blocks || fattn_kv_live[b]);
        const uint32_t lives = __ballot_sync(0xFFFFFFFF, live);
        const int      n_live_before = n_live + __popc(lives & ((1u << lane) - 1));

        if (b < n_blocks) {
            list[fattn_kv_place_in_list(live, b, n_live_before, n_blocks)] =
                fattn_kv_entry_of(row_K, row_V, n_masked_blocks, b);
        }
        n_live += __popc(lives);
    }

    if (lane == 0) {
        lists[fattn_kv_count_offset(n_blocks, gridDim.x, gridDim.y, seq, tile)] = n_live;
    }
}

// Copies the rows of some columns (x) of one head (y) and stream (z) as f16. A thread converts two values: a pair from
// dequantize() if the type has blocks of qk > 1 values, otherwise two neighbours.
template <typename T, int qk, int qr, dequantize_kernel_t dequantize>
__launch_bounds__(FATTN_KV_COPY_THREADS)
static __global__ void fattn_kv_to_f16(
        const char * x, const int64_t nb1, const int64_t nb2, const int64_t nb3,
        const char * table, const int64_t table_nb3, half * y, const int ne0, const int n_cols) {
    ggml_cuda_pdl_sync();

    const int * row_of = (const int *) (table + blockIdx.z*table_nb3);
    const int   n_pairs = ne0/2;

    for (int i = threadIdx.x; i < FATTN_KV_COPY_ROWS*n_pairs; i += FATTN_KV_COPY_THREADS) {
        const int col = blockIdx.x*FATTN_KV_COPY_ROWS + i/n_pairs;
        const int i0  = 2*(i % n_pairs);

        const char * src = x + fattn_kv_row_of_column(row_of, col)*nb1 + blockIdx.y*nb2 + blockIdx.z*nb3;
        half       * dst = y + (((int64_t) blockIdx.z*gridDim.y + blockIdx.y)*n_cols + col)*ne0;

        if constexpr (qk > 1) {
            const int iqs = (i0 % qk)/qr;
            const int iy  = i0 - i0 % qk + iqs;

            float2 v;
            dequantize(src, i0/qk, iqs, v);
            dst[iy]                        = __float2half(v.x);
            dst[iy + (qr == 1 ? 1 : qk/2)] = __float2half(v.y);
        } else {
            dst[i0 + 0] = ggml_cuda_cast<half>(((const T *) src)[i0 + 0]);
            dst[i0 + 1] = ggml_cuda_cast<half>(((const T *) src)[i0 + 1]);
        }
    }
}

void ggml_cuda_fattn_kv_to_f16(const ggml_tensor * op, const ggml_tensor * t, half * dst,
        size_t & nb1, size_t & nb2, size_t & nb3, cudaStream_t stream) {
    const ggml_tensor * table  = op->src[5];
    const int64_t       n_cols = ggml_kv_blocks_n_cols(op);

    static_assert(FATTN_KV_BLOCK % FATTN_KV_COPY_ROWS == 0, "bad number of rows");
    GGML_ASSERT(t->ne[0] % 2 == 0);

    const auto launch = [&](auto kernel) {
        const dim3 blocks_num(n_cols/FATTN_KV_COPY_ROWS, t->ne[2], t->ne[3]);
        const ggml_cuda_kernel_launch_params launch_params(blocks_num, dim3(FATTN_KV_COPY_THREADS, 1, 1), 0, stream);
        ggml_cuda_kernel_launch(kernel, launch_params,
            (const char *) t->data, (int64_t) t->nb[1], (int64_t) t->nb[2], (int64_t) t->nb[3],
            (const char *) table->data, (int64_t) table->nb[3], dst, (int) t->ne[0], (int) n_cols);
        CUDA_CHECK(cudaGetLastError());
    };

    switch (t->type) {
        case GGML_TYPE_F32:  launch(fattn_kv_to_f16<float,       1, 1, nullptr>);                   break;
        case GGML_TYPE_BF16: launch(fattn_kv_to_f16<nv_bfloat16, 1, 1, nullptr>);                   break;
        case GGML_TYPE_Q4_0: launch(fattn_kv_to_f16<void, QK4_0, QR4_0, dequantize_q4_0>);          break;
        case GGML_TYPE_Q4_1: launch(fattn_kv_to_f16<void, QK4_1, QR4_1, dequantize_q4_1>);          break;
        case GGML_TYPE_Q5_0: launch(fattn_kv_to_f16<void, QK5_0, QR5_0, dequantize_q5_0>);          break;
        case GGML_TYPE_Q5_1: launch(fattn_kv_to_f16<void, QK5_1, QR5_1, dequantize_q5_1>);          break;
        case GGML_TYPE_Q8_0: launch(fattn_kv_to_f16<void, QK8_0, QR8_0, dequantize_q8_0>);          break;
        default: GGML_ABORT("no f16 copy of %s through a KV block table", ggml_type_name(t->type));
    }

    nb1 = t->ne[0]*sizeof(half);
    nb2 = n_cols*nb1;
    nb3 = t->ne[2]*nb2;
}

ggml_cuda_fattn_kv_args ggml_cuda_fattn_kv_list_blocks(const ggml_tensor * op, int ncols1, bool compact_K, bool compact_V,
        ggml_cuda_pool_alloc<int> & buffer, cudaStream_t stream) {
    const ggml_tensor * Q     = op->src[0];
    const ggml_tensor * mask  = op->src[3];
    const ggml_tensor * table = op->src[5];

    const int n_blocks        = table->ne[0];
    const int n_masked_blocks = mask->ne[0]/FATTN_KV_BLOCK;
    const int n_tiles         = (Q->ne[1] + ncols1 - 1)/ncols1;

    const bool contiguous = table->nb[3] == n_blocks*sizeof(int32_t) || table->ne[3] == 1;
    if (!compact_K && !compact_V && contiguous && Q->ne[1] <= FATTN_KV_MAX_QUERIES_WITHOUT_LIST && Q->ne[3] == 1) {
        return { (const int *) table->data, n_masked_blocks*FATTN_KV_BLOCK };
    }

    GGML_ASSERT(n_masked_blocks <= 48*1024); // bytes of shared memory

    buffer.alloc(fattn_kv_lists_size(n_blocks, n_tiles, Q->ne[3]));

    const dim3 blocks_num(n_tiles, Q->ne[3], 1);
    const dim3 threads_num(FATTN_KV_LIST_THREADS, 1, 1);
    const ggml_cuda_kernel_launch_params launch_params(blocks_num, threads_num, n_masked_blocks, stream);
    ggml_cuda_kernel_launch(fattn_kv_list_blocks, launch_params,
        (const char *) mask->data, (int64_t) mask->nb[1], (int64_t) mask->nb[3], (int) mask->ne[3],
        (const char *) table->data, (int64_t) table->nb[3], compact_K, compact_V,
        buffer.ptr, n_blocks, n_masked_blocks, (int) Q->ne[1], ncols1);
    CUDA_CHECK(cudaGetLastError());

    return { buffer.ptr, 0 };
}

static bool ggml_cuda_fattn_kv_supports(const ggml_tensor * op) {
    const ggml_tensor * Q     = op->src[0];
    const ggml_tensor * K     = op->src[1];
    const ggml_tensor * V     = op->src[2];
    const ggml_tensor * mask  = op->src[3];
    const ggml_tensor * table = op->src[5];

    const int64_t n_cols = ggml_kv_blocks_n_cols(op);

    return mask && mask->type == GGML_TYPE_F16 &&
        mask->ne[0] > 0 && mask->ne[0] % FATTN_KV_BLOCK == 0 && mask->ne[0] <= n_cols &&
        mask->ne[1] >= Q->ne[1] && mask->ne[2] == 1 && mask->nb[1] % 16 == 0 && mask->nb[3] % 16 == 0 &&
        mask->ne[0]/FATTN_KV_BLOCK <= 48*1024 &&
        table->type == GGML_TYPE_I32 && table->nb[0] == sizeof(int32_t) && table->ne[3] == Q->ne[3] &&
        K->ne[3] == Q->ne[3] && V->ne[3] == Q->ne[3] && K->ne[0] % 2 == 0 && V->ne[0] % 2 == 0 &&
        K->ne[1] < INT32_MAX && n_cols < INT32_MAX;
}

void * ggml_cuda_fattn_kv_supports_proc() {
    ggml_backend_supports_kv_blocks_t fct = ggml_cuda_fattn_kv_supports;
    return (void *) fct;
}

#endif // FATTN_KV_AVAILABLE
