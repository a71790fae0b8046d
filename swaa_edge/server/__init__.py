"""Serves a `SwaaLlama` with the OpenAI-compatible server of llama-cpp-python.

    serve("model.gguf", port=8000, on_ready=print)
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "Once upon", "max_tokens": 20}'

Routes, request types and streaming come from llama-cpp-python. This module only creates the model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from swaa_edge.config import Configuration
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import ConfigError, GenerationCancelled
from swaa_edge.files.model import read_model
from swaa_edge.generate import conversation_context

if TYPE_CHECKING:
    import fastapi

    from swaa_edge.llama import SwaaLlama


def serve(
    model: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    swaa: Configuration | None = None,
    engine: EngineSettings | None = None,
    on_ready: Callable[[str], object] = lambda url: None,
) -> None:
    """Serve `model` over OpenAI's API until a signal arrives.

    port: port to listen on, or 0 for any free port.
    api_key: key that each request must contain (default: no key is required).
    swaa: settings, as for `SwaaLlama`.
    on_ready: function that is called with the base URL (".../v1") after the model is loaded.

    Raises `ConfigError` if a package is missing or if the address can't be used. Also raises the errors of loading a
    model.
    """
    _check_packages()
    engine = engine or EngineSettings()
    # Listen first: a port in use is then reported before the model is loaded.
    with contextlib.closing(listen(host, port)) as listener:
        file = read_model(model)
        llm = engine.load(file, swaa=swaa, n_ctx=conversation_context(file, engine.n_ctx), kind=served_class())
        with contextlib.closing(llm):
            address, port = listener.getsockname()[:2]
            on_ready(f"http://{f'[{address}]' if ':' in address else address}:{port}/v1")
            run_server(make_app(llm, api_key), llm, listener)


def _check_packages() -> None:
    for name in ("uvicorn", "fastapi", "pydantic_settings", "sse_starlette", "starlette_context"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"serve needs the package {name}; pip install 'swaa-edge[server]'")


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises `ConfigError` if the address or the port can't be used."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error


def served_class() -> type[SwaaLlama]:
    """Return a subclass of SwaaLlama that answers with HTTP status 503 if the server stops."""
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
    """Return the server application of llama-cpp-python with `llm` as its only model."""
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

    # model_construct ignores environment variables such as HOST, PORT, MODEL and CACHE.
    # interrupt_requests=False: a new request waits for the answer in progress.
    server = ServerSettings.model_construct(api_key=api_key, interrupt_requests=False)
    model = ModelSettings.model_construct(model=llm.model_path, model_alias=os.path.basename(llm.model_path))
    # create_app uses upstream.LlamaProxy to load the model. If CONFIG_FILE names a file, create_app would read the
    # settings from the file.
    proxy, config_file = upstream.LlamaProxy, os.environ.pop("CONFIG_FILE", None)
    upstream.LlamaProxy = LoadedModel
    try:
        return upstream.create_app(server_settings=server, model_settings=[model])
    finally:
        upstream.LlamaProxy = proxy
        if config_file is not None:
            os.environ["CONFIG_FILE"] = config_file


def run_server(app: fastapi.FastAPI, llm: SwaaLlama, listener: socket.socket) -> None:
    """Answer requests on `listener` until a signal arrives. The signal also stops the answer in progress."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            # A stream in progress can't change its HTTP status. uvicorn would log a traceback.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            llm.cancel()
            super().handle_exit(sig, frame)

    Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def _declare_details() -> None:
    # FastAPI drops fields that an answer's type doesn't declare. Upstream doesn't declare the count of reused tokens.
    from llama_cpp.llama_types import CompletionUsage
    from typing_extensions import NotRequired

    CompletionUsage.__annotations__["prompt_tokens_details"] = NotRequired[dict[str, int]]
