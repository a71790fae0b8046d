"""Keeps the patched tree consistent with the series: fetch and apply.

Each file has three versions:

- the version that patches/ defines;
- the version last written to the tree, known by the hash in a stamp file beside the tree;
- the version now in the tree.

Comparing the versions distinguishes local edits from changes in patches/, so no change is lost. Unchanged files are not
written again, so ninja rebuilds only changed files.

    print(apply(Workspace(Path("."))))
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from patches_lib.patchfile import NAME, Patch, PatchError, apply_hunks, export, parse
from patches_lib.upstream import SKIP, get_sdist, read_pin, read_tree, unpack

# New files in the tree with these endings are ours. Other new files are leftovers of builds and editors.
SOURCE = (".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".m", ".mm", ".metal", ".comp", ".cmake", ".txt", ".py")


class Workspace:
    """The folders of one checkout, and the state of its patched tree."""

    def __init__(self, root: Path, cache: Path | None = None):
        self.patches = root / "patches"
        self.src = self.patches / "src"
        self.vendor = root / "vendor"
        self.cache = cache or self.vendor
        self.pristine = self.vendor / "llama.cpp"
        self.pristine_stamp = self.vendor / "llama.cpp.stamp"
        self.tree = self.vendor / "llama.cpp-patched"
        self.tree_stamp = self.vendor / "llama.cpp-patched.stamp"
        self.pin = read_pin(self.patches / "UPSTREAM")

    def upstream(self, path: str) -> bytes | None:
        return read(self.pristine / path)

    def names(self) -> list[str]:
        """Return the patch names in order, or an empty list if patches/series does not exist."""
        lines = (read(self.patches / "series") or b"").decode().splitlines()
        names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        for name in names:
            if not NAME.fullmatch(name) or names.count(name) > 1:
                raise PatchError(f"patches/series: '{name}' must occur once and look like 0001-what-it-is.patch")
        return names

    def patch(self, name: str) -> Patch:
        if (data := read(self.patches / name)) is None:
            raise PatchError(f"patches/series names {name}, which is not in patches/")
        return parse(name, data)

    def series(self) -> list[Patch]:
        return [self.patch(name) for name in self.names()]

    def ours(self) -> dict[str, bytes]:
        """Return {path in the tree: content} of our own files in patches/src/."""
        return {name: path.read_bytes() for name, path in walk(self.src).items()}

    def applied(self) -> dict[str, str]:
        """Return {path: sha256} of the files as they were last written to the tree."""
        stamp = self._stamp()
        if stamp["pin"] != self.pin.sha256:
            raise PatchError(f"{self.tree} was made from another upstream release; save your edits, then delete it")
        return stamp["files"]

    def _stamp(self) -> dict:
        # Without a stamp (first or interrupted run), nothing was applied. Files that already fit count as unedited.
        data = read(self.tree_stamp)
        try:
            return json.loads(data) if data else {"pin": self.pin.sha256, "files": {}}
        except ValueError:
            raise PatchError(f"{self.tree_stamp} is not JSON; delete it") from None

    def write_stamp(self, files: Mapping[str, str]) -> None:
        stamp = {"pin": self.pin.sha256, "files": files}
        write(self.tree_stamp, json.dumps(stamp, indent=1, sort_keys=True).encode())

    def edited(self, applied: Mapping[str, str]) -> set[str]:
        """Return the paths of files that were changed, added or deleted since the tree was last written."""
        pristine, tree = walk(self.pristine), walk(self.tree)
        changed = set()
        for name in pristine.keys() | applied.keys():
            have = read(self.tree / name)
            if digest(have) != applied[name] if name in applied else have != self.upstream(name):
                changed.add(name)
        return changed | {n for n in tree if n not in pristine and n not in applied and n.endswith(SOURCE)}

    def drop_tree_of_other_upstream(self) -> None:
        """Delete a patched tree of another pin. Raises `PatchError` if the tree has local edits."""
        stamp = self._stamp()
        if not self.tree.is_dir() or stamp["pin"] == self.pin.sha256:
            return
        if edits := self.edited(stamp["files"]):
            raise PatchError(f"{self.tree} is from another upstream and holds {some(edits)}; save them, then delete it")
        shutil.rmtree(self.tree)
        self.tree_stamp.unlink()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let only one command run at a time, since two builds may start together."""
        self.vendor.mkdir(parents=True, exist_ok=True)
        with open(self.vendor / ".lock", "a") as file:
            with contextlib.suppress(ImportError):  # Windows has no fcntl, and no lock here
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def stack(patches: Sequence[Patch], base: Callable[[str], bytes | None]) -> dict[str, list[bytes]]:
    """Apply the patches without fuzz or offset. Return every version of each changed file.

    The result is {path: [upstream's content, content after the first patch, after the second, ...]}.

    base: function from a path to upstream's content.
    """
    versions: dict[str, list[bytes]] = {}
    for index, patch in enumerate(patches):
        for path, hunks in patch.files.items():
            if path not in versions:
                if (data := base(path)) is None:
                    raise PatchError(f"{patch.name}: {path} is not an upstream file; our own files go to patches/src/")
                versions[path] = [data]
            states = versions[path]
            states += states[-1:] * (index + 1 - len(states))
            states.append(apply_hunks(states[-1], hunks, f"{patch.name}: {path}"))
    for states in versions.values():
        states += states[-1:] * (len(patches) + 1 - len(states))
    return versions


def export_all(patches: Sequence[Patch], versions: Mapping[str, Sequence[bytes]]) -> dict[str, bytes]:
    """Export the result of `stack` as {patch name: content}.

    Raises `PatchError` if a patch would be empty, or if the exported patches give another result when applied.
    """
    exported = {}
    for index, patch in enumerate(patches):
        files = {path: (states[index], states[index + 1]) for path, states in versions.items()}
        exported[patch.name] = export(patch.header, files)
        if exported[patch.name] == patch.header:
            raise PatchError(f"{patch.name} would be empty; remove it with 'refresh --drop {patch.name}'")
    again = stack([parse(name, data) for name, data in exported.items()], lambda path: versions[path][0])
    for path, states in versions.items():
        if again.get(path, states[:1])[-1] != states[-1]:
            raise PatchError(f"the exported series does not reproduce {path}; nothing was written")
    return exported


def wanted(ws: Workspace) -> dict[str, bytes]:
    """Return {path: content} of the files that patches/ adds or changes."""
    ours = ws.ours()
    for path in ours:
        if (ws.pristine / path).exists():
            raise PatchError(f"patches/src/{path} would overwrite an upstream file; rename it, or make it a patch")
    return ours | {path: states[-1] for path, states in stack(ws.series(), ws.upstream).items()}


def fetch(ws: Workspace) -> str:
    """Unpack the pinned upstream into vendor/llama.cpp, unless the folder is up to date."""
    stamp = f"{ws.pin.sha256} {digest(repr(SKIP).encode())[:12]}\n".encode()
    if ws.pristine.is_dir() and read(ws.pristine_stamp) == stamp:
        return f"{ws.pristine}: {ws.pin.name} {ws.pin.version} is unpacked"
    files = read_tree(get_sdist(ws.pin, ws.cache), ws.pin)
    ws.drop_tree_of_other_upstream()
    ws.pristine_stamp.unlink(missing_ok=True)
    unpack(files, ws.pristine)
    write(ws.pristine_stamp, stamp)
    return f"{ws.pristine}: unpacked {len(files)} files of {ws.pin.name} {ws.pin.version}"


def apply(ws: Workspace, discard: bool = False, keep: bool = False) -> str:
    """Make the patched tree match patches/.

    Raises PatchError if the tree has local edits and neither `discard` nor `keep` is set.
    """
    fetch(ws)
    want = wanted(ws)
    if not ws.tree.is_dir():
        ws.tree_stamp.unlink(missing_ok=True)
        # Files get new mtimes, because objects of an earlier tree may be newer than the pristine files.
        unpack({name: (path.read_bytes(), executable(path)) for name, path in walk(ws.pristine).items()}, ws.tree)
    applied = ws.applied()
    target = {path: want[path] if path in want else ws.upstream(path) for path in ws.edited(applied)}
    lost = {path for path, data in target.items() if read(ws.tree / path) != data}
    if lost and not (discard or keep):
        raise PatchError(f"{ws.tree} holds {some(lost)} missing from patches/; run 'refresh', or 'apply --discard'")
    kept = set() if discard else lost
    written = 0
    for path in sorted((want.keys() | applied.keys() | lost) - kept):
        data = want[path] if path in want else ws.upstream(path)
        if data is not None:
            written += write(ws.tree / path, data, executable(ws.pristine / path))
        elif (ws.tree / path).exists():
            (ws.tree / path).unlink()
            written += 1
    stamp = {path: digest(want[path]) for path in want.keys() - kept}
    ws.write_stamp(stamp | {path: applied[path] for path in kept & applied.keys()})
    note = f"; left {some(kept)} alone" if kept else ""
    return f"{ws.tree}: {len(ws.names())} patches, {len(ws.ours())} files of ours, {written} files written{note}"


def walk(folder: Path) -> dict[str, Path]:
    """Return {relative path: path} of all files in the folder, except the caches and temporary files of tools."""
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("__pycache__", ".git", ".cache") and name[:5] != "build"]
        found += [Path(here, name) for name in files if not name.startswith(".patches-")]
    return {path.relative_to(folder).as_posix(): path for path in found}


def read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def digest(data: bytes | None) -> str:
    return "" if data is None else hashlib.sha256(data).hexdigest()


def executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def write(path: Path, data: bytes, runs: bool = False) -> bool:
    """Replace a file atomically. Return False, without writing, if the content is already the same."""
    if read(path) == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".patches-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(scratch, 0o755 if runs else 0o644)
    os.replace(scratch, path)
    return True


def mirror(files: Mapping[str, bytes], folder: Path) -> None:
    """Make `folder` contain exactly these files.

    Unchanged files keep the modification time, so builds recompile only changed files.
    """
    for name, path in walk(folder).items():
        if name not in files:
            path.unlink()
    for name, data in files.items():
        write(folder / name, data)


def some(paths: set[str]) -> str:
    first = ", ".join(sorted(paths)[:3]) + (", ..." if len(paths) > 3 else "")
    return f"{len(paths)} local edit{'s' if len(paths) > 1 else ''} ({first})"
