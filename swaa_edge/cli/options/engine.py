"""The options for loading a model and sampling from it.

@click.command()
@engine_options
def run(engine): llm = engine.load("model.gguf", swaa=None, n_ctx=4096)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import click

from swaa_edge.engine.settings import CACHE_TYPES, EngineSettings


def engine_options(command: Callable[..., Any], *, lora: bool = True) -> Callable[..., Any]:
    """Add the engine options to a command. The command receives an `EngineSettings` as `engine`.

    lora: whether to add the option --lora.
    """

    @functools.wraps(command)
    def with_engine(*args: Any, **kwargs: Any) -> Any:
        names = [field.name for field in dataclasses.fields(EngineSettings) if field.name in kwargs]
        chosen = {name: kwargs.pop(name) for name in names}
        return command(*args, engine=EngineSettings(**chosen), **kwargs)

    for option in reversed(_ENGINE_OPTIONS if lora else _ENGINE_OPTIONS[:-1]):
        with_engine = option(with_engine)
    return with_engine


def sampling_options(
    command: Callable[..., Any], *, default_temp: float = 0.8, default_seed: int | None = None
) -> Callable[..., Any]:
    """Add the sampling options to a command. The command receives a dict as `sampling`.

    The dict holds keyword arguments for create_completion.

    default_temp: default of --temp.
    default_seed: default of --seed. None means a random seed.
    """

    @functools.wraps(command)
    def with_sampling(*args: Any, temp: float, top_p: float, top_k: int, seed: int | None, **kwargs: Any) -> Any:
        sampling = {"temperature": temp, "top_p": top_p, "top_k": top_k, "seed": seed}
        return command(*args, sampling=sampling, **kwargs)

    for option in reversed([_temp_option(default_temp), *_SAMPLING_OPTIONS, _seed_option(default_seed)]):
        with_sampling = option(with_sampling)
    return with_sampling


_ENGINE_OPTIONS = [
    click.option("--ctx", "n_ctx", type=click.IntRange(1), metavar="N", help="Context size in tokens."),
    click.option(
        "--batch",
        "n_batch",
        type=click.IntRange(1),
        metavar="N",
        help="Logical batch size in tokens (llama.cpp's n_batch).  [default: 512, or --ubatch if that is more]",
    ),
    click.option(
        "--ubatch",
        "n_ubatch",
        type=click.IntRange(1),
        metavar="N",
        default=EngineSettings.n_ubatch,
        show_default=True,
        help="Physical batch size in tokens (llama.cpp's n_ubatch).",
    ),
    click.option(
        "--threads",
        "n_threads",
        type=click.IntRange(1),
        metavar="N",
        help="CPU threads.  [default: all cores in prefill, half of them in decode]",
    ),
    click.option(
        "--cache-type",
        type=click.Choice(list(CACHE_TYPES)),
        default=EngineSettings.cache_type,
        show_default=True,
        help="Type of the KV cache; q8_0 halves its memory.",
    ),
    click.option(
        "--swa-full",
        is_flag=True,
        help="Cache the whole context in every layer, so that any prefix of a conversation can be reused.",
    ),
    click.option(
        "--gpu-layers",
        "--n-gpu-layers",
        "n_gpu_layers",
        type=click.IntRange(-1),
        metavar="N",
        default=EngineSettings.n_gpu_layers,
        help="Number of layers to run on the GPU, if the build supports GPUs.  [default: all]",
    ),
    click.option(
        "--lora",
        "lora_path",
        metavar="FILE.gguf",
        help="Apply this LoRA adapter (see convert --adapter-only).",
    ),
]

_SAMPLING_OPTIONS = [
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1),
        metavar="X",
        default=0.95,
        show_default=True,
        help="Sample from the most likely tokens whose probabilities add up to X.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(0),
        metavar="N",
        default=40,
        show_default=True,
        help="Sample from the N most likely tokens; 0 means all.",
    ),
]


def _temp_option(default: float) -> Callable[..., Any]:
    text = "Sampling temperature; 0 always takes the most likely token."
    return click.option("--temp", type=click.FloatRange(0), metavar="X", default=default, show_default=True, help=text)


def _seed_option(default: int | None) -> Callable[..., Any]:
    text = f"Random seed for sampling.  [default: {'random' if default is None else default}]"
    return click.option("--seed", type=click.IntRange(0, 2**32 - 2), metavar="N", default=default, help=text)
