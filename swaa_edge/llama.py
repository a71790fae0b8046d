"""`SwaaLlama`: a subclass of llama_cpp.Llama that runs models under sliding-window attention adaptation.

`SwaaLlama` is a drop-in replacement. It loads the patched library, and checks its arguments before any C code sees
them. It distinguishes prompt tokens from generated tokens for the engine. It reports the progress of a prefill, and can
be cancelled.

    llm = SwaaLlama("model.gguf", n_ctx=32768, on_prefill=lambda done, total: print(done, total))
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from swaa_edge import native
from swaa_edge.config import Configuration, SwaaConfig
from swaa_edge.engine import states
from swaa_edge.engine.cache import KVCache
from swaa_edge.engine.evaluation import OnLogits, decoding_from, evaluate, failure
from swaa_edge.engine.phases import PhaseTracker, Timings, Turn
from swaa_edge.engine.preflight import check_context, check_tokenizer, labelled, resolve_swaa
from swaa_edge.engine.settings import round_up
from swaa_edge.engine.translate import load_failure
from swaa_edge.errors import GenerationError
from swaa_edge.files.model import read_model
from swaa_edge.layers import whole_number

# Deriving from llama_cpp's class imports llama_cpp, so the patched library must be loaded before.
llama_cpp = native.load()

OnPrefill = Callable[[int, int], object]
_LOG = logging.getLogger("llama-cpp-python")
_GENERATE = inspect.signature(llama_cpp.Llama.generate)


class _Closed:
    """Replaces the model, context and cache of a closed object; any use raises an error that states the reason."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # looked up by copy, pickle and repr
            raise AttributeError(name)
        raise GenerationError("this model is closed; load it again")


class SwaaLlama(llama_cpp.Llama):
    """llama_cpp.Llama under SWAA, with all methods and arguments of llama_cpp.Llama and the arguments below.

    model_path: a path or a `ModelFile`.
    swaa: a SwaaConfig, None for the settings in the model file, or False for full attention.
    on_prefill(done, total): called during a prefill, at the start and after each ubatch. Both numbers count tokens and
        leave out a reused prefix. The call comes from the evaluating thread.
    flash_attn: on by default, because SWAA is slow without flash attention.
    swa_full: True stores K and V of the whole context in every layer, so that every prefix can be reused. False stores
        a ring in layers that need only a window. None means False under SWAA, and llama_cpp's default otherwise.
    ring_snapshots: number of copies of the ring. After a long response, each copy lets one prompt be reused.
    n_ctx: context size in tokens, rounded up to a multiple of 256.
    lora_path: path of a GGUF adapter (`convert --lora DIR --adapter-only`). If neither `swaa` nor the model file holds
        settings, the adapter's recipe applies. Settings that differ from the recipe raise a `ConfigError`.
    lora_scale: factor of the adapter's contribution; 0 runs the model without the adapter.
    last_timings: the `Timings` of the last generation.

    Before a model is loaded, the constructor raises `ModelFileError` for a missing or damaged file and for wrong SWAA
    keys, `UnsupportedModelError` for an architecture without support for SWAA, and `ConfigError` for settings that
    contradict each other. The import raises `NativeLibraryError` if the library doesn't fit.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        swaa: Configuration | None = None,
        on_prefill: OnPrefill | None = None,
        flash_attn: bool = True,
        swa_full: bool | None = None,
        ring_snapshots: int = 1,
        **kwargs: Any,
    ) -> None:
        path = str(model_path)
        if lora_path := kwargs.get("lora_path"):
            lora_path = kwargs["lora_path"] = str(lora_path)
        self.on_prefill = on_prefill
        self.last_timings = Timings()
        self._abort = native.AbortFlag()
        self._completions = 0  # running; they clear `cancel` themselves
        self._phases = PhaseTracker()
        self._ours = {
            "swaa": swaa,
            "kv_overrides": kwargs.get("kv_overrides"),
            "ring_snapshots": whole_number("ring_snapshots", ring_snapshots, 0),
        }
        model = read_model(model_path)
        resolved = resolve_swaa(model, swaa, kwargs.get("kv_overrides"), lora_path)
        check_tokenizer(model)
        check_context(flash_attn=flash_attn, **kwargs)
        # llama_cpp's arrays must have the size of the context that llama.cpp makes.
        kwargs |= {"kv_overrides": resolved.kv_overrides, "n_ctx": round_up(kwargs.get("n_ctx", 512))}
        if swa_full is None and resolved.config is not None:
            swa_full = False
        try:
            super().__init__(path, flash_attn=flash_attn, swa_full=swa_full, **kwargs)
            # With a draft model, upstream turns this on for the whole prompt, without the memory for it.
            self._logits_all = bool(kwargs.get("logits_all", False))
            self._abort.attach(self.ctx)
            self._swaa = labelled(native.model_config(self.model), resolved.config)
            self._kv_cache = KVCache(self.ctx, self._swaa, self._ours["ring_snapshots"])
            self._facts = states.facts_of(self, self._swaa, self._ours["kv_overrides"])
            self._shrink_buffers()
        except BaseException as error:
            # The traceback keeps this object alive, so its memory is freed here.
            self.close()
            clear = load_failure(error, path, lora_path)
            if clear is error:
                raise
            raise clear from error

    def _shrink_buffers(self) -> None:
        # Upstream's batch has room for n_ctx sequences in each row. One sequence is used.
        self._batch.close()
        batch = llama_cpp._internals.LlamaBatch(n_tokens=self.n_batch, embd=0, n_seq_max=1, verbose=self.verbose)
        self._batch = self._stack.enter_context(contextlib.closing(batch))
        if not self._logits_all:
            # Upstream reads rows by index that nobody writes. This array has all rows in four bytes.
            self.scores = np.broadcast_to(np.float32(np.nan), (self.input_ids.size, self._n_vocab))

    @property
    def ctx(self) -> Any:
        return self._ctx.ctx

    @property
    def swaa(self) -> SwaaConfig | None:
        """The settings in effect, as the engine reports them, or None if the model runs full attention."""
        return self._swaa

    @property
    def swaa_policy(self) -> str | None:
        """How the engine computes sliding layers ("table", "copy" or "dense"), or None if the model runs full
        attention."""
        return None if self._swaa is None else native.get_policy(self.ctx).name.lower()

    @property
    def kv_bytes(self) -> int:
        """Bytes that the context has allocated for K and V, which `kvsize.kv_size` predicts."""
        return native.kv_bytes(self.ctx)

    @property
    def eval_logits(self) -> deque[list[float]]:
        """The logits of all tokens if logits_all is set. Otherwise, one row of undefined values."""
        rows = self._scores if self._logits_all else self._scores[-1:]
        return deque(rows.tolist(), maxlen=self._n_ctx if self._logits_all else 1)

    # Evaluation

    def eval(self, tokens: Sequence[int], decode_from: int | None = None, on_logits: OnLogits | None = None) -> None:
        """Evaluate `tokens` after the tokens that were evaluated before.

        Each token is a generated token or a prompt token. Inside `generate`, all tokens after the prompt are generated
        tokens, drafts included. Outside, a token that `sample` just returned is a generated token. So is a single token
        after others, because the caller may use another sampler. All other tokens are the prompt of a new turn. The
        last T tokens of a prompt are its tail.

        decode_from: the position of the decode boundary, or None to infer the boundary. The tail and the generated
            tokens start at the boundary. If a prompt is split over several calls, each call needs `decode_from`. With
            `native.NEVER`, a prompt has no tail.
        on_logits(rows): called after each ubatch with the logits of its tokens, float32 [tokens, n_vocab]. The next
            ubatch overwrites these logits. Without `on_logits`, logits_all or a draft, only the last token has logits.

        To continue from an earlier position, lower `n_tokens` before the call, as with `llama_cpp.Llama`. If the ring
        no longer holds what this position needs, `eval` raises an error and changes nothing.

        Raises `GenerationError` if the tokens don't fit the context, if the engine fails, or if the ring can't continue
        from `n_tokens`. Raises `GenerationCancelled` after `cancel`. After an error, the object and all tokens that
        were already evaluated stay usable.
        """
        self._ctx.n_ctx()  # raises an error on a closed object
        room = min(self._n_ctx, self.input_ids.size)
        if self.n_tokens + len(tokens) > room:
            raise GenerationError(
                f"{len(tokens)} tokens after {self.n_tokens} don't fit the context of {room} tokens; raise n_ctx"
            )
        if (turn := self._phases.turn) and turn.in_prompt:
            self.last_timings.reused_tokens = self.n_tokens
            if self.n_tokens + len(tokens) == 0:
                raise GenerationError("the prompt is empty; give at least one token")
        elif turn:
            # The first token was sampled, and the rest is a draft. A rejected draft must be removed from the cache, but
            # a ring can only remove one ubatch. So the draft is limited to one ubatch.
            tokens = tokens[: self.context_params.n_ubatch]
        self._kv_cache.cut(self.n_tokens)
        tail_count = self._swaa.tail_count if self._swaa else 0
        for part in self._phases.split(tokens, self.n_tokens, tail_count, decode_from):
            evaluate(self, part, on_logits)

    # Generation

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """Reset `last_timings`, and generate as llama_cpp does."""
        if not self._completions:
            self._forget_cancel()
        self._phases.sampled = None
        timings, turn, tokens = Timings(), Turn(), list(tokens)
        self.last_timings = timings
        if _GENERATE.bind(self, tokens, *args, **kwargs).arguments.get("reset", True):
            self._requires_eval |= self.n_tokens != self._phases.end  # a caller lowered n_tokens
            end = self._kv_cache.reach(self.input_ids[: self.n_tokens], tokens, has_logits=not self._requires_eval)
            if end == 0:
                self.reset()
            elif end is not None:
                self.n_tokens, self._requires_eval = end, True
        upstream = super().generate(tokens, *args, **kwargs)
        sent = None
        try:
            while True:
                with self._phases.running(turn), timings.generating():
                    try:
                        token = upstream.send(sent)
                    except StopIteration:
                        return
                timings.generated_tokens += 1
                sent = yield token
        finally:
            upstream.close()

    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """Sample a token as llama_cpp does, and remember it. `eval` then recognizes the token as generated.

        Raises `GenerationError` if nothing was evaluated since the last load, reset or `load_state`.
        """
        self._phases.check_row(idx, self.n_tokens)
        token = super().sample(*args, idx=idx, **kwargs)
        self._phases.sampled = (self.n_tokens if idx is None else idx + 1, token)
        return token

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        # generate() must not clear a cancel that comes while a long prompt is being tokenized.
        self._forget_cancel()
        self._completions += 1
        try:
            for chunk in super()._create_completion(*args, **kwargs):
                if "usage" in chunk:
                    chunk["usage"]["prompt_tokens_details"] = {"cached_tokens": self.last_timings.reused_tokens}
                yield chunk
        finally:
            self._completions -= 1

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_cancel()
        self._phases.rows = 0
        with decoding_from(self, native.NEVER):
            try:
                return super().embed(*args, **kwargs)
            except RuntimeError as error:
                batch = self._batch.batch
                raise failure(self, error, batch.token[: batch.n_tokens]) from error

    def cancel(self) -> None:
        """Make the running evaluation or generation raise `GenerationCancelled` within one ubatch.

        Any thread may call this. If nothing is running, `cancel` stops the next direct `eval`, but not the next
        generation.
        """
        if not self.verbose:
            _LOG.setLevel(logging.CRITICAL)  # llama.cpp logs what it aborts
        self._abort.set()

    def _forget_cancel(self) -> None:
        if self._abort:
            self._abort.clear()
            _LOG.setLevel(logging.DEBUG if self.verbose else logging.ERROR)

    # Cache and states

    def reset(self) -> None:
        super().reset()
        self._kv_cache.snapshots.clear()

    def shift(self, n_discard: int | None = None, n_keep: int | None = None) -> None:
        """Make room in the context: discard the `n_discard` tokens after the first `n_keep`, and move the rest down.

        K and V are not recomputed, so the remaining tokens still carry information from the discarded tokens. Don't
        call this while `generate` runs.

        n_discard: by default, half of the tokens after the first n_keep.
        n_keep: by default, the number of sinks, but at least 1.

        Raises `GenerationError` if a number is out of range, or if the model or its ring can't shift. The object is
        then unchanged.
        """
        n_discard, n_keep = self._kv_cache.check_shift(self.n_tokens, n_discard, n_keep)
        if not self._kv_cache.shift(self.n_tokens, n_discard, n_keep):
            self.reset()  # another sequence shares the cells, which only a caller of the C functions can cause
            raise GenerationError(f"the engine can't move tokens: {native.last_error()}")
        start, end = n_keep + n_discard, self.n_tokens
        self.n_tokens = end - n_discard
        for array in (self.input_ids, self.scores) if self._logits_all else (self.input_ids,):
            array[n_keep : self.n_tokens] = array[start:end]
        self._phases.shift(n_discard)
        # The engine's logits are still valid to sample from, but they belong to the prompt before the shift.
        self._requires_eval = True

    def save_state(self) -> Any:
        """Save the state as llama_cpp does, but in less memory.

        The state has one copy of K and V, and logits only with logits_all. It also records the model, the settings and
        the adapter. It can be pickled and kept in llama_cpp's caches. Raises `StateError` if the engine fails.
        """
        return states.save(self, self._facts)

    def load_state(self, state: Any) -> None:
        """Restore a state that `save_state` saved, here or in another object with the same model and settings.

        Raises `StateError` for a state of another model, of other settings or of another adapter, for a state that
        doesn't fit the context, and for a damaged state. The object is then unchanged. But if the damage shows only
        while the state is loaded, the object is reset.
        """
        states.check(self, state, self._facts)
        self.reset()
        self._phases.sampled, self._phases.rows = None, 0
        states.load(self, state)

    def set_cache(self, cache: Any) -> None:
        """Set the cache of states, as in llama_cpp. Objects with other models and settings may share the cache, because
        each object finds only its own entries."""
        super().set_cache(None if cache is None else states.OwnStates(cache, self._facts))

    # Copies and the end

    def __getstate__(self) -> dict[str, Any]:
        # on_prefill is left out: a callback belongs to the program that made it.
        return super().__getstate__() | self._ours

    def close(self) -> None:
        """Free the model, its context and all buffers. A second call does nothing."""
        if not hasattr(self, "_stack"):
            return
        self._sampler = None
        super().close()
        self.cache = self._candidates = None
        # These would give null or dangling pointers to C.
        self._ctx = self._model = self._batch = self.tokenizer_ = self._kv_cache = _Closed()
        self.n_tokens = 0
        self.input_ids = np.empty(0, np.intc)
        self.scores = np.empty((0, 0), np.single)
