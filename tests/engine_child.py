"""The process that `engine.Engine` starts and that may abort: it serves runs with the library of LLAMA_CPP_LIB_PATH.

It is apart from the tests so that a crash in C ends this process only. Requests and answers are pickles with their
length in front, on stdin and stdout; whatever C prints goes to stderr.

Use: none by hand; `python tests/engine_child.py` is what Engine runs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np

PHASES = {"auto": 0, "prefill": 1, "decode": 2}
POLICIES = {"auto": 0, "table": 1, "copy": 2, "dense": 3}
KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}


class Child:
    """The library and what a run needs of it; methods named step_* are the steps."""

    def __init__(self):
        import llama_cpp.llama_cpp as api

        from swaa_edge.backends import load_backends

        self.api = api
        logging.getLogger("llama-cpp-python").setLevel(logging.WARNING)  # what else it says is long
        load_backends(api._lib, Path(os.environ["LLAMA_CPP_LIB_PATH"]))
        api.llama_backend_init()
        self.swaa = hasattr(api._lib, "llama_swaa_abi_version")
        if self.swaa:
            api._lib.llama_swaa_last_error.restype = ctypes.c_char_p

    def reason(self) -> str:
        return (api_text(self.api._lib.llama_swaa_last_error()) if self.swaa else "") or "no reason given"

    def run(self, path: str, overrides: dict, settings: dict, steps: list) -> dict:
        model = self.load(path, overrides)
        context = None
        try:
            context = self.context(model, settings)
            self.ctx, self.memory = context, self.api.llama_get_memory(context)
            self.vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(model))
            self.out = {"logits": [], "state": [], "config": self.config(model), "policy": "off"}
            if self.swaa:
                self.api._lib.llama_swaa_get_policy.argtypes = [ctypes.c_void_p]
                names = {v: k for k, v in POLICIES.items()}
                self.out["policy"] = (
                    names[self.api._lib.llama_swaa_get_policy(context)] if self.out["config"] else "off"
                )
            self.saved = None
            for name, *arguments in steps:
                getattr(self, f"step_{name}")(*arguments)
            return self.out
        finally:
            if context is not None:
                self.api.llama_free(context)
            self.api.llama_model_free(model)

    def load(self, path: str, overrides: dict):
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
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
                    raise ValueError(f"override {key} has {len(value)} characters, llama.cpp takes 127")
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
        params.n_threads = params.n_threads_batch = settings["threads"]
        params.type_k = params.type_v = KV_TYPES[settings["kv"]]
        params.flash_attn_type = int(settings["flash_attn"])
        if self.swaa:
            if self.api._lib.llama_swaa_set_default_policy(POLICIES[settings["policy"]]) != 0:
                raise RuntimeError(f"policy {settings['policy']} refused: {self.reason()}")
        elif settings["policy"] != "auto":
            raise RuntimeError("a policy was asked of a library without SWAA")
        context = self.api.llama_init_from_model(model, params)
        if not context:
            raise RuntimeError(f"context refused: {self.reason()}")
        return context

    def config(self, model) -> dict | None:
        if not self.swaa:
            return None
        head = (ctypes.c_uint32 * 4)()
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
            "sliding": tuple(bool(x) for x in sliding),
            "fa_decode": tuple(bool(x) for x in fa_decode),
        }

    def step_phase(self, name: str) -> None:
        if not self.swaa:
            raise RuntimeError("a phase was asked of a library without SWAA")
        function = self.api._lib.llama_swaa_set_phase
        function.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        if function(self.ctx, PHASES[name]) != 0:
            raise RuntimeError(f"phase {name} refused")

    def step_threads(self, n: int) -> None:
        self.api.llama_set_n_threads(self.ctx, n, n)

    def step_decode(self, entries: list, phase: str | None = None) -> None:
        if phase is not None:
            self.step_phase(phase)
        owners = max(len(seqs) for _, _, seqs, _ in entries)
        batch = self.api.llama_batch_init(len(entries), 0, owners)
        try:
            batch.n_tokens = len(entries)
            for i, (token, position, seqs, want) in enumerate(entries):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, len(seqs), want
                for k, seq in enumerate(seqs):
                    batch.seq_id[i][k] = seq
            code = self.api.llama_decode(self.ctx, batch)
        finally:
            self.api.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        rows = sum(bool(want) for *_, want in entries)
        shape = (rows, self.vocab)
        pointer = self.api.llama_get_logits(self.ctx)
        self.out["logits"].append(np.ctypeslib.as_array(pointer, shape).copy() if rows else np.zeros(shape, np.float32))

    def step_decode_plain(self, tokens: list) -> None:
        array = (self.api.llama_token * len(tokens))(*tokens)
        code = self.api.llama_decode(self.ctx, self.api.llama_batch_get_one(array, len(tokens)))
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        pointer = self.api.llama_get_logits_ith(self.ctx, -1)
        self.out["logits"].append(np.ctypeslib.as_array(pointer, (1, self.vocab)).copy())

    def step_abort(self) -> None:
        os.abort()

    def step_seq_rm(self, seq: int, p0: int, p1: int) -> None:
        if not self.api.llama_memory_seq_rm(self.memory, seq, p0, p1):
            raise RuntimeError(f"llama_memory_seq_rm({seq}, {p0}, {p1}) refused")

    def step_seq_cp(self, source: int, target: int, p0: int, p1: int) -> None:
        self.api.llama_memory_seq_cp(self.memory, source, target, p0, p1)

    def step_seq_keep(self, seq: int) -> None:
        self.api.llama_memory_seq_keep(self.memory, seq)

    def step_seq_add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        self.api.llama_memory_seq_add(self.memory, seq, p0, p1, delta)

    def step_state_get(self, seq: int) -> None:
        size = self.api.llama_state_seq_get_size(self.ctx, seq)
        self.saved = (ctypes.c_uint8 * size)()
        self.out["state"].append(self.api.llama_state_seq_get_data(self.ctx, self.saved, size, seq))

    def step_state_set(self, seq: int) -> None:
        if not self.api.llama_state_seq_set_data(self.ctx, self.saved, len(self.saved), seq):
            raise RuntimeError(f"the state could not be put into sequence {seq}")


def api_text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


def main() -> None:
    """Serve runs from stdin to stdout until stdin ends; whatever C prints goes to stderr."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(answer: dict) -> None:
        body = pickle.dumps(answer)
        out.write(struct.pack("<Q", len(body)) + body)
        out.flush()

    child = Child()
    send({"swaa": child.swaa})
    while head := sys.stdin.buffer.read(8):
        request = pickle.loads(sys.stdin.buffer.read(struct.unpack("<Q", head)[0]))
        try:
            answer = child.run(*request)
        except Exception as error:  # reported to the parent, which raises it there
            answer = {"error": f"{type(error).__name__}: {error}"}
        send(answer)


if __name__ == "__main__":
    main()
