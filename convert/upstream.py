"""Locates llama.cpp's own converter. Reads the supported names from the converter's source text.

Importing the converter would import torch, and a mistyped name would be reported only after seconds.

    scripts = upstream_scripts(); "LlamaForCausalLM" in architectures(scripts)
"""

import ast
import functools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import swaa_edge
from swaa_edge.errors import NativeLibraryError

#: Environment variable with the root of a llama.cpp tree. If set, the converter in that tree is used.
PATH_VARIABLE = "SWAA_EDGE_UPSTREAM"

_ENTRY = "convert_hf_to_gguf.py"


def upstream_scripts() -> Path:
    """Return the folder of llama.cpp's converter: `convert_hf_to_gguf.py`, `conversion/` and `gguf-py/`.

    The environment variable SWAA_EDGE_UPSTREAM can name the folder. By default, the folder is `upstream` in the
    installed package, or else `vendor/llama.cpp` in the source tree.

    Raises `NativeLibraryError` if no folder is complete.
    """
    given = os.environ.get(PATH_VARIABLE)
    if given:
        if not _complete(Path(given)):
            raise NativeLibraryError(
                f"{PATH_VARIABLE} = {given} lacks {_ENTRY}, conversion/ or gguf-py/; "
                "set it to the root of a llama.cpp tree, or unset it"
            )
        return Path(given).resolve()
    for folder in _candidates():
        if _complete(folder):
            return folder.resolve()
    raise NativeLibraryError(
        "llama.cpp's converter is not installed; run `make setup` in the source tree, or reinstall swaa-edge"
    )


def _candidates() -> Iterator[Path]:
    package = Path(swaa_edge.__file__).parent
    yield package / "upstream"
    # An installed package has the scripts, even if this source tree shadows the package.
    for entry in sys.path:
        yield Path(entry or ".") / "swaa_edge" / "upstream"
    yield package.parent / "vendor" / "llama.cpp"


def _complete(folder: Path) -> bool:
    return (folder / _ENTRY).is_file() and (folder / "conversion").is_dir() and (folder / "gguf-py").is_dir()


@functools.cache
def architectures(scripts: Path) -> frozenset[str]:
    """Return the names of the model classes (`architectures` in config.json) that the converter supports."""
    source = scripts / "conversion" / "__init__.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == "TEXT_MODEL_MAP" and node.value:
            return frozenset(ast.literal_eval(node.value))
    raise _unexpected(source)


@functools.cache
def pre_tokenizers(scripts: Path) -> tuple[str, ...]:
    """Return llama.cpp's names of pre-tokenizers, sorted. A pre-tokenizer splits text before byte-pair merging."""
    source = scripts / "conversion" / "base.py"
    found = re.search(r"def get_vocab_base_pre\b.*?\n    def ", source.read_text(encoding="utf-8"), re.DOTALL)
    names = set(re.findall(r'^ +res = "([^"]+)"$', found[0], re.MULTILINE)) if found else set()
    if not names:
        raise _unexpected(source)
    return tuple(sorted(names))


def _unexpected(source: Path) -> NativeLibraryError:
    return NativeLibraryError(f"{source} is not the converter that this swaa-edge expects; reinstall swaa-edge")
