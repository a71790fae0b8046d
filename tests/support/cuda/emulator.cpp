// The device of emulator.h: fibers, barriers, warp-wide exchange, and the PTX that flash attention uses.

#include "emulator.h"

#include <algorithm>

namespace emu {

std::vector<thread>     threads;
std::vector<warp_state> warps;
thread * current;
dim3     grid, block;
uint3    block_index;
std::vector<char> shared;

static jmp_buf    main_jump;
static barrier    whole;
static int        n_alive;
static uint64_t   progress;
static const std::function<void()> * body;

static void meet(barrier & b, int n) {
    const uint64_t generation = b.generation;
    ++progress;
    if (++b.arrived >= n) {
        b.arrived = 0;
        ++b.generation;
        return;
    }
    while (b.generation == generation) {
        yield();
    }
}

// Contexts are entered once; afterwards longjmp switches them, without system calls.
void yield() {
    if (_setjmp(current->jump) == 0) {
        _longjmp(main_jump, 1);
    }
}

__attribute__((noinline)) static void resume(thread & t) {
    current = &t;
    if (_setjmp(main_jump) == 0) {
        if (t.started) {
            _longjmp(t.jump, 1);
        }
        t.started = true;
        setcontext(&t.context);
    }
}

void sync_block() {
    meet(whole, n_alive);
}

const uint64_t (* exchange(const uint64_t * values, int n))[16] {
    warp_state & w = warps[current->linear / WARP];
    auto & slots = w.slots[w.generation % 2];
    for (int i = 0; i < n; ++i) {
        slots[current->linear % WARP][i] = values[i];
    }
    const int n_lanes = std::min<int>(WARP, threads.size() - current->linear/WARP*WARP); // the last warp may be partial
    meet(w, n_lanes);
    return slots;
}

static void thread_main() {
    (*body)();
    current->done = true;
    --n_alive;
    ++progress;
    if (whole.arrived > 0 && whole.arrived >= n_alive) { // the waiting ones no longer wait for this one
        whole.arrived = 0;
        ++whole.generation;
    }
    yield();
}

void run_block(const std::function<void()> & kernel) {
    const int n = block.x*block.y*block.z;
    body    = &kernel;
    n_alive = n;
    whole   = {};
    threads.resize(n);
    warps.assign((n + WARP - 1)/WARP, {});
    for (int i = 0; i < n; ++i) {
        thread & t = threads[i];
        t.index  = { i % block.x, i/block.x % block.y, i/(block.x*block.y) };
        t.linear = i;
        t.done   = false;
        t.started = false;
        t.copies.clear();
        t.stack.resize(256*1024);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp   = t.stack.data();
        t.context.uc_stack.ss_size = t.stack.size();
        t.context.uc_link          = nullptr;
        makecontext(&t.context, thread_main, 0);
    }
    bool backwards = false; // so that no warp is always first
    while (n_alive > 0) {
        const uint64_t before = progress;
        for (int i = 0; i < n; ++i) {
            thread & t = threads[backwards ? n - 1 - i : i];
            if (!t.done) {
                resume(t);
            }
        }
        backwards = !backwards;
        if (progress == before) {
            fprintf(stderr, "deadlock: %d threads wait\n", n_alive);
            abort();
        }
    }
    for (const thread & t : threads) {
        if (!t.copies.empty()) {
            fprintf(stderr, "an asynchronous copy was never waited for\n");
            abort();
        }
    }
}

static float half_of(uint64_t bits, int i) {
    const uint16_t h = bits >> (16*i);
    half res;
    memcpy(&res, &h, sizeof(h));
    return __half2float(res);
}

static uint32_t halves(float a, float b) {
    const half2 h = __floats2half2_rn(a, b);
    uint32_t res;
    memcpy(&res, &h, sizeof(res));
    return res;
}

// D = A*B + D for 16 rows, 8 columns and a depth of k; fragments as PTX lays them out
static void mma(int k, bool f32, std::initializer_list<void *> out, std::initializer_list<uint64_t> in) {
    const int n_a = k/4, n_b = k/8;
    if (in.size() != size_t(n_a + n_b) || out.size() != (f32 ? 4 : 2)) {
        abort();
    }
    const auto slots = exchange(in.begin(), in.size());
    const int lane = current->linear % WARP, group = lane/4, t = lane%4;

    for (int i = 0; i < 4; ++i) {
        const int row = group + 8*(i/2), col = 2*t + i%2;
        float sum = 0.0f;
        for (int x = 0; x < k; ++x) {
            const uint64_t a = slots[(row % 8)*4 + (x % 8)/2][row/8 + 2*(x/8)];
            const uint64_t b = slots[col*4 + (x % 8)/2][n_a + x/8];
            sum += half_of(a, x % 2)*half_of(b, x % 2);
        }
        if (f32) {
            *(float *) out.begin()[i] += sum;
        } else {
            uint32_t * d = (uint32_t *) out.begin()[i/2];
            const float old[2] = { half_of(*d, 0), half_of(*d, 1) };
            *d = i % 2 == 0 ? halves(old[0] + sum, old[1]) : halves(old[0], old[1] + sum);
        }
    }
}

static void ldmatrix(bool trans, std::initializer_list<void *> out, uint64_t address) {
    const auto slots = exchange(&address, 1);
    const int lane = current->linear % WARP;
    for (size_t m = 0; m < out.size(); ++m) {
        uint16_t got[2];
        for (int i = 0; i < 2; ++i) {
            const int row = trans ? 2*(lane % 4) + i : lane/4;
            const int col = trans ? lane/4 : 2*(lane % 4) + i;
            const uint64_t p = slots[8*m + row][0];
            if (p % 16 != 0 || p < (uint64_t) shared.data() || p + 16 > (uint64_t) shared.data() + shared.size()) {
                fprintf(stderr, "ldmatrix outside of shared memory\n");
                abort();
            }
            got[i] = ((const uint16_t *) p)[col];
        }
        memcpy(out.begin()[m], got, sizeof(got));
    }
    exchange(nullptr, 0); // a register may hold the address
}

void ptx(const char * op, std::initializer_list<void *> out, std::initializer_list<uint64_t> in) {
    const auto is = [op](const char * what) { return strstr(op, what) != nullptr; };
    if (is("ldmatrix")) {
        ldmatrix(is(".trans"), out, *in.begin());
    } else if (is("mma.sync.aligned.m16n8k16.row.col.f32.f16")) {
        mma(16, true, out, in);
    } else if (is("mma.sync.aligned.m16n8k16.row.col.f16.f16")) {
        mma(16, false, out, in);
    } else if (is("mma.sync.aligned.m16n8k8.row.col.f32.f16")) {
        mma(8, true, out, in);
    } else if (is("mma.sync.aligned.m16n8k8.row.col.f16.f16")) {
        mma(8, false, out, in);
    } else if (is("movmatrix")) {
        const auto slots = exchange(in.begin(), 1);
        const int lane = current->linear % WARP;
        uint32_t res = 0;
        for (int i = 0; i < 2; ++i) {
            const int row = 2*(lane % 4) + i, col = lane/4;
            res |= ((slots[row*4 + col/2][0] >> (16*(col % 2))) & 0xFFFF) << (16*i);
        }
        memcpy(*out.begin(), &res, sizeof(res));
    } else if (is("cp.async.wait_all")) {
        for (const copy & c : current->copies) {
            memcpy(dynamic_shared() + c.dst, c.src, 16);
        }
        current->copies.clear();
    } else if (is("cp.async.cg")) {
        const uint32_t dst = *in.begin();
        const uint64_t src = in.begin()[1];
        if (dst % 16 != 0 || src % 16 != 0 || dst + 16 > shared.size()) {
            fprintf(stderr, "bad asynchronous copy\n");
            abort();
        }
        current->copies.push_back({ dst, (const void *) src });
    } else {
        fprintf(stderr, "PTX without an interpreter: %s\n", op);
        abort();
    }
}

} // namespace emu
