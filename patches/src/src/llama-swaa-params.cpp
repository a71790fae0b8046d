// Reads and checks the `swaa.*` keys, version 1 (see llama-swaa-params.h).

#include "llama-swaa-params.h"

#include "llama-swaa.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <type_traits>

static thread_local std::string swaa_last_error;

const char * llama_swaa_last_error(void) {
    return swaa_last_error.c_str();
}

void llama_swaa_clear_error() {
    swaa_last_error.clear();
}

void llama_swaa_set_error(const std::string & message) {
    swaa_last_error = message;
}

void llama_swaa_refuse_request(const std::string & message) {
    llama_swaa_set_error(message);
    LLAMA_LOG_ERROR("SWAA: %s\n", message.c_str());
}

void llama_swaa_refuse(const std::string & message) {
    llama_swaa_set_error(message);
    throw std::runtime_error(message);
}

bool llama_swaa_params::any_sliding() const {
    return enabled && std::find(sliding.begin(), sliding.end(), true) != sliding.end();
}

namespace {

constexpr uint32_t SWAA_KEYS_VERSION = 1;

// FNV-1a, 64 bits: the same on all platforms, since it is stored in files
class swaa_hash {
public:
    void add(const void * data, size_t size) {
        for (size_t i = 0; i < size; ++i) {
            value = (value ^ ((const uint8_t *) data)[i])*0x100000001b3;
        }
    }

    void add(const std::string & text) {
        add(text.data(), text.size());
        add(uint64_t(text.size()));
    }

    template<typename T> void add(T number) {
        static_assert(std::is_arithmetic_v<T>);
        add(&number, sizeof(number));
    }

    uint64_t value = 0xcbf29ce484222325;
};

constexpr size_t N_SAMPLES   = 64;   // tensors that are sampled, or a few more
constexpr size_t SAMPLE_SIZE = 1024; // bytes of each

// Hash of the shape of a model and a sample of its weights, not of its metadata, so that a file keeps its hash with
// other swaa keys, names or devices.
uint64_t hash_file(const llama_model_loader & ml) {
    swaa_hash res;

    res.add(ml.get_arch_name());

    const size_t step = std::max<size_t>(1, ml.weights_map.size()/N_SAMPLES);

    size_t i = 0;
    for (const auto & [name, weight] : ml.weights_map) {
        res.add(name);
        res.add((int32_t) weight.tensor->type);
        for (const int64_t n : weight.tensor->ne) {
            res.add(n);
        }

        // O_DIRECT would need aligned buffers
        if (i++ % step == 0 && weight.idx < ml.files.size() && !ml.files[weight.idx]->has_direct_io()) {
            const size_t size = ggml_nbytes(weight.tensor);

            std::vector<uint8_t> sample(std::min(size, SAMPLE_SIZE));

            ml.files[weight.idx]->seek(weight.offs + (size - sample.size())/2, SEEK_SET);
            ml.files[weight.idx]->read_raw(sample.data(), sample.size());

            res.add(sample.data(), sample.size());
        }
    }

    return res.value;
}

// One key: an override takes precedence over the file.
class swaa_key {
public:
    swaa_key(const llama_model_loader & ml, const char * name) :
        name(name), file(ml.metadata), id(gguf_find_key(file, name)) {
        const auto it = ml.kv_overrides.find(name);
        if (it != ml.kv_overrides.end()) {
            override = &it->second;
        }
    }

    bool present() const {
        return override || id >= 0;
    }

    bool flag() const {
        if (override) {
            expect(override->tag == LLAMA_KV_OVERRIDE_TYPE_BOOL, "its override must be a bool");
            return override->val_bool;
        }
        expect_type(GGUF_TYPE_BOOL);
        return gguf_get_val_bool(file, id);
    }

    uint32_t number(int64_t min, int64_t max) const {
        int64_t value;
        if (override) {
            expect(override->tag == LLAMA_KV_OVERRIDE_TYPE_INT, "its override must be an int");
            value = override->val_i64;
        } else {
            expect_type(GGUF_TYPE_UINT32);
            value = gguf_get_val_u32(file, id);
        }
        expect(value >= min && value <= max, format("is %lld, but must be from %lld to %lld",
                    (long long) value, (long long) min, (long long) max));
        return (uint32_t) value;
    }

    std::vector<bool> per_layer(uint32_t n_layer) const {
        std::vector<bool> result(n_layer);
        if (override) {
            expect(override->tag == LLAMA_KV_OVERRIDE_TYPE_STR, "its override must be a string of 0 and 1");
            const std::string text = override->val_str;
            expect_length(text.size(), n_layer);
            expect(text.find_first_not_of("01") == std::string::npos, "its override must hold only 0 and 1");
            for (uint32_t il = 0; il < n_layer; ++il) {
                result[il] = text[il] == '1';
            }
        } else {
            expect_type(GGUF_TYPE_ARRAY);
            const gguf_type type = gguf_get_arr_type(file, id);
            expect(type == GGUF_TYPE_BOOL, format("is an array of %s, but must be an array of bool", gguf_type_name(type)));
            expect_length(gguf_get_arr_n(file, id), n_layer);
            const int8_t * data = (const int8_t *) gguf_get_arr_data(file, id);
            for (uint32_t il = 0; il < n_layer; ++il) {
                result[il] = data[il] != 0;
            }
        }
        return result;
    }

private:
    void expect(bool ok, const std::string & otherwise) const {
        if (!ok) {
            llama_swaa_refuse(std::string(name) + ": " + otherwise);
        }
    }

    void expect_type(gguf_type type) const {
        expect(id >= 0, "is missing, but the other swaa keys need it");
        const gguf_type found = gguf_get_kv_type(file, id);
        expect(found == type, format("has type %s, but must be %s", gguf_type_name(found), gguf_type_name(type)));
    }

    void expect_length(size_t length, uint32_t n_layer) const {
        expect(length == n_layer, format("has %zu entries, but the model has %u layers", length, n_layer));
    }

    const char * name;
    const gguf_context * file;
    const int64_t id;
    const llama_model_kv_override * override = nullptr;
};

} // namespace

uint64_t llama_swaa_params::hash() const {
    if (!any_sliding()) {
        return 0;
    }

    swaa_hash res;

    res.add(window_size);
    res.add(sink_count);
    if (tail_count > 0) { // states without a tail keep the hash they had before there was one
        res.add(tail_count);
    }
    for (size_t il = 0; il < sliding.size(); ++il) {
        res.add(uint8_t(sliding[il] + 2*fa_decode[il]));
    }

    return res.value;
}

uint64_t llama_swaa_model_hash(const llama_model & model, const llama_cparams & cparams) {
    swaa_hash res;

    res.add(model.swaa.file_hash);

    for (const float value : { cparams.rope_freq_base, cparams.rope_freq_scale, cparams.yarn_ext_factor,
            cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow }) {
        res.add(value);
    }
    res.add(cparams.n_ctx_orig_yarn);

    return res.value;
}

// Refuses architectures that can be recognised at load; the context checks memory and graph.
static void swaa_check_arch(const llama_model & model) {
    const auto & hparams = model.hparams;

    const char * reason =
        hparams.swa_type != LLAMA_SWA_TYPE_NONE                             ? "it has a sliding window of its own"  :
        hparams.is_mla()                                                    ? "it uses multi-head latent attention" :
        llm_arch_is_recurrent(model.arch) || llm_arch_is_hybrid(model.arch) ? "it keeps recurrent state"            :
        !hparams.causal_attn || llm_arch_is_diffusion(model.arch)           ? "its attention is not causal"         :
        llama_model_has_encoder(&model)                                     ? "it has an encoder"                   :
        nullptr;

    if (reason) {
        llama_swaa_refuse(format("SWAA can't be applied to architecture '%s': %s; load it with swaa.enabled=false",
                    model.arch_name().c_str(), reason));
    }
}

void llama_swaa_params_load(const llama_model_loader & ml, llama_model & model) {
    llama_swaa_clear_error();

    model.swaa = {};
    model.swaa.file_hash = hash_file(ml);

    const swaa_key enabled  (ml, "swaa.enabled");
    const swaa_key version  (ml, "swaa.version");
    const swaa_key window   (ml, "swaa.window_size");
    const swaa_key sinks    (ml, "swaa.sink_count");
    const swaa_key tail     (ml, "swaa.tail_count");
    const swaa_key sliding  (ml, "swaa.sliding_layers");
    const swaa_key fa_decode(ml, "swaa.fa_decode_layers");

    const bool any_key = version.present() || window.present() || sinks.present() || tail.present() ||
        sliding.present() || fa_decode.present();

    if (!any_key || (enabled.present() && !enabled.flag())) {
        return;
    }

    const uint32_t n_layer = model.hparams.n_layer_all;

    // checked first: in a newer version the other keys may mean something else
    version.number(1, SWAA_KEYS_VERSION);

    llama_swaa_params params;

    params.window_size = window.number(1, INT32_MAX);
    params.sink_count  = sinks .number(0, INT32_MAX);
    params.tail_count  = tail.present() ? tail.number(0, INT32_MAX) : 0;
    params.sliding     = sliding  .per_layer(n_layer);
    params.fa_decode   = fa_decode.per_layer(n_layer);
    params.enabled     = true;
    params.file_hash   = model.swaa.file_hash;

    for (uint32_t il = 0; il < n_layer; ++il) {
        params.fa_decode[il] = params.fa_decode[il] && params.sliding[il];
    }

    if (params.any_sliding()) {
        swaa_check_arch(model);
    }

    model.swaa = std::move(params);

    LLAMA_LOG_INFO("%s: SWAA: window = %u, sink tokens = %u, tail = %u, sliding layers = %d of %u\n", __func__,
            model.swaa.window_size, model.swaa.sink_count, model.swaa.tail_count,
            (int) std::count(model.swaa.sliding.begin(), model.swaa.sliding.end(), true), n_layer);
}
