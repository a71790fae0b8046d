"""`swaa-edge serve`: run an OpenAI-compatible server.

swaa-edge serve model.gguf --port 8000
"""

from __future__ import annotations

import os

import click

from swaa_edge.cli.options.engine import engine_options
from swaa_edge.cli.options.swaa import swaa_options_or_full
from swaa_edge.config import Configuration
from swaa_edge.engine.settings import EngineSettings


@click.command()
@click.argument("model", metavar="MODEL.gguf")
@click.option(
    "--host",
    metavar="ADDRESS",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 listens on all networks.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    default=8000,
    show_default=True,
    help="Port to listen on; 0 selects a free port.",
)
@click.option("--api-key", metavar="KEY", help="API key; requests without this key are refused.")
@engine_options
@swaa_options_or_full
def serve(
    model: str, host: str, port: int, api_key: str | None, engine: EngineSettings, swaa: Configuration | None
) -> None:
    """Serve a model over OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models.

    Requests are answered one at a time. The server needs more packages: pip install 'swaa-edge[server]'

    \b
    swaa-edge serve model.gguf --port 8000 --recipe balanced
    """
    from swaa_edge.server import serve as run

    def ready(url: str) -> None:
        click.echo(f"serving {os.path.basename(model)} at {url} (Ctrl-C stops it)", err=True)

    run(model, host=host, port=port, api_key=api_key, swaa=swaa, engine=engine, on_ready=ready)
