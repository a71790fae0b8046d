"""Parses, applies, exports and merges patches, on bytes in memory.

A patch consists of a header with the reason, and a plain unified diff.

Patches are applied in Python. A hunk that does not fit at its line is an error. `git apply` and `patch` would accept
such hunks at other lines. `git apply` also silently skips files if the tree is in a subfolder of another repository.

Exporting and merging use `git diff --no-index` and `git merge-file`, isolated from the user's configuration. Only
`refresh` and `check` need git.

    patch = parse("0001-x.patch", data); new = apply_hunks(old, patch.files["src/a.c"], "src/a.c")
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

CONTEXT = 1  # context lines around a hunk; one is enough, since a hunk must fit exactly at its line
HEADER = ("Subject", "Why", "Goes away when")
NAME = re.compile(r"\d{4}-[a-z0-9][a-z0-9-]*\.patch")
HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(?: .*)?\n")
NO_NEWLINE = b"\\ No newline at end of file\n"


class PatchError(Exception):
    """An error in the patch series. The message says what is wrong and what would be right."""


@dataclass(frozen=True)
class Hunk:
    start: int  # 0-based index of the first old line
    new_start: int  # the same in the result
    old: tuple[bytes, ...]  # lines with their newline
    new: tuple[bytes, ...]


@dataclass(frozen=True)
class Patch:
    name: str
    header: bytes  # with the blank line that ends it
    files: dict[str, tuple[Hunk, ...]]


def make_header(subject: str, why: str, goes_away_when: str) -> bytes:
    """Make the header of a new patch. Long fields continue on indented lines."""
    wrap = textwrap.TextWrapper(110, subsequent_indent="  ", break_on_hyphens=False)
    fields = zip(HEADER, (subject, why, goes_away_when), strict=True)
    header = "".join(wrap.fill(f"{key}: {value}") + "\n" for key, value in fields).encode() + b"\n"
    check_header("--new", header)
    return header


def check_header(name: str, header: bytes) -> None:
    """Check that the header has the fields Subject, Why and Goes away when, in this order.

    No field may be empty, and a blank line must end the header.
    """
    text = header.decode("utf-8", "replace")
    fields = re.findall(r"^([A-Z][A-Za-z ]*):((?:.*)(?:\n[ \t]+\S.*)*)\n", text, re.MULTILINE)
    if [key for key, _ in fields] != list(HEADER):
        raise PatchError(f"{name}: the header needs the fields {', '.join(key + ':' for key in HEADER)} in this order")
    for key, value in fields:
        if not value.strip():
            raise PatchError(f"{name}: header field '{key}:' is empty; write a sentence")
    if text != "".join(f"{key}:{value}\n" for key, value in fields) + "\n":
        raise PatchError(f"{name}: header lines are 'Key: text' or indented, and one blank line ends the header")


def parse(name: str, data: bytes) -> Patch:
    """Parse a patch. Any line outside the header and well-formed hunks is an error."""
    begin = 0 if data.startswith(b"diff --git ") else data.find(b"\ndiff --git ") + 1 or len(data)
    check_header(name, data[:begin])
    if begin == len(data):
        raise PatchError(f"{name}: has no 'diff --git' line")
    return Patch(name, data[:begin], parse_diff(name, data[begin:], data.count(b"\n", 0, begin)))


def parse_diff(name: str, data: bytes, offset: int = 0) -> dict[str, tuple[Hunk, ...]]:
    """Parse the part after the header.

    offset: number of lines in the header, for the line numbers in error messages.
    """
    lines, at = split_lines(data), 0
    files: dict[str, tuple[Hunk, ...]] = {}
    while at < len(lines):
        match = re.fullmatch(rb"diff --git a/(\S+) b/\1\n", lines[at])
        path = match.group(1) if match else b""
        if not match or lines[at + 1 : at + 3] != [b"--- a/" + path + b"\n", b"+++ b/" + path + b"\n"]:
            raise PatchError(f"{name}: line {offset + at + 1}: expected 'diff --git', '---' and '+++' of the same file")
        key = path.decode()
        if key in files or ".." in key.split("/"):
            raise PatchError(f"{name}: line {offset + at + 1}: {key} occurs twice or is outside the tree")
        at += 3
        hunks = []
        while at < len(lines) and (head := HUNK.fullmatch(lines[at])):
            hunk, used = _parse_hunk(head, lines, at + 1, f"{name}: line {offset + at + 1}")
            hunks.append(hunk)
            at += used + 1
        if not hunks:
            raise PatchError(f"{name}: line {offset + at + 1}: expected a hunk '@@ -n,n +n,n @@' of {key}")
        files[key] = tuple(hunks)
    return files


def _parse_hunk(head: re.Match[bytes], lines: list[bytes], at: int, where: str) -> tuple[Hunk, int]:
    start, old_count, new_start, new_count = (int(part) if part else 1 for part in head.groups())
    old: list[bytes] = []
    new: list[bytes] = []
    used, last = 0, []
    while at + used < len(lines):
        line = lines[at + used]
        if line == NO_NEWLINE and last:
            for side in last:
                side[-1] = side[-1][:-1]
        elif len(old) == old_count and len(new) == new_count:
            break
        elif line[:1] in (b" ", b"-", b"+"):
            last = {b" ": [old, new], b"-": [old], b"+": [new]}[line[:1]]
            for side in last:
                side.append(line[1:])
        else:
            break
        used += 1
    if (len(old), len(new)) != (old_count, new_count):
        stated = f"the hunk header gives {old_count},{new_count} lines"
        raise PatchError(f"{where}: {stated}, but the hunk has {len(old)},{len(new)}")
    # if a count is 0, the header gives the line before the hunk
    return Hunk(start - (old_count > 0), new_start - (new_count > 0), tuple(old), tuple(new)), used


def apply_hunks(data: bytes, hunks: tuple[Hunk, ...], where: str) -> bytes:
    """Apply hunks without fuzz or offset. Raises `PatchError` if a hunk does not fit."""
    lines, out, at = split_lines(data), [], 0
    for number, hunk in enumerate(hunks, 1):
        out += lines[at : hunk.start]
        at = hunk.start + len(hunk.old)
        if tuple(lines[hunk.start : at]) != hunk.old or len(out) != hunk.new_start:
            raise PatchError(f"{where}: hunk {number} does not fit exactly at line {hunk.start + 1}")
        out += hunk.new
    return b"".join(out + lines[at:])


def apply_some(data: bytes, hunks: Iterable[Hunk], where: str) -> bytes:
    """Apply only these hunks of a diff. The line numbers in the new file are adjusted."""
    shifted, shift = [], 0
    for hunk in hunks:
        shifted.append(replace(hunk, new_start=hunk.start + shift))
        shift += len(hunk.new) - len(hunk.old)
    return apply_hunks(data, tuple(shifted), where)


def split_lines(data: bytes) -> list[bytes]:
    """Split into lines with newlines. bytes.splitlines would also split at a lone carriage return."""
    return re.findall(rb"[^\n]*\n|[^\n]+", data)


def export(header: bytes, files: dict[str, tuple[bytes, bytes]]) -> bytes:
    """Make a patch, sorted by path, without hashes and dates.

    files: {path: (old content, new content)}.
    """
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for path, (old, new) in sorted(files.items()):
            if old != new:
                parts.append(_diff(Path(folder), path, old, new, CONTEXT))
    return header + b"".join(parts)


def _diff(folder: Path, path: str, old: bytes, new: bytes, context: int) -> bytes:
    (folder / "old").write_bytes(old)
    (folder / "new").write_bytes(new)
    flags = ["--no-index", "--text", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--no-prefix"]
    flags += [f"-U{context}", "--inter-hunk-context=0", "--diff-algorithm=histogram", "--indent-heuristic"]
    done = git(folder, "diff", *flags, "old", "new")
    body = done.stdout[done.stdout.find(b"\n@@ ") + 1 :]
    if done.returncode != 1 or not body.startswith(b"@@ "):
        raise PatchError(f"git diff failed on {path}: {done.stderr.decode(errors='replace').strip() or 'no hunks'}")
    name = path.encode()
    return b"diff --git a/%s b/%s\n--- a/%s\n+++ b/%s\n" % (name, name, name, name) + body


def diff_hunks(old: bytes, new: bytes, path: str, context: int = CONTEXT) -> tuple[Hunk, ...]:
    """Return the hunks from `old` to `new`, as in `export`."""
    with tempfile.TemporaryDirectory() as folder:
        body = _diff(Path(folder), path, old, new, context) if old != new else b""
    return parse_diff("diff", body).get(path, ())


def merge(ours: bytes, base: bytes, theirs: bytes) -> bytes | None:
    """Apply to `ours` the change that leads from `base` to `theirs`.

    Returns None if `ours` and `theirs` both changed the same or adjacent lines of `base`.
    """
    if theirs == base or ours == base:
        return ours if theirs == base else theirs
    with tempfile.TemporaryDirectory() as folder:
        for name, data in (("ours", ours), ("base", base), ("theirs", theirs)):
            (Path(folder) / name).write_bytes(data)
        done = git(Path(folder), "merge-file", "-p", "-q", "ours", "base", "theirs")
        if done.returncode < 0 or done.returncode > 127:
            raise PatchError(f"git merge-file failed: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout if done.returncode == 0 else None


def git(folder: Path, *args: str) -> subprocess.CompletedProcess[bytes]:
    """Run git in a scratch folder, isolated from the user's configuration and other repositories."""
    if not shutil.which("git"):
        raise PatchError("git is not on PATH; install git")
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1", "LC_ALL": "C"}
    env |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return subprocess.run(["git", *args], cwd=folder, env=env, capture_output=True)
