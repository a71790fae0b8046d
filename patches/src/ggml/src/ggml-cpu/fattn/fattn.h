// Flash attention on the CPU, by kernels of our own.
//
// Why: upstream's CPU kernels read K and V once per query head and accumulate decode in f16. Ours read each K/V tile
// once for all the query heads that share it, and accumulate in f32.
//
//   if (ggml_fattn_cpu_takes(op)) { ggml_fattn_cpu_compute(params, op); }   // in every thread; otherwise upstream's
//   work memory: ggml_fattn_cpu_work_size(op, n_threads) bytes in params->wdata
//
// GGML_CPU_FATTN=0 in the environment leaves every op to upstream's kernels, for comparison. They read no KV block
// table, so the CPU backend refuses ops that have one.
//
// Few query rows per KV head (decode) go to fattn-decode.cpp, more to fattn-tile.cpp. Both work in tasks, a block of
// rows and a range of KV columns each, and leave maximum, sum and unnormalized output per row and range; fattn.cpp
// merges these in order. Tasks do not depend on which thread takes which, so results are the same from run to run.

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
