// Cases of ggml_flash_attn_ext with a KV block table for test-backend-ops, which includes this file.
//
// Every case computes the attention twice, through the table and over gathered rows (stock ops only), and fails if they
// differ. So the row mapping is checked independently, on the CPU too. Masks are those of sliding windows (sink tokens,
// window edges, wholly masked tiles and rows, padding entries), and those of causal layers whose past has no mask.

#pragma once

#include "ggml-kv-blocks.h"

struct test_flash_attn_ext_kv_blocks : public test_case {
    const int64_t hs;  // head size
    const int64_t nh;  // KV heads
    const int64_t nr;  // query heads per KV head
    const int64_t kv;  // cells of a stream
    const int64_t nb;  // tokens of a stream
    const int64_t ns;  // streams
    const int64_t w;   // window; 0: causal, the blocks of the past are last and have no mask
    const int64_t s;   // sink tokens
    const int64_t pad; // padding entries of the table
    const ggml_type type_K;
    const ggml_type type_V;
    const bool  logit_sinks;
    const float max_bias;
    const float softcap;

    std::string vars() override {
        return VARS_TO_STR14(hs, nh, nr, kv, nb, ns, w, s, pad, type_K, type_V, logit_sinks, max_bias, softcap);
    }

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "FLASH_ATTN_EXT_KV_BLOCKS";
    }

    double max_nmse_err() override {
        return 5e-4;
    }

    bool run_whole_graph() override { return true; }

    test_flash_attn_ext_kv_blocks(int64_t hs, int64_t nh, int64_t nr, int64_t kv, int64_t nb, int64_t ns,
            int64_t w, int64_t s, int64_t pad, ggml_type type_K, ggml_type type_V,
            bool logit_sinks = false, float max_bias = 0.0f, float softcap = 0.0f)
        : hs(hs), nh(nh), nr(nr), kv(kv), nb(nb), ns(ns), w(w), s(s), pad(pad), type_K(type_K), type_V(type_V),
          logit_sinks(logit_sinks), max_bias(max_bias), softcap(softcap) {}

    // The tokens are the last of each stream; stream r has r*17 free cells behind them.
    int64_t pos_of(int64_t stream, int64_t token) const {
        return kv - nb - 17*stream + token;
    }

    std::vector<int32_t> live_blocks(int64_t stream) const {
        std::vector<int32_t> res;
        for (int64_t b = 0; b < kv/GGML_KV_BLOCK_SIZE; ++b) {
            const int64_t j0 = b*GGML_KV_BLOCK_SIZE;
            const int64_t j1 = j0 + GGML_KV_BLOCK_SIZE - 1;
            if (j0 < s || (j1 > pos_of(stream, 0) - std::max<int64_t>(w, 1) && j0 <= pos_of(stream, nb - 1))) {
                res.push_back(b);
            }
        }
        return res;
    }

    // Blocks without a mask, equally many in every stream: the streams' tokens start in the same block or the one before.
    int64_t n_unmasked() const {
        return w > 0 ? 0 : pos_of(ns - 1, 0)/GGML_KV_BLOCK_SIZE - 1;
    }

    int64_t n_masked() const {
        size_t res = 0;
        for (int64_t r = 0; r < ns; ++r) {
            res = std::max(res, live_blocks(r).size());
        }
        return res + pad;
    }

    // The rows of the cache are [hs, nh], as llama.cpp stores them.
    ggml_tensor * attend(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * m,
            ggml_tensor * sinks) const {
        const auto heads = [&](ggml_tensor * t) {
            t = ggml_view_4d(ctx, t, hs, nh, t->ne[1], ns, ggml_row_size(t->type, hs), t->nb[1], t->nb[2], 0);
            return ggml_permute(ctx, t, 0, 2, 1, 3);
        };
        ggml_tensor * res = ggml_flash_attn_ext(ctx, q, heads(k), heads(v), m, 1.0f/sqrtf(hs), max_bias, softcap);
        ggml_flash_attn_ext_add_sinks(res, sinks);
        ggml_prec_set_acc(res, GGML_PREC_F32);
        return res;
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const int64_t n_blk = n_masked() + n_unmasked();

        ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, hs, nb, nh*nr, ns);
        ggml_tensor * k = ggml_new_tensor_3d(ctx, type_K, hs*nh, kv, ns);
        ggml_tensor * v = ggml_new_tensor_3d(ctx, type_V, hs*nh, kv, ns);
        ggml_tensor * m = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_masked()*GGML_KV_BLOCK_SIZE, nb, 1, ns);
        ggml_tensor * a = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_blk*GGML_KV_BLOCK_SIZE, nb, 1, ns); // all columns
        ggml_tensor * t = ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_blk, 1, 1, ns);
        ggml_tensor * l = logit_sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, nh*nr) : nullptr;
        ggml_set_name(m, "m");
        ggml_set_name(a, "a");
        ggml_set_name(t, "t");

        ggml_tensor * by_table = attend(ctx, q, k, v, m, l);
        ggml_flash_attn_ext_set_kv_blocks(by_table, t);

        const auto gather = [&](ggml_tensor * c) {
            ggml_tensor * blocks = ggml_reshape_3d(ctx, c, c->ne[0]*GGML_KV_BLOCK_SIZE, kv/GGML_KV_BLOCK_SIZE, ns);
            ggml_tensor * rows   = ggml_get_rows(ctx, blocks, ggml_reshape_2d(ctx, t, n_blk, ns));
            return ggml_reshape_3d(ctx, ggml_cast(ctx, rows, GGML_TYPE_F16), c->ne[0], n_blk*GGML_KV_BLOCK_SIZE, ns);
        };
        ggml_tensor * by_rows = attend(ctx, q, gather(k), gather(v), a, l);

        ggml_tensor * out = ggml_concat(ctx, by_table, by_rows, 3);
        ggml_set_name(out, "out");
        return out;
    }

    double err(const float * a, const float * b, size_t n) override {
        return std::max(nmse(a, b, n), nmse(a, a + n/2, n/2));
    }

    void initialize_tensors(ggml_context * ctx) override {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != NULL; t = ggml_get_next_tensor(ctx, t)) {
            if (t->op != GGML_OP_NONE) {
                continue; // results and views; a view of the table must not overwrite it
            }
            if (strcmp(t->name, "m") == 0 || strcmp(t->name, "a") == 0) {
                init_mask(t);
            } else if (strcmp(t->name, "t") == 0) {
                init_table(t);
            } else {
                init_tensor_uniform(t);
            }
        }
    }

    void init_table(ggml_tensor * t) const {
        std::vector<int32_t> data;
        for (int64_t r = 0; r < ns; ++r) {
            auto blocks = live_blocks(r);
            blocks.resize(n_masked(), blocks.back());
            for (int64_t b = n_unmasked(); b > 0; --b) {
                blocks.push_back(b - 1); // any order will do
            }
            data.insert(data.end(), blocks.begin(), blocks.end());
        }
        ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
    }

    void init_mask(ggml_tensor * t) const {
        std::vector<float> data(ggml_nelements(t), -INFINITY);
        for (int64_t r = 0; r < ns; ++r) {
            const auto blocks = live_blocks(r);
            for (int64_t i = 0; i < nb; ++i) {
                const int64_t p = pos_of(r, i);
                float * row = data.data() + (r*nb + i)*t->ne[0];
                std::fill(row + n_masked()*GGML_KV_BLOCK_SIZE, row + t->ne[0], 0.0f);
                if (logit_sinks && nb > 8 && i == 3) {
                    continue; // this row sees only the sink's logit; without one, backends differ in what 0/0 is
                }
                for (size_t b = 0; b < blocks.size(); ++b) {
                    for (int64_t c = 0; c < GGML_KV_BLOCK_SIZE; ++c) {
                        const int64_t j = blocks[b]*GGML_KV_BLOCK_SIZE + c;
                        if (j <= p && (w == 0 || p - j < w || j < s) && j >= n_unmasked()*GGML_KV_BLOCK_SIZE) {
                            const float bias = -std::min<int64_t>(p - j, 16)/16.0f;
                            row[b*GGML_KV_BLOCK_SIZE + c] = max_bias > 0.0f ? bias : 0.0f;
                        }
                    }
                }
            }
        }
        std::vector<ggml_fp16_t> data_f16(data.size());
        ggml_fp32_to_fp16_row(data.data(), data_f16.data(), data.size());
        ggml_backend_tensor_set(t, data_f16.data(), 0, ggml_nbytes(t));
    }
};

static void add_flash_attn_ext_kv_blocks_cases(std::vector<std::unique_ptr<test_case>> & test_cases) {
    const auto add = [&](auto... args) {
        test_cases.emplace_back(new test_flash_attn_ext_kv_blocks(args...));
    };

    // shapes for every path: one token, a few, odd numbers, a whole ubatch
    for (int64_t nb : { 1, 2, 7, 65, 97, 512 }) {
        for (int64_t hs : { 64, 80, 128 }) {
            add(hs, 2, 4, 4096, nb, 1, 512, 64, 1, GGML_TYPE_F16, GGML_TYPE_F16);
        }
    }

    // window edges and sink tokens
    for (int64_t w : { 1, 255, 256, 257, 511, 513, 2047, 2048, 2049 }) {
        for (int64_t s : { 0, 1, 100, 257 }) {
            for (int64_t nb : { 1, 130 }) {
                add(64, 2, 2, 4096, nb, 1, w, s, 2, GGML_TYPE_F16, GGML_TYPE_F16);
            }
        }
    }

    // types of K and V, the same and mixed
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
            GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL }) {
        for (int64_t nb : { 1, 3, 75 }) {
            add(128, 2, 2, 4096, nb, 1, 300, 64, 1, type, type);
        }
        add(128, 2, 2, 4096, 33, 1, 300, 64, 1, GGML_TYPE_Q8_0, type);
        add(128, 2, 2, 4096, 33, 1, 300, 64, 1, type, GGML_TYPE_F16);
    }

    // rows that see nothing
    for (int64_t hs : { 64, 80, 128 }) {
        for (int64_t nb : { 9, 97, 512 }) {
            add(hs, 2, 4, 4096, nb, 1, 300, 64, 1, GGML_TYPE_F16, GGML_TYPE_F16, true);
        }
    }
    add(128, 2, 4, 4096, 97, 1, 300, 64, 1, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, true);

    // streams, logit sinks, ALiBi, soft cap
    for (int64_t ns : { 1, 2, 3 }) {
        for (int64_t nb : { 1, 70 }) {
            add(128, 2, 4, 4096, nb, ns, 700, 100, 3, GGML_TYPE_F16, GGML_TYPE_F16);
            add(128, 2, 4, 4096, nb, ns, 700, 100, 3, GGML_TYPE_F16, GGML_TYPE_F16, true, 0.0f, 0.0f);
            add(128, 2, 4, 4096, nb, ns, 700, 100, 3, GGML_TYPE_F16, GGML_TYPE_F16, true, 8.0f, 30.0f);
        }
    }

    // causal layers whose past has no mask
    for (int64_t ns : { 1, 2 }) {
        for (int64_t nb : { 1, 2, 65, 130, 512 }) {
            for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
                add(128, 2, 2, 4096, nb, ns, 0, 0, 1, type, type);
            }
        }
        add(64, 2, 2, 4096, 70, ns, 0, 0, 2, GGML_TYPE_F16, GGML_TYPE_F16, true, 0.0f, 30.0f);
    }

    // long caches
    for (int64_t kv : { 8192, 32768 }) {
        for (int64_t nb : { 1, 97 }) {
            add(128, 2, 2, kv, nb, 1, 2048, 64, 1, GGML_TYPE_F16, GGML_TYPE_F16);
        }
    }
}
