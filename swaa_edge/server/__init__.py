"""An OpenAI-compatible server with a SwaaLlama in it.

from swaa_edge.server import serve
serve("model.gguf", port=8000)
"""

from swaa_edge.server.app import serve

__all__ = ["serve"]
