"""Saved states of SwaaLlama.

K and V are valid only under the model, settings and adapter that computed K and V. So a state records all three as
facts. A state with other facts is refused with the reason, and nothing is changed.

    state = save(llm, facts); check(llm, state, facts); load(llm, state)
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swaa_edge import native
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import StateError
from swaa_edge.metadata import PREFIX

llama_cpp = native.load()

#: Facts that K and V depend on. Keys appear in errors. Values are plain, because states are pickled.
Facts = dict[str, str]
_AGAIN = "evaluate the prompt again"


def facts_of(llm: llama_cpp.Llama, swaa: SwaaConfig | None, overrides: Mapping[str, Any] | None) -> Facts:
    """Return the facts about a loaded model.

    swaa: the settings in effect.
    overrides: the caller's kv_overrides.
    """
    params, adapter = llm.context_params, llm.lora_path
    # The engine ignores the labels.
    settings = {
        key: value for key, value in (swaa.to_dict() if swaa else {}).items() if key not in ("recipe", "adapter")
    }
    others = {key: value for key, value in (overrides or {}).items() if not key.startswith(PREFIX)}
    return {
        "SWAA settings": json.dumps(settings) if swaa else "off",
        "LoRA adapter": f"{_digest(adapter)} at scale {llm.lora_scale:g}" if adapter else "none",
        "types of K and V": f"{params.type_k} and {params.type_v}",
        "flash_attn": "on" if params.flash_attn_type else "off",
        "swa_full, or n_ctx": "a ring" if native.ring_cells(llm.ctx) else "no ring",
        "kv_overrides": json.dumps(others, sort_keys=True),
        # The fingerprint also covers the SWAA settings, so the fingerprint is compared last.
        "model or RoPE settings": f"{native.fingerprint(llm.ctx):016x}",
    }


def _digest(path: str) -> str:
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def save(llm: llama_cpp.Llama, facts: Facts) -> llama_cpp.llama.LlamaState:
    """Return the state of `llm`: a llama_cpp `LlamaState` with two more attributes, `facts` and `ring_cells`.

    ring_cells is the size of the ring. The state holds one copy of K and V. Logits are included only if `llm` keeps the
    logits of all tokens.

    Raises `StateError` if the engine fails.
    """
    size = llama_cpp.llama_state_get_size(llm.ctx)
    data = bytearray(size)  # upstream uses bytes, which would need a copy
    written = llama_cpp.llama_state_get_data(llm.ctx, (ctypes.c_uint8 * size).from_buffer(data), size)
    if not 0 < written <= size:
        raise StateError("the engine can't save its state; too little memory?")
    del data[written:]
    state = llama_cpp.llama.LlamaState(
        input_ids=llm.input_ids[: llm.n_tokens].copy(),
        scores=llm.scores[: llm.n_tokens if llm._logits_all else 0].copy(),
        n_tokens=llm.n_tokens,
        llama_state=data,
        llama_state_size=written,
        seed=llm._seed,
    )
    state.facts, state.ring_cells = dict(facts), native.ring_cells(llm.ctx)
    return state


def check(llm: llama_cpp.Llama, state: Any, facts: Facts) -> None:
    """Raise `StateError` if the state doesn't fit `llm`. `facts` are the facts of `llm`."""
    theirs = getattr(state, "facts", None)
    if not isinstance(theirs, Mapping):
        raise StateError(f"the state doesn't record which model and settings it belongs to; {_AGAIN}")
    for name, ours in facts.items():
        if theirs.get(name) != ours:
            raise StateError(
                f"the state was saved under other {name}: {theirs.get(name)}, here {ours}; "
                f"load it under the same {name}, or {_AGAIN}"
            )
    if not _is_sound(state, llm.n_vocab()):
        raise StateError(f"the state is damaged; {_AGAIN}")
    n_ctx, ring = llm.n_ctx(), native.ring_cells(llm.ctx)
    if state.n_tokens > n_ctx:
        raise StateError(f"the state holds {state.n_tokens} tokens, but the context has room for {n_ctx}; raise n_ctx")
    if min(state.n_tokens, state.ring_cells) > ring > 0:
        raise StateError(
            f"the state's ring has {state.ring_cells} cells, but this context's ring has {ring}; "
            f"raise n_ubatch, or {_AGAIN}"
        )


def _is_sound(state: Any, n_vocab: int) -> bool:
    try:
        n_tokens, ids, scores = state.n_tokens, np.asarray(state.input_ids), np.asarray(state.scores)
        tokens = ids[:n_tokens]
        return bool(
            ids.ndim == 1
            and ids.dtype.kind == "i"
            and 0 <= n_tokens == tokens.size
            and (n_tokens == 0 or (tokens.min() >= 0 and tokens.max() < n_vocab))
            and scores.shape in ((0, n_vocab), (n_tokens, n_vocab))
            and 0 < state.llama_state_size == len(state.llama_state)
            and isinstance(state.ring_cells, int)
            and isinstance(state.seed, int)
        )
    except (AttributeError, IndexError, TypeError, ValueError):
        return False


def load(llm: llama_cpp.Llama, state: llama_cpp.llama.LlamaState) -> None:
    """Load a checked state into the empty `llm`. Raises `StateError` if the engine refuses the state."""
    # A view, to avoid a copy of K and V.
    data = np.frombuffer(state.llama_state, np.uint8)
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    if llama_cpp.llama_state_set_data(llm.ctx, pointer, data.size) != data.size:
        llm._ctx.kv_cache_clear()
        raise StateError(f"the state is damaged, or memory ran out; {_AGAIN}")
    count = state.n_tokens
    llm.input_ids[:count] = state.input_ids[:count]
    if llm._logits_all:
        llm.scores[:count] = state.scores if len(state.scores) else np.nan
    llm.n_tokens, llm._seed = count, state.seed


class OwnStates(llama_cpp.llama_cache.BaseLlamaCache):
    """A view of a llama_cpp cache that finds only one owner's states. Other models and settings may share the cache.

    A hash of `facts` identifies the owner. Keys are token sequences, and llama_cpp returns the state whose key shares
    the longest prefix with the prompt. So the hash becomes part of each key's first token. Keys of different owners
    then share no prefix. States that were put directly into the underlying `cache` are also found.
    """

    def __init__(self, cache: llama_cpp.llama_cache.BaseLlamaCache, facts: Facts) -> None:
        super().__init__(getattr(cache, "capacity_bytes", 0))
        self.cache = cache
        self._owner = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _key(self, tokens: Sequence[int]) -> tuple[Any, ...]:
        return ((self._owner, *tokens[:1]), *tokens[1:])

    @property
    def cache_size(self) -> int:
        return self.cache.cache_size

    def __getitem__(self, tokens: Sequence[int]) -> llama_cpp.llama.LlamaState:
        try:
            return self.cache[self._key(tokens)]
        except KeyError:
            return self.cache[tokens]

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return self._key(tokens) in self.cache or tokens in self.cache

    def __setitem__(self, tokens: Sequence[int], state: llama_cpp.llama.LlamaState) -> None:
        self.cache[self._key(tokens)] = state
