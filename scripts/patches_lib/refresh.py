"""Writes edits of the patched tree back into the patches, and exports the series again.

An edit is made on top of the whole series, but may belong to an earlier patch. A three-way merge moves the edit into
the earlier patch. This also works if several patches change the same file.

    print(refresh(ws, into="0003-x.patch", paths=["src/llama-graph.cpp"]))
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from patches_lib.patchfile import NAME, Patch, PatchError, apply_some, diff_hunks, merge
from patches_lib.workspace import Workspace, apply, digest, export_all, fetch, read, stack, wanted, write


def edits_of(ws: Workspace, applied: Mapping[str, str]) -> dict[str, bytes | None]:
    """Return {path: content in the tree} of local edits that are not in patches/. Deleted files have None."""
    want, edits = wanted(ws), {}
    for path in ws.edited(applied):
        have, now = read(ws.tree / path), want[path] if path in want else ws.upstream(path)
        if have == now:
            continue
        if digest(now) != applied.get(path, digest(ws.upstream(path))):
            advice = "copy the file, run 'apply --discard', redo the edit"
            raise PatchError(f"{path} changed in the tree and in patches/; {advice}")
        edits[path] = have
    return edits


def refresh(
    ws: Workspace, into: str | None = None, new: str | None = None, header: bytes = b"", paths: Sequence[str] = ()
) -> str:
    """Write edits of the patched tree back to patches/ and export the series again.

    Our own files are always written to patches/src/. By default, an edit of an upstream file goes into the only patch
    that changes the file.

    into: name of the patch that gets the edits of upstream files.
    new, header: name and header of a new patch for the edits of upstream files.
    paths: files, folders or line ranges (FILE:FIRST-LAST). Other edits of upstream files are not written.
    """
    fetch(ws)
    if not ws.tree.is_dir():
        raise PatchError(f"{ws.tree} does not exist; run 'apply' first")
    applied, patches = ws.applied(), ws.series()
    if into is not None and into not in ws.names():
        raise PatchError(f"--into {into}: no such patch in the series ({', '.join(ws.names()) or 'which is empty'})")
    if new is not None:
        if new in ws.names() or not NAME.fullmatch(new):
            raise PatchError(f"--new {new}: must be a name not yet in the series, like 0007-what-it-is.patch")
        patches.append(Patch(new, header, {}))
    edits = edits_of(ws, applied)
    mine = {path: data for path, data in edits.items() if ws.upstream(path) is None}
    versions = stack(patches, ws.upstream)
    theirs = {path: data for path, data in edits.items() if path not in mine}
    chosen = _choose(ws, theirs, versions, paths)
    _check_homes(patches, chosen, into or new)
    for path, data in chosen.items():
        home = into or new or next(patch.name for patch in patches if path in patch.files)
        first = [patch.name for patch in patches].index(home) + 1
        states = versions.setdefault(path, [ws.upstream(path)] * (len(patches) + 1))
        merged = [merge(state, states[-1], data) for state in states[first:]]
        if None in merged:
            raise PatchError(f"{path}: the edit overlaps changes of a patch after {home}; name that patch with --into")
        states[first:] = merged
    exported = export_all(patches, versions)
    for path, data in mine.items():
        if data is None:
            (ws.src / path).unlink(missing_ok=True)
    written = [name for name, data in exported.items() if write(ws.patches / name, data)]
    written += [f"src/{path}" for path, data in sorted(mine.items()) if data is None or write(ws.src / path, data)]
    if new is not None:
        write(ws.patches / "series", (read(ws.patches / "series") or b"") + f"{new}\n".encode())
    stamp = {path: digest(versions[path][-1]) for path in chosen}
    ws.write_stamp(applied | stamp | {path: digest(data) for path, data in mine.items() if data is not None})
    note = re.search(r"; left .*", apply(ws, keep=True))
    return f"patches: {', '.join(written) or 'up to date, nothing'} written{note.group() if note else ''}"


def _check_homes(patches: Sequence[Patch], chosen: Mapping[str, bytes | None], home: str | None) -> None:
    for path, data in sorted(chosen.items()):
        touching = [patch.name for patch in patches if path in patch.files]
        if data is None:
            raise PatchError(f"{path} was deleted; a patch can't delete an upstream file, so restore it")
        if home is None and len(touching) != 1:
            more = len([p for p in chosen if sum(p in patch.files for patch in patches) != 1]) - 1
            reason = f"is in {' and '.join(touching)}" if touching else "is in no patch yet"
            also = f" ({more} more like it)" if more else ""
            raise PatchError(f"{path} {reason}{also}; use 'refresh --into NAME {path}', or '--new NAME'")


def _choose(
    ws: Workspace, edits: Mapping[str, bytes | None], versions: Mapping[str, Sequence[bytes]], paths: Sequence[str]
) -> dict[str, bytes | None]:
    if not paths:
        return dict(edits)
    chosen: dict[str, bytes | None] = {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for argument in paths:
        match = re.fullmatch(r"(.*?)(?::(\d+)-(\d+))?", argument)
        path, inside = match.group(1).rstrip("/"), Path(match.group(1)).resolve()
        if inside.is_relative_to(ws.tree.resolve()):
            path = inside.relative_to(ws.tree.resolve()).as_posix()
        found = {name: data for name, data in edits.items() if name == path or name.startswith(path + "/")}
        if not found:
            raise PatchError(f"{argument}: no edited upstream file in {ws.tree}")
        if match.group(2):
            ranges.setdefault(path, []).append((int(match.group(2)) - 1, int(match.group(3))))
        else:
            chosen |= found
    for path in ranges.keys() - chosen.keys():
        before = versions[path][-1] if path in versions else ws.upstream(path)
        hunks = diff_hunks(before, edits[path] or b"", path, 0)
        spans = [(hunk, hunk.new_start, hunk.new_start + max(1, len(hunk.new))) for hunk in hunks]
        picked = [hunk for hunk, a, b in spans if any(a < last and first < b for first, last in ranges[path])]
        if not picked:
            raise PatchError(f"{path}: no edit in these lines; edits start at lines {[a + 1 for _, a, _ in spans]}")
        chosen[path] = apply_some(before, picked, path)
    return chosen
