"""A compiler launcher that lets two builds share object files.

The patched and the unpatched llama.cpp have most source files in common, and compiling a CUDA source takes up to a
minute. An object file is reused if two things are the same:

- the compiler and the arguments, including arguments in response files;
- the content of the sources and headers that the compiler lists in the tree or the build folder.

Paths are compared relative to the tree and the build folder. System headers are ignored, since both builds run on one
machine. This module uses only the standard library.

    cmake ... "-DCMAKE_CUDA_COMPILER_LAUNCHER=python3;objects.py;CACHE_FOLDER;TREE;BUILD_FOLDER"
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def launch(cache: Path, tree: Path, build: Path, command: Sequence[str]) -> int:
    """Run `command`, unless the cache has the object file. Return the exit code."""
    target, depfile = _after(command, "-o"), _after(command, "-MF")
    if target is None or depfile is None or "-c" not in command:
        return subprocess.run(command, check=False).returncode
    key = _key(tree, build, command)
    for made in sorted(cache.glob(f"{key}-*.d")):
        listed = _places(made.read_text(), tree, build, back=True)
        if made.name == f"{key}-{_inputs(listed, tree, build)}.d":
            shutil.copyfile(made.with_suffix(".o"), target)
            Path(depfile).write_text(listed)
            return 0
    code = subprocess.run(command, check=False).returncode
    if code == 0 and (inputs := _inputs(listed := Path(depfile).read_text(), tree, build)):
        cache.mkdir(parents=True, exist_ok=True)
        made = cache / f"{key}-{inputs}.d"
        _write(made.with_suffix(".o"), Path(target).read_bytes())
        _write(made, _places(listed, tree, build).encode())
    return code


def _key(tree: Path, build: Path, command: Sequence[str]) -> str:
    """Hash the compiler, the arguments and the content of response files."""
    compiler = shutil.which(command[0]) or command[0]
    facts = os.stat(compiler)
    words = [compiler, str(facts.st_size), str(facts.st_mtime_ns)]
    for before, word in itertools.pairwise(command):
        file = word[1:] if word.startswith("@") else word if before in ("--options-file", "-optf") else ""
        words.append(Path(file).read_text() if os.path.isfile(file) else word)
    return hashlib.sha256("\0".join(_places(word, tree, build) for word in words).encode()).hexdigest()[:32]


def _inputs(depfile: str, tree: Path, build: Path) -> str | None:
    """Hash the files that a depfile lists, and the paths of all files with these names in the tree.

    The paths matter because another tree may have one more header with the same name. The compiler may then find the
    other header first. Returns None if the depfile lists no file in the tree or the build folder.
    """
    roots = tuple(f"{folder.resolve()}{os.sep}" for folder in (tree, build))
    words = re.split(r":\s", depfile, maxsplit=1)[-1].replace("\\\n", " ").split()
    paths = [path for path in map(os.path.realpath, words) if path.startswith(roots)]
    names = {os.path.basename(path) for path in paths}
    places = [(os.path.relpath(folder, tree), names.intersection(files)) for folder, _, files in os.walk(tree)]
    digest = hashlib.sha256(repr(sorted((folder, sorted(found)) for folder, found in places if found)).encode())
    for path in paths:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest() if os.path.isfile(path) else b"missing")
    return digest.hexdigest()[:32] if paths else None


def _places(text: str, tree: Path, build: Path, back: bool = False) -> str:
    for name, folder in (("@BUILD@", build), ("@TREE@", tree)):
        text = text.replace(name, str(folder)) if back else text.replace(str(folder), name)
    return text


def _after(command: Sequence[str], option: str) -> str | None:
    return command[command.index(option) + 1] if option in command[:-1] else None


def _write(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
        part.write(data)
    os.replace(part.name, path)


if __name__ == "__main__":
    sys.exit(launch(*map(Path, sys.argv[1:4]), sys.argv[4:]))
