"""Runs full-attention models under sliding-window attention, so that long prompts are fast on laptops.

from swaa_edge import SwaaConfig, SwaaLlama
llm = SwaaLlama("model.gguf", swaa=SwaaConfig.from_recipe("balanced"), n_ctx=32768)
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import SwaaError

if TYPE_CHECKING:
    from swaa_edge.llama import SwaaLlama

__version__ = "0.2.0"
__all__ = ["SwaaConfig", "SwaaError", "SwaaLlama", "__version__"]

# In an installed package, the converter is the subpackage swaa_edge/convert. In a source tree, convert/ lies beside
# this package, so submodules are also searched in the tree's root.
_source_root = _Path(__file__).resolve().parent.parent
if not _Path(__file__).with_name("convert").exists() and (_source_root / "convert" / "METADATA.md").is_file():
    __path__.append(str(_source_root))


def __getattr__(name: str) -> object:
    # SwaaLlama loads llama_cpp and the native library. Reading a config must work without both.
    if name == "SwaaLlama":
        from swaa_edge.llama import SwaaLlama

        return SwaaLlama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
