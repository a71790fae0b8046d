"""Finds the cross compiler, qemu and CMake on this machine, and chooses qemu's processor for a -march.

found = find(); found.cxx, found.qemu       # MissingTools names the packages
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable

from gpu import building
from gpu.runner import CheckError

#: Instruction sets to check, and qemu's oldest processor for each set. Any other instruction crashes on this processor.
#: `max` is used if qemu has no such processor.
LEVELS = {
    "armv8-a": "cortex-a53",
    "armv8.2-a+fp16+dotprod": "cortex-a76",
    "armv8.6-a+bf16+i8mm": "max",
}
DEFAULT_LEVEL = "armv8.2-a+fp16+dotprod"
_VERSIONS = range(16, 9, -1)


class MissingTools(CheckError):
    """A program that the check needs is not installed."""


@dataclasses.dataclass(frozen=True)
class Tools:
    """Paths of programs."""

    cc: str
    cxx: str
    objdump: str
    qemu: str
    cmake: str
    ninja: str | None


def processor(march: str) -> str:
    """Return the name of the processor that qemu emulates for this value of -march."""
    return LEVELS.get(march, "max")


def compiler(which: Callable[[str], str | None], tool: str) -> str | None:
    """Return the path of the cross compiler `tool` (gcc or g++), or None.

    A name without a version is preferred. Otherwise, the newest version is returned.
    """
    names = [f"aarch64-linux-gnu-{tool}", *(f"aarch64-linux-gnu-{tool}-{version}" for version in _VERSIONS)]
    return next(filter(None, map(which, names)), None)


def find(which: Callable[[str], str | None] | None = None) -> Tools:
    """Find all tools.

    which: function that returns a program's path by name, such as shutil.which.

    Raises `MissingTools` with the packages to install.
    """
    which = which or functools.partial(shutil.which, path=building.search_path())
    cc, cxx, objdump = compiler(which, "gcc"), compiler(which, "g++"), which("aarch64-linux-gnu-objdump")
    qemu = which("qemu-aarch64") or which("qemu-aarch64-static")
    cmake = which("cmake")
    packages = {"g++-aarch64-linux-gnu": cc and cxx and objdump, "qemu-user": qemu, "cmake": cmake}
    if missing := [name for name, there in packages.items() if not there]:
        raise MissingTools(f"install the Debian package{'s' * (len(missing) > 1)} {' and '.join(missing)}")
    return Tools(cc, cxx, objdump, qemu, cmake, which("ninja"))
