"""Writes the archive for the GPU machine: both libraries, our programs and the prepared cases.

The archive holds the libraries as sources or as built files. The sources are the patched and the unpatched llama.cpp.
Files that a CPU + CUDA build never opens are left out. A file that is the same in both trees is stored once, with a
hard link. Pure-Python packages for the benchmark are copied from this environment. `PACK.json` describes the content.

    pack("gpu-check.tar.gz", prepared=folder)      # then: tar xf gpu-check.tar.gz
    pack("gpu-check.tar.gz", prepared=folder, built_for="90", built={"patched": folder, "baseline": other})
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import lzma
import os
import subprocess
import tarfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu.trimming import MATRICES, trim

ROOT = Path(__file__).resolve().parents[2]
#: Name of the archive's top folder.
TOP = "gpu-check"
PATCHED, BASELINE = "vendor/llama.cpp-patched", "vendor/llama.cpp"
#: Folder of built libraries in an archive. Each side has a subfolder.
BUILT = "built"
#: Head size of all timed shapes. The unpatched library needs flash attention only for this head size.
TIMED_HEADS = (128,)
# Packages that swaa_edge, llama_cpp and gguf import. numpy is not packed, so the GPU machine must have numpy.
_PACKAGES = ("llama_cpp", "diskcache", "jinja2", "markupsafe", "typing_extensions", "gguf", "yaml", "click")
# Our package, this check, and the tests' helpers that compare logits. All of these files run without torch.
_OURS = ("CMakeLists.txt", "LICENSE", "cmake/*", "swaa_edge/**/*.py", "scripts/gpu/*.py", "tests/support/__init__.py")
_OURS += ("tests/support/engine/*.py", "tests/support/oracle/*.py")
# Folders of a llama.cpp tree that are packed whole, and single files.
_FOLDERS = (
    "cmake/",
    "include/",
    "src/",
    "licenses/",
    "ggml/cmake/",
    "ggml/include/",
    "ggml/src/ggml-cpu/",
    "ggml/src/ggml-cuda/",
    "vendor/hash/",
    "vendor/nlohmann/",
)
_FILES = ("CMakeLists.txt", "LICENSE", "ggml/CMakeLists.txt", "tests/test-backend-ops.cpp")
# Modification time of every file. Some build tools treat 0 as missing.
_TIME = 1_000_000_000
# The dictionary is large enough to find code that both libraries share.
_XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 28}]
# Kernels and vendored backends for other processors.
_NOT = ("ggml/src/ggml-cpu/kleidiai/", "ggml/src/ggml-cpu/spacemit/")
_LEFT_OUT = (
    f"quantized matrix products of types other than {', '.join(MATRICES)}, in both libraries; flash attention of "
    f"head sizes other than {', '.join(map(str, TIMED_HEADS))} in the unpatched one (its vector kernels have all)"
)


def needed(path: str) -> bool:
    """Return whether the build needs the file at `path` in a llama.cpp tree."""
    in_ggml_src = path.startswith("ggml/src/") and path.count("/") == 2
    our_cases = path.startswith("tests/test-kv-") and path.endswith(".h")
    # CMake reads the CMakeLists.txt of every vendored library.
    vendored = path.startswith("vendor/") and path.endswith("CMakeLists.txt")
    found = path.startswith(_FOLDERS) or path in _FILES or in_ggml_src or our_cases or vendored
    return found and not path.startswith(_NOT)


def pack(
    path: str | os.PathLike[str],
    *,
    prepared: Path | None = None,
    wheels: Collection[Path] = (),
    all_kernels: bool = False,
    built_for: str | None = None,
    built: Mapping[str, Path] | None = None,
    root: Path = ROOT,
) -> dict[str, Any]:
    """Write the archive, a .tar.gz or .tar.xz file. Return the content of PACK.json.

    prepared: the folder that `gpu.oracle.prepare` wrote.
    wheels: Python wheels to add, such as CMake's.
    all_kernels: whether to keep all kernel instances.
    built: {side: folder} of built libraries to pack instead of sources. The sides are "patched" (with test-backend-ops)
    and "baseline". The libraries must have been built from an archive of the same sources.
    built_for: compute capability of the libraries in `built`.

    Raises FileNotFoundError if a llama.cpp tree or a Python package is missing.
    """
    files, links = (dict(_built(built)), {}) if built else _sources(root, all_kernels)
    files |= dict(_own_files(root)) | dict(_packages())
    if prepared is not None:
        files |= {f"prepared/{name}": data for name, data in _files_below(prepared)}
    files |= {f"wheels/{wheel.name}": wheel.read_bytes() for wheel in wheels}
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    left_out = None if all_kernels else _LEFT_OUT
    facts = {**commit(root), "digest": digest.hexdigest(), "left_out": left_out, "built_for": built_for}
    _write(Path(path), files | {"PACK.json": (json.dumps(facts, indent=2) + "\n").encode()}, links)
    return facts


def _files_below(folder: Path, pattern: str = "*") -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob(pattern)):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def _built(folders: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
    for side, folder in folders.items():
        for path in sorted(folder.iterdir()):
            if path.is_file() and (path.suffix == ".so" or path.name == "test-backend-ops"):
                yield f"{BUILT}/{side}/{path.name}", path.read_bytes()


def _sources(root: Path, all_kernels: bool) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return both trees' files as {path in the archive: content}, and the links as {path in the archive: target}.

    A file that is the same in both trees becomes a link.
    """
    for tree in (PATCHED, BASELINE):
        if not (root / tree / "src" / "llama.cpp").is_file():
            raise FileNotFoundError(f"{root / tree} is not a llama.cpp tree; run scripts/patches.py apply")
    patched, baseline = subset(root / PATCHED), subset(root / BASELINE)
    if not all_kernels:
        patched, baseline = trim(patched), trim(baseline, heads=TIMED_HEADS)
    links = {f"{BASELINE}/{name}": f"{PATCHED}/{name}" for name, data in baseline.items() if patched.get(name) == data}
    files = {f"{PATCHED}/{name}": data for name, data in patched.items()}
    return files | {full: data for name, data in baseline.items() if (full := f"{BASELINE}/{name}") not in links}, links


def subset(tree: Path) -> dict[str, bytes]:
    """Return {path in the tree: content} of the files that the build needs."""
    return {name: data for name, data in _files_below(tree) if needed(name)}


def _own_files(root: Path) -> Iterator[tuple[str, bytes]]:
    for pattern in _OURS:
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                yield path.relative_to(root).as_posix(), path.read_bytes()


def _packages() -> Iterator[tuple[str, bytes]]:
    for name in _PACKAGES:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise FileNotFoundError(f"the Python package {name} is not installed; use .venv/bin/python of `make setup`")
        origin = Path(found.origin)
        if origin.name == "__init__.py":
            yield from ((f"site/{name}/{path}", data) for path, data in _files_below(origin.parent, "*.py"))
        else:
            yield f"site/{origin.name}", origin.read_bytes()


def commit(root: Path, *paths: str) -> dict[str, Any]:
    """Return the commit of `root` (None if unknown), and whether `paths` (default: all) have uncommitted changes."""

    def git(*words: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
            return done.stdout.strip() if done.returncode == 0 else ""
        return ""

    return {
        "commit": git("rev-parse", "HEAD") or None,
        "uncommitted": bool(git("status", "--porcelain", "--", *paths)),
    }


def _write(path: Path, files: dict[str, bytes], links: dict[str, str]) -> None:
    part = path.with_name(path.name + ".part")
    with contextlib.ExitStack() as stack:
        if path.suffix == ".xz":
            out = stack.enter_context(lzma.open(part, "wb", filters=_XZ))
            archive = stack.enter_context(tarfile.open(fileobj=out, mode="w"))
        else:
            archive = stack.enter_context(tarfile.open(part, "w:gz", compresslevel=6))
        for name, data in files.items():
            entry = tarfile.TarInfo(f"{TOP}/{name}")
            entry.size, entry.mode, entry.mtime = len(data), 0o644, _TIME
            archive.addfile(entry, io.BytesIO(data))
        for name, target in links.items():
            entry = tarfile.TarInfo(f"{TOP}/{name}")
            entry.type, entry.linkname, entry.mtime = tarfile.LNKTYPE, f"{TOP}/{target}", _TIME
            archive.addfile(entry)
    part.replace(path)
