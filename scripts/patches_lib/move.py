"""Moves the series to another upstream release, or removes a patch from the series.

A patch's context lines do not show where a hunk belongs in a changed file. So each patch is moved by a three-way merge
of the old file, the patched old file and the new file.

    print(against(ws, "0.3.40")); print(onto(ws, "0.3.40")); print(drop(ws, "0003-x.patch"))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from patches_lib.patchfile import Patch, PatchError, apply_hunks, apply_some, merge
from patches_lib.refresh import edits_of
from patches_lib.upstream import Pin, get_sdist, read_tree, sha256_of
from patches_lib.workspace import Workspace, export_all, fetch, read, some, stack, write


@dataclass(frozen=True)
class Verdict:
    """The outcome for one patch.

    moved: whether a hunk did not fit at its line, and a merge was tried.
    failed: hunks and files that don't apply.
    """

    name: str
    moved: bool
    failed: tuple[str, ...]  # "path hunk 1, 3"

    def __str__(self) -> str:
        if self.failed:
            return f"{self.name}: FAILS: {'; '.join(self.failed)}"
        return f"{self.name}: {'applies with offset' if self.moved else 'applies'}"


def carry(
    patches: Sequence[Patch],
    old: Mapping[str, Sequence[bytes]],
    new: Callable[[str], bytes | None],
    out: Collection[str] = (),
) -> tuple[dict[str, list[bytes]], list[Verdict]]:
    """Apply every patch except those in `out` to another upstream release.

    old: the result of `stack` for the current release.
    new: function from a path to the file's content in the other release.

    Returns the stack for the other release and a verdict per patch. The stack lacks the hunks that did not fit.
    """
    base = {path: new(path) for path in old}
    versions = {path: [data] for path, data in base.items() if data is not None}
    verdicts = []
    for index, patch in enumerate(patches):
        if patch.name in out:
            continue
        moved, failed = False, []
        for states in versions.values():
            states.append(states[-1])
        for path, hunks in patch.files.items():
            if path not in versions:
                failed.append(f"{path} is gone")
                continue
            states, before, after = versions[path], old[path][index], old[path][index + 1]
            try:
                states[-1] = apply_hunks(states[-1], hunks, path)
                continue
            except PatchError:
                moved = True
            if (merged := merge(states[-1], before, after)) is not None:
                states[-1] = merged
                continue
            fits = [merge(states[-1], before, apply_some(before, [hunk], path)) is not None for hunk in hunks]
            fitting = [hunk for hunk, fit in zip(hunks, fits, strict=True) if fit]
            rest = merge(states[-1], before, apply_some(before, fitting, path))
            if rest is None or all(fits):
                fits, rest = [False] * len(hunks), states[-1]
            states[-1] = rest
            failed.append(f"{path} hunk {', '.join(str(n) for n, fit in enumerate(fits, 1) if not fit)}")
        verdicts.append(Verdict(patch.name, moved, tuple(failed)))
    return versions, verdicts


def _other(ws: Workspace, version: str) -> tuple[Pin, dict[str, bytes]]:
    if not re.fullmatch(r"\d[\w.]*", version):
        raise PatchError(f"'{version}' is not a version of {ws.pin.name}; write it like {ws.pin.version}")
    pin = replace(ws.pin, version=version, sha256=ws.pin.sha256 if version == ws.pin.version else "")
    sdist = get_sdist(pin, ws.cache)
    files = {path: data for path, (data, _) in read_tree(sdist, pin).items()}
    for path in ws.ours():
        if path in files:
            raise PatchError(f"{pin.name} {version} already has a file {path}; rename patches/src/{path}")
    return replace(pin, sha256=sha256_of(sdist)), files


def against(ws: Workspace, version: str) -> tuple[str, int]:
    """Try the patches on another release. Return a report and the number of patches that fail."""
    fetch(ws)
    patches = ws.series()
    if not patches:
        raise PatchError("patches/series is empty: there is nothing to check")
    pin, files = _other(ws, version)
    _, verdicts = carry(patches, stack(patches, ws.upstream), files.get)
    bad = sum(bool(verdict.failed) for verdict in verdicts)
    moved = sum(verdict.moved and not verdict.failed for verdict in verdicts)
    total = f"{pin.name} {version}: {len(verdicts)} patches, {moved} with offset, {bad} failing"
    return "\n".join([*map(str, verdicts), total]), bad


def onto(ws: Workspace, version: str) -> str:
    """Rewrite the series and the pin for another release. Hunks that fail are left out, and listed in the result."""
    patches = _unedited_series(ws)
    pin, files = _other(ws, version)
    versions, verdicts = carry(patches, stack(patches, ws.upstream), files.get)
    for patch, verdict in zip(patches, verdicts, strict=True):
        if verdict.failed:
            write(ws.vendor / "rejected" / patch.name, read(ws.patches / patch.name) or b"")
    _rewrite(ws, patches, versions)
    text = (ws.patches / "UPSTREAM").read_text()
    for key in ("version", "sha256"):
        text = re.sub(rf"^({key} *= *)\S+$", rf"\g<1>{getattr(pin, key)}", text, flags=re.MULTILINE)
    write(ws.patches / "UPSTREAM", text.encode())
    report = [*map(str, verdicts), f"patches/UPSTREAM: {pin.name} {version}; run 'apply' for the new tree"]
    if any(verdict.failed for verdict in verdicts):
        report.append("redo failed hunks in that tree and 'refresh --into'; the old patches are in vendor/rejected/")
    return "\n".join(report)


def drop(ws: Workspace, name: str) -> str:
    """Remove one patch from the series and export the later patches again.

    Raises `PatchError` if a later patch needs the removed patch.
    """
    patches = _unedited_series(ws)
    if name not in ws.names():
        raise PatchError(f"--drop {name}: no such patch in patches/series")
    versions, verdicts = carry(patches, stack(patches, ws.upstream), ws.upstream, out={name})
    if failed := [str(verdict) for verdict in verdicts if verdict.failed]:
        raise PatchError(f"{name} is needed by a later patch: {'; '.join(failed)}")
    _rewrite(ws, [patch for patch in patches if patch.name != name], versions)
    return f"{name} is removed; run 'apply'"


def _unedited_series(ws: Workspace) -> list[Patch]:
    fetch(ws)
    if ws.tree.is_dir() and (edits := edits_of(ws, ws.applied())):
        advice = "run 'refresh' or 'apply --discard' first"
        raise PatchError(f"{ws.tree} holds {some(set(edits))} missing from patches/; {advice}")
    return ws.series()


def _rewrite(ws: Workspace, patches: Sequence[Patch], versions: Mapping[str, Sequence[bytes]]) -> None:
    """Write these patches. A patch without hunks is deleted and removed from the series."""
    empty = {p.name for i, p in enumerate(patches) if all(states[i] == states[i + 1] for states in versions.values())}
    steps = {index for index, patch in enumerate(patches) if patch.name in empty}
    slim = {path: [s for i, s in enumerate(states) if i - 1 not in steps] for path, states in versions.items()}
    exported = export_all([patch for patch in patches if patch.name not in empty], slim)
    gone = set(ws.names()) - exported.keys()
    series = (read(ws.patches / "series") or b"").decode().splitlines(keepends=True)
    for name, data in exported.items():
        write(ws.patches / name, data)
    write(ws.patches / "series", "".join(line for line in series if line.strip() not in gone).encode())
    for name in gone:
        (ws.patches / name).unlink()
