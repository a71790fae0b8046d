// The scheduler of emulator.h.
//
// Use: linked into the library with the kernels; host.cpp calls emu::run.

#include "emulator.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

// ucontext works everywhere, but makes a system call at every switch
#if !defined(EMU_OWN_SWITCH)
#if defined(__x86_64__)
#define EMU_OWN_SWITCH 1
#else
#define EMU_OWN_SWITCH 0
#endif
#endif
#if !EMU_OWN_SWITCH
#include <ucontext.h>
#endif

namespace emu {

const ids * current;
char *      buffers[MAX_BUFFERS];
char *      threadgroup_memory;
int32_t     fc_value[MAX_FC];
bool        fc_set  [MAX_FC];
bool        reverse_simdgroups;

void fail(const char * format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "metal emulator: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    abort();
}

std::map<std::string, void (*)()> & kernels() {
    static std::map<std::string, void (*)()> all;
    return all;
}

namespace {

enum state { RUNS, AT_SIMDGROUP_BARRIER, AT_THREADGROUP_BARRIER, DONE };

constexpr size_t STACK = 128*1024;

struct fiber {
    ids      id;
    state    st;
    uint64_t n_barriers;  // passed so far
    uint64_t n_exchanges;
#if EMU_OWN_SWITCH
    void *     sp;
#else
    ucontext_t context;
#endif
};

fiber  fibers[MAX_THREADS];
fiber * self;
char * stacks;
char   slots[MAX_THREADS/LANES][2][LANES*SLOT];
const launch * job;

#if EMU_OWN_SWITCH
void * scheduler_sp;

// Saves the callee-saved registers, switches stacks, and restores the registers saved there.
extern "C" void emu_switch(void ** save, void * load);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch, .-emu_switch
)");
void to_scheduler()      { emu_switch(&self->sp, scheduler_sp); }
void to_fiber(fiber & f) { emu_switch(&scheduler_sp, f.sp); }
#else
ucontext_t scheduler;
void to_scheduler()      { swapcontext(&self->context, &scheduler); }
void to_fiber(fiber & f) { swapcontext(&scheduler, &f.context); }
#endif

void stop(state st) {
    self->st = st;
    self->n_barriers++;
    to_scheduler();
}

void fiber_main() {
    job->kernel();
    self->st = DONE;
    to_scheduler();
    fail("a thread went on after its end");
}

void prepare(fiber & f, int i) {
    char * top = stacks + (size_t) (i + 1)*STACK;
    f.st = RUNS;
    f.n_barriers = f.n_exchanges = 0;
#if EMU_OWN_SWITCH
    void ** sp = (void **) top;
    *--sp = nullptr;               // the return address of fiber_main; also aligns its stack
    *--sp = (void *) &fiber_main;  // where emu_switch returns to
    for (int r = 0; r < 6; ++r) {
        *--sp = nullptr;
    }
    f.sp = sp;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp   = top - STACK;
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link          = nullptr;
    makecontext(&f.context, fiber_main, 0);
#endif
}

// Runs the lanes in turn until all are at a barrier of the threadgroup or have ended; returns which of the two.
state run_simdgroup(fiber * lanes) {
    for (;;) {
        for (int i = 0; i < LANES; ++i) {
            self    = lanes + i;
            current = &self->id;
            self->st = RUNS;
            to_fiber(*self);
        }
        for (int i = 1; i < LANES; ++i) {
            if (lanes[i].st != lanes[0].st || lanes[i].n_barriers != lanes[0].n_barriers || lanes[i].n_exchanges != lanes[0].n_exchanges) {
                fail("lanes 0 and %d of a simdgroup part: states %d and %d, barriers %llu and %llu", i, lanes[0].st, lanes[i].st,
                    (unsigned long long) lanes[0].n_barriers, (unsigned long long) lanes[i].n_barriers);
            }
        }
        if (lanes[0].st != AT_SIMDGROUP_BARRIER) {
            return lanes[0].st;
        }
    }
}

void run_threadgroup(int n_simdgroups) {
    for (;;) {
        state all = RUNS;
        for (int g = 0; g < n_simdgroups; ++g) {
            const state st = run_simdgroup(fibers + LANES*(reverse_simdgroups ? n_simdgroups - 1 - g : g));
            if (g > 0 && st != all) {
                fail("simdgroups of a threadgroup part");
            }
            all = st;
        }
        if (all == DONE) {
            return;
        }
    }
}

} // namespace

void threadgroup_barrier() { stop(AT_THREADGROUP_BARRIER); }
void simdgroup_barrier()   { stop(AT_SIMDGROUP_BARRIER); }

// Two alternating sets: a lane at its next exchange must not overwrite values that others have yet to read.
char * exchange_slots() {
    return slots[self->id.index/LANES][self->n_exchanges++ % 2];
}

void run(const launch & l) {
    const uint32_t n = l.threads[0]*l.threads[1]*l.threads[2];
    if (n == 0 || n > MAX_THREADS || n % LANES != 0) {
        fail("%u threads in a threadgroup", n);
    }
    if (l.memory > 32768) {
        fail("%zu bytes of threadgroup memory, more than Apple's GPUs have", l.memory);
    }
    if (!stacks) {
        stacks = (char *) mmap(nullptr, MAX_THREADS*STACK, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) {
            fail("no memory for stacks");
        }
    }

    // NaN before the first write; the bytes behind it must not change
    constexpr size_t GUARD = 4096;
    std::vector<char> memory(l.memory + GUARD);
    threadgroup_memory = memory.data();
    job = &l;

    for (uint32_t z = 0; z < l.threadgroups[2]; ++z) {
        for (uint32_t y = 0; y < l.threadgroups[1]; ++y) {
            for (uint32_t x = 0; x < l.threadgroups[0]; ++x) {
                memset(memory.data(), 0xff, memory.size());
                for (uint32_t i = 0; i < n; ++i) {
                    fiber & f = fibers[i];
                    f.id = {{x, y, z}, {l.threads[0], l.threads[1], l.threads[2]},
                            {i % l.threads[0], i/l.threads[0] % l.threads[1], i/(l.threads[0]*l.threads[1])}, i};
                    prepare(f, i);
                }
                run_threadgroup(n/LANES);
                for (size_t i = 0; i < GUARD; ++i) {
                    if (memory[l.memory + i] != (char) 0xff) {
                        fail("written %zu bytes past the end of threadgroup memory", i);
                    }
                }
            }
        }
    }
}

} // namespace emu
