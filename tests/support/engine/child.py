"""The child process of `Engine`: runs models with the library of LLAMA_CPP_LIB_PATH.

A request names a method of Child: a whole run, or opening, calling and closing a context.

Use: not by hand; Engine runs `python -m support.engine.child`.
"""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

from support.engine.calls import Calls, last_error
from support.engine.protocol import claim_stdout, send, serve

POLICIES = {"auto": 0, "table": 1, "copy": 2, "dense": 3}
KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}


class Child:
    """The library, and at most one model with its context. Steps that are not methods here are those of Calls."""

    def __init__(self):
        import llama_cpp.llama_cpp as api

        from swaa_edge.native.backends import load_backends

        self.api = api
        logging.getLogger("llama-cpp-python").setLevel(logging.WARNING)  # its other messages are long
        load_backends(api._lib, Path(os.environ["LLAMA_CPP_LIB_PATH"]))
        api.llama_backend_init()
        self.swaa = hasattr(api._lib, "llama_swaa_abi_version")
        if self.swaa:
            api._lib.llama_swaa_last_error.restype = ctypes.c_char_p
        self.model = self.ctx = self.calls = None

    def reason(self) -> str:
        return last_error(self.api, self.swaa) or "no reason given"

    def abi(self) -> int:
        """Version of the llama_swaa functions; 0 without them."""
        return self.api._lib.llama_swaa_abi_version() if self.swaa else 0

    def run(self, path: str, overrides: dict, settings: dict, steps: list) -> dict:
        """Open, take all steps, close."""
        try:
            self.out = {"logits": [], "state": [], **self.open(path, overrides, settings)}
            self.saved = None
            for name, *arguments in steps:
                (getattr(self, f"step_{name}", None) or getattr(self.calls, name))(*arguments)
            return self.out
        finally:
            self.close()

    def open(self, path: str, overrides: dict, settings: dict) -> dict:
        """Load a model and make a context for `call`; closes what was open."""
        self.close()
        self.model = self.load(path, overrides, settings["gpu_layers"])
        self.ctx = self.context(self.model, settings)
        vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.calls = Calls(self.api, self.swaa, self.ctx, vocab)
        facts = {"config": self.config(self.model), "policy": "off"}
        if facts["config"]:
            self.api._lib.llama_swaa_get_policy.argtypes = [ctypes.c_void_p]
            names = {v: k for k, v in POLICIES.items()}
            facts["policy"] = names[self.api._lib.llama_swaa_get_policy(self.ctx)]
        return facts

    def call(self, name: str, arguments: tuple) -> dict:
        """Call the open context; returns the value, and last_error afterwards."""
        if self.calls is None:
            raise RuntimeError("no context is open")
        value = getattr(self.calls, name)(*arguments)
        return {"value": value, "reason": self.calls.last_error()}

    def close(self) -> dict:
        if self.ctx is not None:
            self.api.llama_free(self.ctx)
        if self.model is not None:
            self.api.llama_model_free(self.model)
        self.model = self.ctx = self.calls = None
        return {}

    def load(self, path: str, overrides: dict, gpu_layers: int):
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        # Only the log of llama.cpp reports how many layers it put there.
        logging.getLogger("llama-cpp-python").setLevel(logging.INFO if gpu_layers else logging.WARNING)
        array = (self.api.llama_model_kv_override * (len(overrides) + 1))()
        for entry, (key, value) in zip(array, overrides.items(), strict=False):
            entry.key = key.encode()
            if isinstance(value, bool):
                entry.tag, entry.value.val_bool = self.api.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
            elif isinstance(value, int):
                entry.tag, entry.value.val_i64 = self.api.LLAMA_KV_OVERRIDE_TYPE_INT, value
            elif isinstance(value, float):
                entry.tag, entry.value.val_f64 = self.api.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
            else:
                if len(value) > 127:
                    raise ValueError(f"override {key} has {len(value)} characters, llama.cpp allows 127")
                entry.tag, entry.value.val_str = self.api.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        if overrides:  # the array ends with the entry whose key is empty
            params.kv_overrides = array
        model = self.api.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise RuntimeError(f"model refused: {self.reason()}")
        return model

    def context(self, model, settings: dict):
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = settings["n_ctx"], settings["n_batch"], settings["n_ubatch"]
        params.n_seq_max, params.kv_unified = settings["sequences"], settings["unified"]
        params.swa_full = settings["swa_full"]
        params.n_threads = params.n_threads_batch = settings["threads"]
        params.type_k = params.type_v = KV_TYPES[settings["kv"]]
        params.flash_attn_type = int(settings["flash_attn"])
        if self.swaa:
            if self.api._lib.llama_swaa_set_default_policy(POLICIES[settings["policy"]]) != 0:
                raise RuntimeError(f"policy {settings['policy']} refused: {self.reason()}")
        elif settings["policy"] != "auto":
            raise RuntimeError("the library has no SWAA, so it takes no policy")
        context = self.api.llama_init_from_model(model, params)
        if not context:
            raise RuntimeError(f"context refused: {self.reason()}")
        return context

    def config(self, model) -> dict | None:
        if not self.swaa:
            return None
        head = (ctypes.c_uint32 * 5)()
        ask = self.api._lib.llama_swaa_model_config
        ask.restype = ctypes.c_bool
        ask.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
        if not ask(model, head, None, None, 0):
            return None
        sliding, fa_decode = (ctypes.c_uint8 * head[3])(), (ctypes.c_uint8 * head[3])()
        ask(model, head, sliding, fa_decode, head[3])
        return {
            "window_size": head[1],
            "sink_count": head[2],
            "tail_count": head[4],
            "sliding": tuple(bool(x) for x in sliding),
            "fa_decode": tuple(bool(x) for x in fa_decode),
        }

    # The steps of `run`; a refusal is raised.

    def step_phase(self, name: str) -> None:
        if self.calls.phase(name) != 0:
            raise RuntimeError(f"phase {name} refused")

    def step_decode_from(self, seq: int, position: int) -> None:
        if self.calls.decode_from(seq, position) != 0:
            raise RuntimeError(f"decode boundary {position} of sequence {seq} refused")

    def step_decode(self, entries: list, phase: str | None = None) -> None:
        self.keep_logits(*self.calls.decode(entries, phase))

    def step_decode_plain(self, tokens: list) -> None:
        self.keep_logits(*self.calls.decode_plain(tokens))

    def keep_logits(self, code: int, logits) -> None:
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        self.out["logits"].append(logits)

    def step_seq_rm(self, seq: int, p0: int, p1: int) -> None:
        if not self.calls.seq_rm(seq, p0, p1):
            raise RuntimeError(f"llama_memory_seq_rm({seq}, {p0}, {p1}) refused")

    def step_state_get(self, seq: int) -> None:
        self.saved = self.calls.state_get(seq)
        self.out["state"].append(len(self.saved))

    def step_state_set(self, seq: int) -> None:
        if not self.calls.state_set(self.saved, seq):
            raise RuntimeError(f"the state of sequence {seq} was refused")


def main() -> None:
    out = claim_stdout()
    child = Child()
    send(out, {"swaa": child.swaa, "abi": child.abi()})
    serve(child, out)


if __name__ == "__main__":
    main()
