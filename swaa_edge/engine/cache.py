"""The half of SwaaLlama that deals with what is in the KV cache: going back, states, shifts.

A ring holds the sinks, the window and a little more. So each way back asks the engine first, and where the ring can't
serve it, a checkpoint does, or the tokens are evaluated again, or the caller is told; nobody gets a wrong answer.

    state = llm.save_state(); llm.load_state(state); llm.shift()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from swaa_edge import native
from swaa_edge.config import SwaaConfig
from swaa_edge.engine import states
from swaa_edge.engine.contextshift import plan_shift
from swaa_edge.engine.snapshots import Checkpoints
from swaa_edge.errors import GenerationError

llama_cpp = native.load()


class CachedLlama(llama_cpp.Llama):
    """llama_cpp.Llama on a cache that may be a ring; a part of `SwaaLlama`, not to be used by itself."""

    _swaa: SwaaConfig | None
    # Where the next token would go and which it is, if `sample` just returned it.
    _sampled: tuple[int, int] | None
    _rows: int

    def _open_cache(self, checkpoints: int, overrides: Mapping[str, Any] | None) -> None:
        """To be called when the model is loaded and `_swaa` is known."""
        self._checkpoints = Checkpoints(self.ctx, checkpoints)
        self._facts = states.facts_of(self, self._swaa, overrides)

    @property
    def kv_bytes(self) -> int:
        """Bytes that the context has allocated for K and V; `kvsize.kv_size` tells them beforehand."""
        return native.kv_bytes(self.ctx)

    @property
    def ctx(self) -> Any:
        """As upstream: the `llama_context *`. Raises `GenerationError` after `close`."""
        return self._ctx.ctx

    def reset(self) -> None:
        """As upstream: the next tokens are the first."""
        super().reset()
        self._checkpoints.clear()

    def _cut(self) -> None:
        """Remove what lies behind the first `n_tokens`. Raises `GenerationError` if that can't be, changing nothing."""
        memory = llama_cpp.llama_get_memory(self.ctx)
        if memory and not llama_cpp.llama_memory_seq_rm(memory, 0, self.n_tokens, -1):
            raise GenerationError(
                f"the cache can't go back to {self.n_tokens} tokens: its ring has forgotten what they need; "
                "call reset() and evaluate all tokens again, or load the model with swa_full=True"
            )

    def _reach_prefix(self, tokens: list[int]) -> None:
        """Bring the cache to where upstream can go on with `tokens`, if a ring is in the way of its usual cut."""
        length = min(self.n_tokens, len(tokens))
        differs = self.input_ids[:length] != np.asarray(tokens[:length], np.intc)
        shared = int(differs.argmax()) if differs.any() else length
        if shared == len(tokens) == self.n_tokens and not self._requires_eval:
            return
        wanted = shared - (shared == len(tokens))  # the last token is evaluated again, for its logits
        if native.can_continue(self.ctx, 0, wanted):
            return
        end = self._checkpoints.restore(wanted)
        if end is None:
            self.reset()
        else:
            self.n_tokens, self._requires_eval = end, True

    def save_state(self) -> Any:
        """As upstream, but small: one copy of K and V, and logits only with logits_all.

        The state can be pickled and kept in upstream's caches. It says which model, settings and adapter it is of.
        Raises `StateError` if the engine fails.
        """
        return states.save(self, self._facts)

    def load_state(self, state: Any) -> None:
        """Go on where `save_state` was called, here or in another object of the same model and settings.

        Raises `StateError` for a state of another model, other settings or another adapter, for one that doesn't fit
        the context, or that is damaged; this object stays as it is then. If the damage is deep inside, it is reset.
        """
        states.check(self, state, self._facts)
        self.reset()
        self._sampled, self._rows = None, 0
        states.load(self, state)
        count = state.n_tokens
        self.input_ids[:count] = state.input_ids[:count]
        if self._logits_all:
            self.scores[:count] = state.scores if len(state.scores) else np.nan
        self.n_tokens, self._seed = count, state.seed

    def set_cache(self, cache: Any) -> None:
        """As upstream. The cache may be shared with other models and settings: their states are no hits here."""
        super().set_cache(None if cache is None else states.OwnStates(cache, self._facts))

    def shift(self, n_discard: int | None = None, n_keep: int | None = None) -> None:
        """Make room: forget the `n_discard` tokens after the first `n_keep`, and move the rest down.

        What was computed stays as it is, so the rest still knows of what is forgotten. n_keep: by default the sinks,
        and at least one token; n_discard: by default half of what follows. Not while `generate` runs.

        Raises `GenerationError` if the numbers don't fit, or the model or its ring don't allow it; nothing is
        changed then.
        """
        memory = llama_cpp.llama_get_memory(self.ctx)
        if memory is None or not llama_cpp.llama_memory_can_shift(memory):
            raise GenerationError("this model's keys can't be moved to other positions; evaluate the rest anew")
        n_keep, n_discard = plan_shift(self.ctx, self._swaa, self.n_tokens, n_keep, n_discard)
        start, end = n_keep + n_discard, self.n_tokens
        # What lies behind the tokens that count must not be moved along.
        for first, last in ((end, -1), (n_keep, start)):
            if not llama_cpp.llama_memory_seq_rm(memory, 0, first, last):
                raise GenerationError(f"the engine can't forget tokens: {native.last_error()}")
        llama_cpp.llama_memory_seq_add(memory, 0, start, -1, -n_discard)
        if llama_cpp.llama_memory_seq_pos_max(memory, 0) != end - n_discard - 1:
            self.reset()  # another sequence shares the cells: only a caller of the C functions can bring that about
            raise GenerationError(f"the engine can't move tokens: {native.last_error()}")
        self._checkpoints.forget(n_keep)
        self.n_tokens = end - n_discard
        for array in (self.input_ids, self.scores) if self._logits_all else (self.input_ids,):
            array[n_keep : self.n_tokens] = array[start:end]
        if self._sampled is not None:
            self._sampled = (self._sampled[0] - n_discard, self._sampled[1])
        # The logits at hand were computed before; they are right to sample from, but not those of this prompt.
        self._requires_eval = True
