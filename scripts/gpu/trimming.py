"""Leaves kernel instances out of a CUDA tree, which then compiles in minutes instead of half an hour.

The unpatched library is only timed. So flash attention is needed only for the head size of the timed models. Quantized
matrix products are needed only for the types of the models.

A left-out kernel becomes a function that aborts with a message. The program still links, and a missing kernel can't be
measured by mistake. The other kernels stay unchanged.

    smaller = trim(tree, heads=(128,), matrices=("Q8_0", "Q4_0"))
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

INSTANCES = "ggml/src/ggml-cuda/template-instances/"
#: Weight types that keep quantized products. swaa_edge.shapes writes no other quantized types.
MATRICES = ("Q8_0", "Q4_0")

_CALL = re.compile(r"^(DECL_(?:FATTN_MMA_F16|FATTN_TILE|FATTN_VEC|MMQ)_CASE\w*)\(([^)]*)\);[ \t]*\n", re.MULTILINE)
_CONTEXT = "ggml_backend_cuda_context &"
_ABORT = '{ GGML_ABORT("this kernel is left out of the check\'s build"); }'
# For each macro: file name of the stubs, template, instance. Upstream's build finds the file by name.
_STUBS = {
    "DECL_FATTN_MMA_F16_CASE": (
        "fattn-mma-left-out.cu",
        f"template <int DKQ, int DV, int ncols1, int ncols2> void ggml_cuda_flash_attn_ext_mma_f16_case({_CONTEXT}, "
        f"ggml_tensor *) {_ABORT}\n",
        "template void ggml_cuda_flash_attn_ext_mma_f16_case<{0}>(ggml_backend_cuda_context &, ggml_tensor *);\n",
    ),
    "DECL_FATTN_TILE_CASE": (
        "fattn-tile-left-out.cu",
        f"template <int DKQ, int DV> void ggml_cuda_flash_attn_ext_tile_case({_CONTEXT}, ggml_tensor *) {_ABORT}\n",
        "template void ggml_cuda_flash_attn_ext_tile_case<{0}>(ggml_backend_cuda_context &, ggml_tensor *);\n",
    ),
}


def trim(
    tree: Mapping[str, bytes], *, heads: Collection[int] | None = None, matrices: Collection[str] | None = MATRICES
) -> dict[str, bytes]:
    """Return a copy of `tree`, {path: content}, with fewer kernel instances.

    heads: head sizes that keep flash attention. None keeps all.
    matrices: types that keep quantized matrix products. None keeps all.
    """
    left_out: dict[str, list[str]] = {}

    def keep_or_note(call: re.Match[str]) -> str:
        macro, arguments = call.groups()
        if macro not in _STUBS or heads is None or int(arguments.split(",")[0]) in heads:
            return call.group()
        left_out.setdefault(macro, []).append(arguments)
        return ""

    smaller = dict(tree)
    for path in (path for path in sorted(tree) if path.startswith(INSTANCES) and path.endswith(".cu")):
        text = tree[path].decode()
        product = re.search(r"^DECL_MMQ_CASE\(GGML_TYPE_(\w+)\);", text, re.MULTILINE)
        leave_out = product and matrices is not None and product.group(1) not in matrices
        smaller[path] = (_without_products(text) if leave_out else _CALL.sub(keep_or_note, text)).encode()
    for macro, calls in left_out.items():
        name, template, instance = _STUBS[macro]
        lines = "".join(instance.format(arguments) for arguments in calls)
        smaller[INSTANCES + name] = f'#include "../common.cuh"\n\n{template}\n{lines}'.encode()
    return dict(sorted(smaller.items()))


def _without_products(text: str) -> str:
    """Return the text of an mmq instance file with functions that abort."""
    lines = "".join(
        f"template void mul_mat_q_case<{arguments}{', GGML_PREC_Q4' if macro.endswith('_W4A4') else ''}>"
        "(ggml_backend_cuda_context &, const mmq_args &, cudaStream_t);\n"
        for macro, arguments in _CALL.findall(text)
    )
    return (
        '#include "../common.cuh"\n\nstruct mmq_args;\n\n'
        "template <ggml_type type, ggml_prec prec_src1 = GGML_PREC_Q8>\n"
        f"void mul_mat_q_case({_CONTEXT}, const mmq_args &, cudaStream_t) {_ABORT}\n\n{lines}"
    )
