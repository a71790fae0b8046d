// Flash attention on the CPU: what the op computes, in the terms of our kernels.
//
// Why: upstream's CPU kernels read K and V once per query head and accumulate decode in f16. Ours read each K/V tile
// once for all the query heads that share it, and accumulate in f32.
//
//   if (ggml_fattn_cpu_takes(op)) { ggml_fattn_cpu_compute(params, op); }   // every thread; otherwise upstream's
//   work size: ggml_fattn_cpu_work_size(op, n_threads) bytes in params->wdata
//
// GGML_CPU_FATTN=0 in the environment leaves every op to upstream's kernels, to compare.
//
// Few query rows per KV head (decode) go to fattn-decode.cpp, more to fattn-tile.cpp. Both cut the work into tasks of
// rows and KV columns that do not depend on which thread takes which, and leave (maximum, sum, unnormalised output) per
// row and range of columns; fattn.cpp merges them in order. So results are the same from run to run.

#pragma once

#include "ggml-cpu-impl.h"

#ifdef __cplusplus
extern "C" {
#endif

bool   ggml_fattn_cpu_takes(const struct ggml_tensor * op);
size_t ggml_fattn_cpu_work_size(const struct ggml_tensor * op, int n_threads);
void   ggml_fattn_cpu_compute(const struct ggml_compute_params * params, struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
