// KV block table of ggml_flash_attn_ext: what is common to all backends (see ggml-kv-blocks.h).

#include "ggml-kv-blocks.h"

void ggml_flash_attn_ext_set_kv_blocks(struct ggml_tensor * op, struct ggml_tensor * table) {
    const struct ggml_tensor * k    = op->src[1];
    const struct ggml_tensor * mask = op->src[3];

    GGML_ASSERT(op->op == GGML_OP_FLASH_ATTN_EXT);
    GGML_ASSERT(op->src[5] == NULL);
    GGML_ASSERT(table->type == GGML_TYPE_I32 && table->nb[0] == sizeof(int32_t));
    GGML_ASSERT(table->ne[0] > 0 && table->ne[1] == 1 && table->ne[2] == 1 && table->ne[3] == k->ne[3]);
    GGML_ASSERT(mask && mask->ne[0] % GGML_KV_BLOCK_SIZE == 0 && mask->ne[0] <= table->ne[0]*GGML_KV_BLOCK_SIZE);
    GGML_ASSERT(k->ne[1] % GGML_KV_BLOCK_SIZE == 0);

    op->src[5] = table;
}

bool ggml_backend_dev_supports_kv_blocks(ggml_backend_dev_t dev, const struct ggml_tensor * op) {
    if (op->op != GGML_OP_FLASH_ATTN_EXT || op->src[5] == NULL) {
        return true;
    }

    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    if (reg == NULL) {
        return false;
    }

    void * proc = ggml_backend_reg_get_proc_address(reg, GGML_KV_BLOCKS_PROC);

    return proc && ((ggml_backend_supports_kv_blocks_t) proc)(op);
}
