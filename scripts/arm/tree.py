"""Exports the sources to build: the part of the patched llama.cpp that ggml and its op tests need.

A separate tree, so that unsaved edits of vendor/llama.cpp-patched are not in it and no other build waits for it.
Unchanged files keep their times.

    export(Path("."), Path("build/arm/tree"))
"""

from __future__ import annotations

import os
from pathlib import Path

from gpu.runner import CheckError
from patches_lib.patchfile import PatchError
from patches_lib.workspace import Workspace, fetch, mirror, walk, wanted


def needed(path: str) -> bool:
    """Whether ggml's CPU library or test-backend-ops needs a file of a llama.cpp tree."""
    in_ggml_src = path.startswith("ggml/src/") and path.count("/") == 2
    ours = path.startswith("tests/test-kv-") and path.endswith(".h")
    single = path in ("LICENSE", "ggml/CMakeLists.txt", "tests/test-backend-ops.cpp")
    return path.startswith(("ggml/cmake/", "ggml/include/", "ggml/src/ggml-cpu/")) or in_ggml_src or ours or single


def export(root: Path, tree: Path) -> None:
    """Write the patched files to `tree`. Raises `CheckError` if upstream can't be fetched or a patch does not apply."""
    cache = os.environ.get("SWAA_EDGE_CACHE")
    try:
        workspace = Workspace(root, Path(cache).resolve() if cache else None)
        with workspace.lock():
            fetch(workspace)
            patched = wanted(workspace)
            files = {name: path.read_bytes() for name, path in walk(workspace.pristine).items() if needed(name)}
    except (PatchError, OSError) as error:
        raise CheckError(f"cannot make the patched tree: {' '.join(str(error).split())}") from None
    files |= {name: data for name, data in patched.items() if needed(name)}
    mirror(files, tree)
