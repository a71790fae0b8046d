"""`swaa-edge serve`: llama-cpp-python's OpenAI-compatible server, with a SwaaLlama in it.

    swaa-edge serve model.gguf --port 8000
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "Once upon", "max_tokens": 20}'

Its routes, request types and streaming are upstream's; only the model is made here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import click

from swaa_edge.cli.options.engine import Engine, conversation_context, engine_options
from swaa_edge.cli.options.swaa import swaa_options_or_full
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, GenerationCancelled

if TYPE_CHECKING:
    import fastapi

    from swaa_edge.llama import SwaaLlama


@click.command()
@click.argument("model", metavar="MODEL.gguf")
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="0.0.0.0: the whole network.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    default=8000,
    show_default=True,
    help="Port; 0 takes a free one.",
)
@click.option("--api-key", metavar="KEY", help="Answer only requests that bring this key.")
@engine_options
@swaa_options_or_full
def serve(
    model: str,
    host: str,
    port: int,
    api_key: str | None,
    engine: Engine,
    swaa: SwaaConfig | Literal[False] | None,
) -> None:
    """Serve a model by OpenAI's protocol: /v1/completions, /v1/chat/completions, /v1/models.

    Requests are answered one after another. Needs the extra: pip install 'swaa-edge[server]'

    \b
    swaa-edge serve model.gguf --port 8000 --recipe balanced
    """
    _need_server_packages()
    # The port is taken before the model is loaded, so that a port in use is said at once.
    with contextlib.closing(listen(host, port)) as listener:
        llm = engine.load(model, swaa=swaa, n_ctx=conversation_context(model, engine.ctx), kind=served_class())
        try:
            address, port = listener.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            click.echo(f"serving {os.path.basename(model)} at http://{shown}:{port}/v1 (Ctrl-C stops it)", err=True)
            run_server(make_app(llm, api_key), llm, listener)
        finally:
            llm.close()


def _need_server_packages() -> None:
    for name in ("uvicorn", "fastapi", "pydantic_settings", "sse_starlette", "starlette_context"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"serve needs the package {name}; pip install 'swaa-edge[server]'")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on `host`:`port`. Raises `ConfigError` if that can't be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error


def served_class() -> type[SwaaLlama]:
    """SwaaLlama whose answers, when the server stops, end in a status of HTTP instead of a traceback on stderr."""
    from fastapi import HTTPException

    from swaa_edge.llama import SwaaLlama

    class Served(SwaaLlama):
        def generate(self, *args: Any, **kwargs: Any) -> Iterator[int]:
            try:
                yield from super().generate(*args, **kwargs)
            except GenerationCancelled:
                raise HTTPException(503, "the server is stopping") from None

    return Served


def make_app(llm: SwaaLlama, api_key: str | None = None) -> fastapi.FastAPI:
    """Upstream's server application, with `llm` as its one model."""
    from swaa_edge import native

    native.load()
    from llama_cpp.server import app as upstream
    from llama_cpp.server.model import LlamaProxy
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    _declare_details()

    class LoadedModel(LlamaProxy):
        @staticmethod
        def load_llama_from_model_settings(settings: ModelSettings) -> SwaaLlama:
            return llm

    # Without model_construct these classes would also read HOST, PORT, MODEL, CACHE and so on from the environment.
    # A new request waits for its turn; upstream's default is to cut the answer that is being given.
    server = ServerSettings.model_construct(api_key=api_key, interrupt_requests=False)
    model = ModelSettings.model_construct(model=llm.model_path, model_alias=os.path.basename(llm.model_path))
    with _replaced(upstream, "LlamaProxy", LoadedModel), _unset("CONFIG_FILE"):
        return upstream.create_app(server_settings=server, model_settings=[model])


def run_server(app: fastapi.FastAPI, llm: SwaaLlama, listener: socket.socket) -> None:
    """Answer requests on `listener` until a signal; then stop the answer that is being given and return."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            # A stream that breaks off now has begun already, so it can't get a status; its traceback is no news.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            llm.cancel()
            super().handle_exit(sig, frame)

    Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def _declare_details() -> None:
    # FastAPI drops what an answer's type doesn't have, and upstream's lacks what SwaaLlama says about the cache.
    from llama_cpp.llama_types import CompletionUsage
    from typing_extensions import NotRequired

    CompletionUsage.__annotations__["prompt_tokens_details"] = NotRequired[dict[str, int]]


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    # create_app takes no class for the model it loads; it looks this one up when it is called.
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def _unset(variable: str) -> Iterator[None]:
    # create_app would take its settings from the file that this variable of such a common name points to.
    before = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[variable] = before
