"""`SwaaLlama`: llama_cpp.Llama that runs models under sliding-window attention adaptation.

A drop-in subclass. It loads the patched library, checks what it is given before any C code sees it,
tells the engine exactly which tokens are prompt and which are generated, reports the prefill's
progress, and can be cancelled.

    llm = SwaaLlama("model.gguf", n_ctx=32768, on_prefill=lambda done, total: print(done, total))
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from swaa_edge import native
from swaa_edge.config import SwaaConfig
from swaa_edge.engine.cache import CachedLlama
from swaa_edge.engine.preflight import check_context, check_tokenizer, effective_config, plan_swaa
from swaa_edge.engine.translate import decode_failure, load_failure
from swaa_edge.errors import GenerationCancelled, GenerationError
from swaa_edge.files import lora_gguf
from swaa_edge.layers import whole_number
from swaa_edge.native import Phase
from swaa_edge.timings import Timings

# Deriving from llama_cpp's class imports llama_cpp, so the patched library must be under it by now.
llama_cpp = native.load()

OnPrefill = Callable[[int, int], object]
OnLogits = Callable[[np.ndarray], object]
_LOG = logging.getLogger("llama-cpp-python")
_GENERATE = inspect.signature(llama_cpp.Llama.generate)
# llama.cpp rounds a context up to whole blocks of this many cells; llama_cpp's arrays must have that size too.
_CONTEXT_STEP = 256


class _Closed:
    """Stands where upstream's model and context were: any use of them says what is wrong."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy, pickle and repr look for
            raise AttributeError(name)
        raise GenerationError("this model is closed; load it again")


class SwaaLlama(CachedLlama):
    """llama_cpp.Llama under SWAA; every method and argument of it, and these.

    swaa: None runs what the file's keys say; a SwaaConfig runs that instead; False runs full attention.
    on_prefill(done, total): called while a prompt is evaluated, first with done = 0 and then after each
        ubatch; both count tokens, without a reused prefix. Called in the thread that evaluates.
    flash_attn: on by default, since SWAA is fast only with it.
    swa_full: True keeps K and V of the whole context also in the layers that need a window only, instead of a ring;
        then every prefix can be reused. None is False under SWAA, and llama_cpp's default without it.
    checkpoints: how many copies of the ring are kept, each to reuse one prompt after a longer answer.
    n_ctx: rounded up to a multiple of 256, as llama.cpp does.
    lora_path: a GGUF adapter (`convert --lora DIR --adapter-only`). If it says what recipe it was trained under, that
        one holds where neither `swaa` nor the model's file has settings, and another one is a `ConfigError`.
        lora_scale goes to llama.cpp as it is: a factor on what the adapter adds; 0 is the model without it.

    Raises before any model is loaded: `ModelFileError` for a file that is missing, no GGUF, cut off or
    has wrong SWAA keys; `UnsupportedModelError` for an architecture that can't slide; `ConfigError` for
    settings that contradict each other; `NativeLibraryError` at import if the library doesn't fit.
    `Timings` of the last generation are in `last_timings`.
    """

    def __init__(
        self,
        model_path: str,
        *,
        swaa: SwaaConfig | Literal[False] | None = None,
        on_prefill: OnPrefill | None = None,
        flash_attn: bool = True,
        swa_full: bool | None = None,
        checkpoints: int = 1,
        **kwargs: Any,
    ) -> None:
        model_path = str(model_path)
        if lora_path := kwargs.get("lora_path"):
            lora_path = kwargs["lora_path"] = str(lora_path)
        self.on_prefill = on_prefill
        self.last_timings = Timings()
        self._swaa_argument, self._given_overrides = swaa, kwargs.get("kv_overrides")
        self._abort = native.AbortFlag()
        self._completions = 0
        self._turn: Literal["prompt", "feedback"] | None = None
        self._sampled: tuple[int, int] | None = None
        self._rows = 0  # of logits that the engine holds, up to those of the last token
        self._n_checkpoints = whole_number("checkpoints", checkpoints, 0)
        kwargs["kv_overrides"], meant = plan_swaa(model_path, swaa, self._given_overrides, lora_path)
        check_tokenizer(model_path)
        check_context(flash_attn=flash_attn, **kwargs)
        if kwargs.get("n_ctx", 512) % _CONTEXT_STEP:
            kwargs["n_ctx"] = -(-kwargs.get("n_ctx", 512) // _CONTEXT_STEP) * _CONTEXT_STEP
        if swa_full is None and meant is not None:
            swa_full = False
        try:
            super().__init__(model_path, flash_attn=flash_attn, swa_full=swa_full, **kwargs)
            # Upstream turns this on for a draft model, for every token of the prompt, without the memory for it.
            self._logits_all = bool(kwargs.get("logits_all", False))
            self._abort.attach(self.ctx)
            self._swaa = effective_config(native.model_config(self.model), meant)
            self._open_cache(self._n_checkpoints, self._given_overrides)
            self._shrink_buffers()
        except BaseException as error:
            # The traceback keeps this object alive for as long as the caller keeps the error.
            self.close()
            failure = lora_gguf.failure(load_failure(error, model_path), lora_path)
            if failure is error:
                raise
            raise failure from error

    def _shrink_buffers(self) -> None:
        # Upstream's batch has room for n_ctx sequences in each row; there is one.
        self._batch.close()
        batch = llama_cpp._internals.LlamaBatch(n_tokens=self.n_batch, embd=0, n_seq_max=1, verbose=self.verbose)
        self._batch = self._stack.enter_context(contextlib.closing(batch))
        if not self._logits_all:
            # Upstream's n_batch rows are never written, but read by index; this has all rows in four bytes.
            self.scores = np.broadcast_to(np.float32(np.nan), (self.input_ids.size, self._n_vocab))

    @property
    def swaa(self) -> SwaaConfig | None:
        """The settings in force, as the engine reports them; None if the model runs full attention."""
        return self._swaa

    @property
    def swaa_policy(self) -> str | None:
        """How sliding layers are computed here: "table", "copy" or "dense"; None if the model runs full attention."""
        return None if self._swaa is None else native.get_policy(self.ctx).name.lower()

    @property
    def eval_logits(self) -> deque[list[float]]:
        """As upstream: the logits of all tokens with logits_all; else one row, which upstream leaves undefined."""
        rows = self._scores if self._logits_all else self._scores[-1:]
        return deque(rows.tolist(), maxlen=self._n_ctx if self._logits_all else 1)

    # Evaluation

    def eval(self, tokens: Sequence[int], phase: Phase | None = None, on_logits: OnLogits | None = None) -> None:
        """Evaluate `tokens` after those evaluated before, as upstream; the phase of each is found out.

        In `generate`, and all that is built on it, the prompt is PREFILL and what is fed back (drafted
        tokens too) is DECODE. Called directly: the token that `sample` just returned is DECODE; a single
        token after others, when `sample` wasn't called (a caller with a sampler of its own), is DECODE;
        all else is PREFILL. `phase` overrules that.

        on_logits(rows): called after each ubatch with the logits of its tokens, float32 [tokens, n_vocab], without
        the memory that logits_all takes; they are overwritten when it returns.

        To go back, as upstream, lower `n_tokens` before; a ring may refuse to, and then nothing is changed.

        Raises `GenerationError` if the tokens don't fit, can't follow the first `n_tokens` or the engine fails,
        `GenerationCancelled` after `cancel`. Tokens evaluated until then stay, and the object stays usable.
        """
        self._ctx.n_ctx()  # says so if this is closed
        room = min(self._n_ctx, self.input_ids.size)
        if self.n_tokens + len(tokens) > room:
            raise GenerationError(
                f"{len(tokens)} tokens after {self.n_tokens} don't fit the context of {room}; raise n_ctx"
            )
        if self._turn == "prompt":
            self.last_timings.reused_tokens = self.n_tokens
            if self.n_tokens + len(tokens) == 0:
                raise GenerationError("the prompt is empty; give at least one token")
        elif self._turn == "feedback":
            # The first was sampled, the others are a draft, of which only what proves right stays. A ring can take
            # back a ubatch, so the draft is cut to that.
            tokens = tokens[: self.context_params.n_ubatch]
        self._cut()
        parts = self._phases(tokens) if phase is None else [(phase, tokens)]
        self._turn = self._turn and "feedback"
        self._sampled = None
        for part_phase, part in parts:
            self._evaluate(part, part_phase, on_logits)

    def _phases(self, tokens: Sequence[int]) -> list[tuple[Phase, Sequence[int]]]:
        if self._turn is not None:
            return [(Phase.PREFILL if self._turn == "prompt" else Phase.DECODE, tokens)]
        if self._sampled is None:
            return [(Phase.DECODE if len(tokens) == 1 and self.n_tokens else Phase.PREFILL, tokens)]
        generated = int(len(tokens) > 0 and self._sampled == (self.n_tokens, tokens[0]))
        return [(Phase.DECODE, tokens[:generated]), (Phase.PREFILL, tokens[generated:])]

    def _evaluate(self, tokens: Sequence[int], phase: Phase, on_logits: OnLogits | None = None) -> None:
        if len(tokens) == 0:
            return
        timings, started = self.last_timings, time.perf_counter()
        report = self.on_prefill if phase is Phase.PREFILL else None
        # Each drafted token is judged by the logits before it, so they must all come out of one llama_decode.
        drafted = phase is Phase.DECODE and len(tokens) > 1
        done = 0
        # Whatever stops this, the logits at hand are no longer those of the last token.
        self._requires_eval = True
        try:
            with self._phase(phase):
                if report:
                    report(0, len(tokens))
                for chunk in self._chunks(tokens, self.n_batch if drafted else self.context_params.n_ubatch):
                    if self._abort:
                        raise GenerationCancelled("cancelled")
                    self._checkpoints.advance(self.n_tokens, len(chunk))
                    self._decode(chunk, every_row=self._logits_all or drafted or on_logits is not None)
                    done += len(chunk)
                    if on_logits:
                        on_logits(np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(chunk), self._n_vocab)))
                    if report:
                        llama_cpp.llama_synchronize(self.ctx)
                        report(done, len(tokens))
                if phase is Phase.PREFILL:
                    llama_cpp.llama_synchronize(self.ctx)
                    self._checkpoints.mark(self.n_tokens)
        except RuntimeError as error:
            failure = self._failure(error, tokens)
            self._recover()
            raise failure from error
        except BaseException:
            self._recover()
            raise
        finally:
            seconds = time.perf_counter() - started
            if phase is Phase.PREFILL:
                timings.prompt_tokens += done
                timings.prefill_seconds += seconds
            else:
                timings.decode_tokens += done
                if self._turn is None:  # generate() times its own turns, sampling included
                    timings.decode_seconds += seconds

    def _chunks(self, tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
        # The ubatches that llama_decode would make of upstream's batches, so that results stay the same to the bit.
        for start in range(0, len(tokens), self.n_batch):
            end = min(start + self.n_batch, len(tokens))
            for first in range(start, end, size):
                yield tokens[first : min(first + size, end)]

    def _decode(self, tokens: Sequence[int], every_row: bool) -> None:
        """One llama_decode; every_row: logits for each token, not only for the last."""
        past, count = self.n_tokens, len(tokens)
        self._rows = 0
        self._batch.set_batch(batch=tokens, n_past=past, logits_all=every_row)
        self._ctx.decode(self._batch)
        self.input_ids[past : past + count] = tokens
        if self._logits_all:
            rows = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(count, self._n_vocab))
            self.scores[past : past + count, :] = rows
        self.n_tokens += count
        self._rows = count if every_row else 1
        self._requires_eval = False

    @contextlib.contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        if self._swaa is None:
            yield
            return
        native.set_phase(self.ctx, phase)
        try:
            yield
        finally:
            # Chat handlers for images call llama_decode on the context themselves.
            native.set_phase(self.ctx, Phase.AUTO)

    def _failure(self, error: RuntimeError, tokens: Sequence[int]) -> RuntimeError:
        if self._abort:
            return GenerationCancelled("cancelled")
        return decode_failure(error, tokens, n_vocab=self._n_vocab, n_ctx=self._n_ctx)

    def _recover(self) -> None:
        """Bring the cache back to the tokens that are known to be in it."""
        self._forget_cancel()
        self._sampled = None
        # An aborted batch can leave ubatches behind, and a recurrent state can't be cut back at all.
        if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            self.reset()

    # Generation

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As upstream: yields generated tokens; `last_timings` counts from here."""
        if not self._completions:
            self._forget_cancel()
        self._sampled = None
        timings = self.last_timings = Timings()
        turn: Literal["prompt", "feedback"] | None = "prompt"
        tokens = list(tokens)
        if _GENERATE.bind(self, tokens, *args, **kwargs).arguments.get("reset", True):
            self._reach_prefix(tokens)
        upstream = super().generate(tokens, *args, **kwargs)
        sent = None
        try:
            while True:
                started, prefill = time.perf_counter(), timings.prefill_seconds
                self._turn = turn
                try:
                    token = upstream.send(sent)
                except StopIteration:
                    return
                finally:
                    turn, self._turn = self._turn, None
                    in_prefill = timings.prefill_seconds - prefill
                    timings.decode_seconds += time.perf_counter() - started - in_prefill
                timings.generated_tokens += 1
                sent = yield token
        finally:
            upstream.close()

    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """As upstream; the token is remembered, so that `eval` knows it when it comes back.

        Raises `GenerationError` if there are no logits of that token: nothing was evaluated since the model was
        loaded, reset or given a state.
        """
        back = 1 if idx is None else self.n_tokens - idx
        if not 0 < back <= self._rows or self.n_tokens == 0:
            raise GenerationError(
                f"there are no logits to sample from{'' if idx is None else f' at idx = {idx}'}; evaluate tokens first"
            )
        token = super().sample(*args, idx=idx, **kwargs)
        self._sampled = (self.n_tokens if idx is None else idx + 1, token)
        return token

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        # A cancel that comes while a long prompt is tokenized must still count when generate() starts.
        self._forget_cancel()
        self._completions += 1
        try:
            for answer in super()._create_completion(*args, **kwargs):
                if "usage" in answer:
                    answer["usage"]["prompt_tokens_details"] = {"cached_tokens": self.last_timings.reused_tokens}
                yield answer
        finally:
            self._completions -= 1

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; texts to embed are prompts."""
        self._forget_cancel()
        self._rows = 0
        with self._phase(Phase.PREFILL):
            try:
                return super().embed(*args, **kwargs)
            except RuntimeError as error:
                batch = self._batch.batch
                raise self._failure(error, batch.token[: batch.n_tokens]) from error

    def cancel(self) -> None:
        """Stop the evaluation or generation that runs, from any thread, within one ubatch; it raises
        `GenerationCancelled`. With none running, the next direct `eval` stops; a new generation doesn't."""
        if not self.verbose:
            _LOG.setLevel(logging.CRITICAL)  # llama.cpp logs what it aborts
        self._abort.set()

    def _forget_cancel(self) -> None:
        if self._abort:
            self._abort.clear()
            _LOG.setLevel(logging.DEBUG if self.verbose else logging.ERROR)

    # Copies and the end

    def __getstate__(self) -> dict[str, Any]:
        # on_prefill stays behind: a callback belongs to the program that made it.
        ours = {"swaa": self._swaa_argument, "kv_overrides": self._given_overrides, "checkpoints": self._n_checkpoints}
        return super().__getstate__() | ours

    def close(self) -> None:
        """Free the model, its context and all buffers, also what remains of a load that failed; again: nothing."""
        if not hasattr(self, "_stack"):
            return
        self._sampler = None
        super().close()
        if hasattr(self, "_checkpoints"):
            self._checkpoints.clear()
        self.cache = self._candidates = None
        # Upstream's objects would give null pointers to C.
        self._ctx = self._model = self._batch = self.tokenizer_ = _Closed()
        self.n_tokens = 0
        self.input_ids = np.empty(0, np.intc)
        self.scores = np.empty((0, 0), np.single)
