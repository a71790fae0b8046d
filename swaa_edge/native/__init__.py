"""The patched llama.cpp library: found, loaded under `llama_cpp` and checked, with our own C functions as Python.

from swaa_edge import native
llama_cpp = native.load(); native.set_phase(llm.ctx, native.Phase.PREFILL)
"""

from swaa_edge.native.abi import ABI_VERSION
from swaa_edge.native.functions import (
    AbortFlag,
    ModelConfig,
    Phase,
    Policy,
    can_continue,
    fingerprint,
    get_policy,
    holds,
    kv_bytes,
    last_error,
    model_config,
    ring_cells,
    set_default_policy,
    set_phase,
)
from swaa_edge.native.library import LLAMA_CPP_VERSION, PATH_VARIABLE, library_dir, load

__all__ = [
    "ABI_VERSION",
    "LLAMA_CPP_VERSION",
    "PATH_VARIABLE",
    "AbortFlag",
    "ModelConfig",
    "Phase",
    "Policy",
    "can_continue",
    "fingerprint",
    "get_policy",
    "holds",
    "kv_bytes",
    "last_error",
    "library_dir",
    "load",
    "model_config",
    "ring_cells",
    "set_default_policy",
    "set_phase",
]
