"""The options by which a command loads and samples a model, and Ctrl-C that stops it at once.

    @click.command()
    @engine_options
    def run(engine: Engine): llm = engine.load("model.gguf", swaa=None, n_ctx=4096)

The commands share them, so that they read and act the same everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import click

from swaa_edge.config import SwaaConfig
from swaa_edge.files.model import read_model
from swaa_edge.support.interrupt import interruptible  # noqa: F401
from swaa_edge.support.progress import progress_stream

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

#: Tokens; a whole training context can take tens of gigabytes of K and V.
DEFAULT_CONTEXT = 16384
# enum ggml_type
CACHE_TYPES = {"f16": 1, "q8_0": 8}


@dataclasses.dataclass(frozen=True)
class Engine:
    """How to load a model: sizes in tokens; None leaves a choice to the command or llama.cpp. lora: a GGUF adapter."""

    ctx: int | None = None
    batch: int = 512
    ubatch: int = 512
    threads: int | None = None
    cache_type: str = "f16"
    swa_full: bool = False
    gpu_layers: int = -1
    lora: str | None = None

    def load(
        self,
        path: str,
        *,
        swaa: SwaaConfig | Literal[False] | None,
        n_ctx: int,
        kind: type[SwaaLlama] | None = None,
        **more: Any,
    ) -> SwaaLlama:
        """The model at `path` under `swaa`, quiet, with a context of `n_ctx` tokens (--ctx is up to the caller).

        kind: a subclass to make instead of SwaaLlama; more: further arguments for it.
        """
        from swaa_edge.llama import SwaaLlama

        return (kind or SwaaLlama)(
            path,
            swaa=swaa,
            n_ctx=n_ctx,
            n_batch=self.batch,
            n_ubatch=self.ubatch,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            type_k=CACHE_TYPES[self.cache_type],
            type_v=CACHE_TYPES[self.cache_type],
            swa_full=self.swa_full or None,
            n_gpu_layers=self.gpu_layers,
            lora_path=self.lora,
            verbose=False,
            **more,
        )


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `Engine`, and pass it one as `engine`."""

    @functools.wraps(command)
    def with_engine(*args: Any, **kwargs: Any) -> Any:
        chosen = {field.name: kwargs.pop(field.name) for field in dataclasses.fields(Engine)}
        if chosen["batch"] is None:
            # llama.cpp computes no more at once than it is handed at once.
            chosen["batch"] = max(Engine.batch, chosen["ubatch"])
        return command(*args, engine=Engine(**chosen), **kwargs)

    for option in reversed(_ENGINE_OPTIONS):
        with_engine = option(with_engine)
    return with_engine


def sampling_options(
    command: Callable[..., Any], *, default_temp: float = 0.8, default_seed: int | None = None
) -> Callable[..., Any]:
    """Give a command the options of sampling, and pass it `sampling`: keyword arguments for create_completion.

    A seed of None is one that the command chooses at random.
    """

    @functools.wraps(command)
    def with_sampling(*args: Any, temp: float, top_p: float, top_k: int, seed: int | None, **kwargs: Any) -> Any:
        sampling = {"temperature": temp, "top_p": top_p, "top_k": top_k, "seed": seed}
        return command(*args, sampling=sampling, **kwargs)

    for option in reversed([_temp_option(default_temp), *_SAMPLING_OPTIONS, _seed_option(default_seed)]):
        with_sampling = option(with_sampling)
    return with_sampling


def conversation_context(model: str, wanted: int | None) -> int:
    """The context for an open-ended use of `model`: `wanted`, or what it was trained for up to `DEFAULT_CONTEXT`."""
    if wanted is not None:
        return wanted
    return min(read_model(model).context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


@contextlib.contextmanager
def status_line(
    wanted: bool | None, told: Callable[[Any], tuple[str, object]]
) -> Iterator[Callable[[Any], None] | None]:
    """An `on_progress` that shows where a run stands on stderr, while this lasts; None where nobody watches.

    told(at): the text, and what it is about. A terminal has one line, rewritten each time; elsewhere a line is written
    when what it is about changes, and none for None.
    """
    stream = progress_stream(wanted)
    if stream is None:
        yield None
        return
    width, last = 0, None

    def show(at: Any) -> None:
        nonlocal width, last
        text, about = told(at)
        if stream.isatty():
            stream.write("\r" + text.ljust(width))
            width = len(text)
        elif about is not None and about != last:
            stream.write(text + "\n")
            last = about
        stream.flush()

    try:
        yield show
    finally:
        if width:
            stream.write("\r" + " " * width + "\r")
            stream.flush()


_ENGINE_OPTIONS = [
    click.option("--ctx", type=click.IntRange(1), metavar="N", help="Size of the context in tokens."),
    click.option(
        "--batch",
        type=click.IntRange(1),
        metavar="N",
        help="Prompt tokens handed to the engine at once.  [512, or --ubatch if that is more]",
    ),
    click.option(
        "--ubatch",
        type=click.IntRange(1),
        metavar="N",
        default=512,
        show_default=True,
        help="Prompt tokens computed at once.",
    ),
    click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [half the cores; prefill: all]"),
    click.option(
        "--cache-type",
        type=click.Choice(list(CACHE_TYPES)),
        default="f16",
        show_default=True,
        help="Type of the KV cache; q8_0 halves its memory.",
    ),
    click.option(
        "--swa-full",
        is_flag=True,
        help="Keep the whole context in every layer, so that any part of a conversation can be reused.",
    ),
    click.option(
        "--gpu-layers",
        "--n-gpu-layers",
        "gpu_layers",
        type=click.IntRange(-1),
        metavar="N",
        default=-1,
        help="Layers on the GPU, if the build has one.  [all]",
    ),
    click.option("--lora", metavar="FILE.gguf", help="Apply this adapter, made by: convert --lora DIR --adapter-only."),
]

_SAMPLING_OPTIONS = [
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1),
        metavar="X",
        default=0.95,
        show_default=True,
        help="Sample from the likeliest tokens of this total probability.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(0),
        metavar="N",
        default=40,
        show_default=True,
        help="Sample from the N likeliest tokens; 0: from all.",
    ),
]


def _temp_option(default: float) -> Callable[..., Any]:
    text = "Temperature; 0 takes the likeliest token."
    return click.option("--temp", type=click.FloatRange(0), metavar="X", default=default, show_default=True, help=text)


def _seed_option(default: int | None) -> Callable[..., Any]:
    text = f"Makes sampling repeatable.  [{'random' if default is None else default}]"
    return click.option("--seed", type=click.IntRange(0, 2**32 - 2), metavar="N", default=default, help=text)
