"""Verifies the patch series.

The check is meant for CI. Upstream's files are read from the sdist, not from the source trees.

    print(check(Workspace(Path("."))))      # PatchError: one line per problem
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import PurePosixPath

from patches_lib.patchfile import Patch, PatchError, export
from patches_lib.upstream import get_sdist, read_tree
from patches_lib.workspace import Workspace, read, stack, walk

COMPILED = (".c", ".cc", ".cpp", ".cu", ".m", ".mm", ".metal", ".comp")
KNOWN = {"README.md", "UPSTREAM", "series", "src"}


def check(ws: Workspace) -> str:
    """Check the series and our own files. Return a summary.

    Every patch must fit exactly, export byte-identically and be listed in patches/series. A file in patches/src/ must
    begin with a comment, and must not replace an upstream file. Every source file must be compiled.

    Raises `PatchError` with one line per problem.
    """
    names = ws.names()
    if not names:
        raise PatchError("patches/series is empty or missing: nothing was checked")
    files = {path: data for path, (data, _) in read_tree(get_sdist(ws.pin, ws.cache), ws.pin).items()}
    strangers = {path.name for path in ws.patches.iterdir()} - KNOWN - set(names)
    found = [f"patches/{name} is not in patches/series" for name in sorted(strangers)]
    patches: list[Patch] = []
    for name in names:
        try:
            patches.append(ws.patch(name))
        except PatchError as error:
            found.append(str(error))
    ours = ws.ours()
    if not ours:
        found.append("patches/src/ holds no file: none of our files was checked")
    found += [f"patches/src/{path} would overwrite an upstream file" for path in ours if path in files]
    there = walk(ws.pristine)
    if there and (edited := [p for p in sorted(files.keys() | there) if read(ws.pristine / p) != files.get(p)]):
        found.append(f"{ws.pristine / edited[0]} differs from the sdist; delete {ws.pristine} and run 'fetch'")
    if len(patches) == len(names):
        try:
            versions = stack(patches, files.get)
            for index, patch in enumerate(patches):
                changed = {path: (states[index], states[index + 1]) for path, states in versions.items()}
                if export(patch.header, changed) != read(ws.patches / patch.name):
                    found.append(f"{patch.name} re-exports differently; run 'refresh' and commit what it writes")
            tree = files | {path: states[-1] for path, states in versions.items()}
            found += [
                f"patches/src/{path} is not compiled: no CMakeLists.txt above it names it"
                for path in ours
                if path.endswith(COMPILED) and not _is_built(path, tree, ours)
            ]
        except PatchError as error:
            found.append(str(error))
    found += [
        f"patches/src/{path} must open with a comment that says what it is"
        for path, data in ours.items()
        if not _describes_itself(path, data)
    ]
    if found:
        raise PatchError("\n".join(found))
    touched = {path for patch in patches for path in patch.files}
    hunks = sum(len(hunks) for patch in patches for hunks in patch.files.values())
    return (
        f"{ws.pin.name} {ws.pin.version}: {len(patches)} patches ({hunks} hunks in {len(touched)} upstream files) "
        f"fit exactly and re-export identically; {len(ours)} files of ours"
    )


def _describes_itself(path: str, data: bytes) -> bool:
    text = data.decode("utf-8", "replace").lstrip()
    pattern = r"((?:#.*\n?)+)" if path.endswith((".py", ".cmake", ".txt")) else r"((?://.*\n?)+|/\*[\s\S]*?\*/)"
    comment = re.match(pattern, text)
    return bool(comment) and len(re.findall(r"[A-Za-z]{2,}", comment.group())) >= 4


def _is_built(path: str, tree: Mapping[str, bytes], ours: Mapping[str, bytes]) -> bool:
    """Return whether the file is listed in a CMakeLists.txt above, by name or glob, or included by one of our files."""
    name = re.escape(PurePosixPath(path).name)
    for folder in PurePosixPath(path).parents:
        lists = tree.get((folder / "CMakeLists.txt").as_posix(), b"").decode("utf-8", "replace")
        lists = re.sub(r"#.*", "", lists)
        inside = PurePosixPath(path).relative_to(folder).as_posix()
        if re.search(rf"(?<![\w.-]){name}(?![\w.-])", lists):
            return True
        globs = [glob for glob in re.findall(r"[\w./-]*\*[\w./*-]*", lists) if glob.count("/") == inside.count("/")]
        if any(fnmatch(inside, glob) for glob in globs):
            return True
    return any(re.search(rf'#include "[^"]*{name}"', data.decode("utf-8", "replace")) for data in ours.values())
