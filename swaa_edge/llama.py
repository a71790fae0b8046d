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
    swaa: a SwaaConfig to run under, None for the settings in the model file, or False for full attention.
    on_prefill(done, total): called in the evaluating thread while a prompt is evaluated, first with done = 0 and then
        after each ubatch. done and total are numbers of tokens, without those of a reused prefix.
    flash_attn: on by default, since SWAA is fast only with it.
    swa_full: True makes layers that need only a window keep K and V of the whole context instead of a ring, so that
        every prefix can be reused; None means False under SWAA, and llama_cpp's default without SWAA.
    ring_snapshots: number of copies of the ring to keep; each copy allows one prompt to be reused after a long
        response.
    n_ctx: context size in tokens, which is rounded up to a multiple of 256, as in llama.cpp.
    lora_path: path of a GGUF adapter (`convert --lora DIR --adapter-only`). The adapter's recipe, if any, applies if
        neither `swaa` nor the model file holds settings; settings that differ from the recipe raise a `ConfigError`.
    lora_scale: factor of the adapter's contribution, as in llama.cpp; 0 runs the model without the adapter.

    These errors are raised before any model is loaded: `ModelFileError` for a file that is missing, truncated or not a
    GGUF, or has wrong SWAA keys; `UnsupportedModelError` for an architecture without support for SWAA; `ConfigError`
    for settings that contradict each other; `NativeLibraryError` (at import) if the library doesn't fit. `last_timings`
    holds the `Timings` of the last generation.
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
            # Upstream turns this on for a draft model, for every token of the prompt, without the memory for it.
            self._logits_all = bool(kwargs.get("logits_all", False))
            self._abort.attach(self.ctx)
            self._swaa = labelled(native.model_config(self.model), resolved.config)
            self._kv_cache = KVCache(self.ctx, self._swaa, self._ours["ring_snapshots"])
            self._facts = states.facts_of(self, self._swaa, self._ours["kv_overrides"])
            self._shrink_buffers()
        except BaseException as error:
            # The traceback keeps this object alive for as long as the caller keeps the error.
            self.close()
            clear = load_failure(error, path, lora_path)
            if clear is error:
                raise
            raise clear from error

    def _shrink_buffers(self) -> None:
        # Upstream's batch has room for n_ctx sequences in each row; there is one.
        self._batch.close()
        batch = llama_cpp._internals.LlamaBatch(n_tokens=self.n_batch, embd=0, n_seq_max=1, verbose=self.verbose)
        self._batch = self._stack.enter_context(contextlib.closing(batch))
        if not self._logits_all:
            # Upstream's n_batch rows are never written, but read by index; this has all rows in four bytes.
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
        """The logits of all tokens if logits_all is set, as in llama_cpp; otherwise one row of undefined values."""
        rows = self._scores if self._logits_all else self._scores[-1:]
        return deque(rows.tolist(), maxlen=self._n_ctx if self._logits_all else 1)

    # Evaluation

    def eval(self, tokens: Sequence[int], decode_from: int | None = None, on_logits: OnLogits | None = None) -> None:
        """Evaluate `tokens`, which follow the tokens evaluated before, each as a prompt token or as a generated token.

        In `generate` and the methods that use it, tokens that are fed back (including drafted tokens) are generated
        tokens. If `eval` is called directly, the token that `sample` just returned is a generated token. If `sample`
        wasn't called, a single token after others is also a generated token, because the caller may have its own
        sampler. All other tokens are a prompt, the new tokens of one turn, and the last T tokens of a prompt are its
        tail.

        decode_from: the position of the decode boundary, or None to infer the boundary. Generated tokens and the tail
            lie at `decode_from` or after it, and the rest of the prompt lies before it. A prompt that is split over
            several calls needs `decode_from`; with `native.NEVER`, a prompt has no tail.

        on_logits(rows): called after each ubatch with the logits of its tokens, float32 [tokens, n_vocab]; takes less
            memory than logits_all. The logits are overwritten after `on_logits` returns. Without `on_logits`,
            logits_all or a draft, only the last token of each ubatch has logits.

        To continue from an earlier position, lower `n_tokens` before the call, as with `llama_cpp.Llama`. If a ring
        makes this impossible, an error is raised and nothing is changed.

        Raises `GenerationError` if the tokens don't fit, if they can't follow the first `n_tokens` or if the engine
        fails, and `GenerationCancelled` after `cancel`. The tokens evaluated before the error stay valid, and the
        object stays usable.
        """
        self._ctx.n_ctx()  # raises if this is closed
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
            # The first was sampled, the others are a draft, which may be taken back in part. A ring can take back a
            # ubatch, so the draft is cut to that.
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
        """Sample a token as llama_cpp does, and remember the token so that `eval` recognizes it when it is fed back.

        Raises `GenerationError` if there are no logits because nothing was evaluated since a load, a reset or
        `load_state`.
        """
        self._phases.check_row(idx, self.n_tokens)
        token = super().sample(*args, idx=idx, **kwargs)
        self._phases.sampled = (self.n_tokens if idx is None else idx + 1, token)
        return token

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        # A cancel that comes while a long prompt is tokenized must still count when generate() starts.
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

        Any thread may call this. If no evaluation is running, the next direct `eval` stops, but a new generation
        doesn't.
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

        K and V stay as they were computed, so the remaining tokens still carry information from the discarded ones.
        n_discard defaults to half of the tokens after the first n_keep, and n_keep to the number of sinks, but at least
        1. Don't call this while `generate` runs.

        Raises `GenerationError` if the numbers are out of range, or if the model or its ring can't make this shift;
        nothing is changed then.
        """
        n_discard, n_keep = self._kv_cache.check_shift(self.n_tokens, n_discard, n_keep)
        if not self._kv_cache.shift(self.n_tokens, n_discard, n_keep):
            self.reset()  # another sequence shares the cells: only a caller of the C functions can bring that about
            raise GenerationError(f"the engine can't move tokens: {native.last_error()}")
        start, end = n_keep + n_discard, self.n_tokens
        self.n_tokens = end - n_discard
        for array in (self.input_ids, self.scores) if self._logits_all else (self.input_ids,):
            array[n_keep : self.n_tokens] = array[start:end]
        self._phases.shift(n_discard)
        # The logits in the engine were computed before; they are valid to sample from, but not those of this prompt.
        self._requires_eval = True

    def save_state(self) -> Any:
        """Save the state as llama_cpp does, but smaller: it holds one copy of K and V, and logits only with logits_all.

        The state can be pickled and kept in llama_cpp's caches. The state records its model, settings and adapter.
        Raises `StateError` if the engine fails.
        """
        return states.save(self, self._facts)

    def load_state(self, state: Any) -> None:
        """Restore a state that `save_state` saved, in this object or in another one with the same model and settings.

        Raises `StateError` for a state of another model, other settings or another adapter, or one that doesn't fit the
        context or is damaged; this object is then unchanged, or reset if only the load reveals the damage.
        """
        states.check(self, state, self._facts)
        self.reset()
        self._phases.sampled, self._phases.rows = None, 0
        states.load(self, state)

    def set_cache(self, cache: Any) -> None:
        """Set the cache of states, as in llama_cpp. Other models and settings may share the cache; this object doesn't
        find their entries."""
        super().set_cache(None if cache is None else states.OwnStates(cache, self._facts))

    # Copies and the end

    def __getstate__(self) -> dict[str, Any]:
        # on_prefill is left out: a callback belongs to the program that made it.
        return super().__getstate__() | self._ours

    def close(self) -> None:
        """Free the model, its context and all buffers; a second call does nothing."""
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
