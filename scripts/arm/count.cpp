// Counts the attention ops of test-backend-ops, the ops that our kernels computed, and the threads.
//
// The op tests also pass if upstream's kernels compute every op, as with GGML_CPU_FATTN=0. The linker redirects the
// calls here (--wrap, see CMakeLists.txt), so the library's sources stay unchanged. At the end, the program writes one
// line to standard error: attention: ops 12, ours 12, reference 12, threads 2
//
// The op tests use half of the machine's threads. ARM_CHECK_THREADS sets another number. The reference takes most of
// the time and gets one thread. More threads would waste time by busy-waiting for each other.

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace {

// The first thread of each op counts the op.
struct counts {
    std::atomic<long> ops{0}, ours{0}, reference{0}, threads{0};

    counts() {
        setvbuf(stdout, nullptr, _IOLBF, 0); // after a crash, all finished cases are printed
    }
    ~counts() {
        fprintf(stderr, "attention: ops %ld, ours %ld, reference %ld, threads %ld\n", ops.load(), ours.load(),
                reference.load(), threads.load());
    }
} count;

} // namespace

extern "C" {

void __real_ggml_compute_forward_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst);
void __wrap_ggml_compute_forward_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst);
void __real_ggml_fattn_cpu_compute(const ggml_compute_params * params, ggml_tensor * op);
void __wrap_ggml_fattn_cpu_compute(const ggml_compute_params * params, ggml_tensor * op);
enum ggml_status __real_ggml_graph_compute(ggml_cgraph * graph, ggml_cplan * plan);
enum ggml_status __wrap_ggml_graph_compute(ggml_cgraph * graph, ggml_cplan * plan);
int  __real_get_nprocs(void);
int  __wrap_get_nprocs(void);

void __wrap_ggml_compute_forward_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->ith == 0) {
        (params->use_ref ? count.reference : count.ops)++;
    }
    __real_ggml_compute_forward_flash_attn_ext(params, dst);
}

void __wrap_ggml_fattn_cpu_compute(const ggml_compute_params * params, ggml_tensor * op) {
    if (params->ith == 0) {
        count.ours++;
        if (count.threads < params->nth) {
            count.threads = params->nth;
        }
    }
    __real_ggml_fattn_cpu_compute(params, op);
}

enum ggml_status __wrap_ggml_graph_compute(ggml_cgraph * graph, ggml_cplan * plan) {
    if (plan->use_ref) {
        plan->n_threads = 1;
    }
    return __real_ggml_graph_compute(graph, plan);
}

int __wrap_get_nprocs(void) {
    const char * threads = getenv("ARM_CHECK_THREADS");
    return threads ? 2*atoi(threads) : __real_get_nprocs();
}

} // extern "C"
