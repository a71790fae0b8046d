"""Exports the sources to build: the part of the patched llama.cpp that ggml and its op tests need.

A separate tree, so that unsaved edits of vendor/llama.cpp-patched are not in it and no other build waits for it.
Unchanged files keep their times.

    export(Path("."), Path("build/arm/tree"))
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from patches_lib.patchfile import PatchError
from patches_lib.workspace import Workspace, fetch, walk, wanted, write

from arm.tools import ArmError


def needed(path: str) -> bool:
    """Whether ggml's CPU library or test-backend-ops needs a file of a llama.cpp tree."""
    in_ggml_src = path.startswith("ggml/src/") and path.count("/") == 2
    ours = path.startswith("tests/test-kv-") and path.endswith(".h")
    single = path in ("LICENSE", "ggml/CMakeLists.txt", "tests/test-backend-ops.cpp")
    return path.startswith(("ggml/cmake/", "ggml/include/", "ggml/src/ggml-cpu/")) or in_ggml_src or ours or single


def export(root: Path, tree: Path) -> None:
    """Write the patched files to `tree`. Raises `ArmError` if upstream can't be fetched or a patch does not apply."""
    cache = os.environ.get("SWAA_EDGE_CACHE")
    try:
        workspace = Workspace(root, Path(cache).resolve() if cache else None)
        with workspace.lock():
            fetch(workspace)
            patched = wanted(workspace)
            files = {name: path.read_bytes() for name, path in walk(workspace.pristine).items() if needed(name)}
    except (PatchError, OSError) as error:
        raise ArmError(f"cannot make the patched tree: {' '.join(str(error).split())}") from None
    files |= {name: data for name, data in patched.items() if needed(name)}
    for name, path in walk(tree).items():
        if name not in files:
            path.unlink()
    for name, data in files.items():
        write(tree / name, data)


def facts(root: Path) -> dict[str, object]:
    """The commit of `root`, and whether patches/ has uncommitted edits."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "commit": git("rev-parse", "HEAD") or None,
        "uncommitted": bool(git("status", "--porcelain", "--", "patches")),
    }
