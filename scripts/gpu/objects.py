"""A compiler launcher that lets two builds share equal objects.

The patched and the unpatched llama.cpp have most sources in common, and a CUDA source takes up to a minute. The key of
an object is a hash of everything it is made from: the compiler's file, its arguments including those in response
files, and the content of the source and of every file it includes from the tree, in all branches of the preprocessor.
Paths count relative to the tree and the build. System headers are ignored: both builds run on one machine, one after
the other. A source with an include that cannot be resolved (a macro, or a quoted name that does not exist) is never
shared. Standard library only.

    cmake ... "-DCMAKE_CUDA_COMPILER_LAUNCHER=python3;objects.py;CACHE_FOLDER;TREE;BUILD_FOLDER"
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>|(\w+))', re.MULTILINE)
_SOURCES = (".c", ".cc", ".cpp", ".cu", ".S", ".s")


def launch(cache: Path, tree: Path, build: Path, command: Sequence[str]) -> int:
    """Run `command`, or copy the object that the same command made before; returns the exit code."""
    target = _after(command, "-o")
    key = key_of(tree, build, command) if target and "-c" in command else None
    if key is None or target is None:
        return subprocess.run(command, check=False).returncode
    depfile = _after(command, "-MF")
    kept, kept_dependencies = cache / f"{key}.o", cache / f"{key}.d"
    if kept.exists() and (depfile is None or kept_dependencies.exists()):
        shutil.copyfile(kept, target)
        if depfile is not None:
            Path(depfile).write_text(_places(kept_dependencies.read_text(), tree, build, back=True))
        return 0
    code = subprocess.run(command, check=False).returncode
    if code == 0 and Path(target).exists():
        cache.mkdir(parents=True, exist_ok=True)
        if depfile is not None and Path(depfile).exists():
            _keep(kept_dependencies, _places(Path(depfile).read_text(), tree, build).encode())
        _keep(kept, Path(target).read_bytes())
    return code


def key_of(tree: Path, build: Path, command: Sequence[str]) -> str | None:
    """The name of an object in the cache; None if it must not be shared."""
    try:
        command = _expanded(command)
    except (OSError, ValueError):
        return None
    source = next((Path(word) for word in command[1:] if word.endswith(_SOURCES) and Path(word).exists()), None)
    if source is None:
        return None
    digest = hashlib.sha256()
    compiler = shutil.which(command[0]) or command[0]
    facts = os.stat(compiler) if os.path.exists(compiler) else None
    digest.update(f"{compiler} {facts and (facts.st_size, facts.st_mtime_ns)}\0".encode())
    for word in command[1:]:
        digest.update(_places(word, tree, build).encode() + b"\0")
    folders = [Path(folder) for folder in _include_folders(command)]
    roots = (tree.resolve(), build.resolve())
    todo, seen = [source.resolve()], {source.resolve()}
    while todo:
        path = todo.pop()
        data = path.read_bytes()
        digest.update(_places(str(path), tree, build).encode() + b"\0" + hashlib.sha256(data).digest())
        for quoted, angled, macro in _INCLUDE.findall(data):
            if macro:
                return None
            name = os.fsdecode(quoted or angled)
            for folder in [path.parent, *folders] if quoted else folders:
                found = (folder / name).resolve()
                if found.is_file():
                    if any(root in found.parents for root in roots) and found not in seen:
                        seen.add(found)
                        todo.append(found)
                    break
            else:
                if quoted:
                    return None
    return digest.hexdigest()


def _expanded(command: Sequence[str]) -> list[str]:
    """The command with its response files replaced by their content: CMake keeps include folders in them."""
    words: list[str] = []
    following = False
    for word in command:
        if following or (word.startswith("@") and len(word) > 1):
            words += shlex.split(Path(word if following else word[1:]).read_text())
            following = False
        elif word in ("--options-file", "-optf"):
            following = True
        else:
            words.append(word)
    return words


def _include_folders(command: Sequence[str]) -> list[str]:
    folders = []
    for i, word in enumerate(command):
        if word in ("-I", "-isystem"):
            folders.append(command[i + 1])
        elif word.startswith(("-I", "-isystem=")):
            folders.append(word[2:] if word.startswith("-I") else word.split("=", 1)[1])
    return folders


def _places(text: str, tree: Path, build: Path, back: bool = False) -> str:
    for name, folder in (("@BUILD@", build), ("@TREE@", tree)):
        text = text.replace(name, str(folder)) if back else text.replace(str(folder), name)
    return text


def _after(command: Sequence[str], option: str) -> str | None:
    return command[command.index(option) + 1] if option in command[:-1] else None


def _keep(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
        part.write(data)
    os.replace(part.name, path)


if __name__ == "__main__":
    sys.exit(launch(*map(Path, sys.argv[1:4]), sys.argv[4:]))
