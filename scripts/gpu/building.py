"""Builds the patched and the unpatched llama.cpp of an unpacked archive, with or without CUDA.

A build needs no network, but these programs:

- a C++ compiler;
- CMake, on PATH or as a wheel in the archive;
- ninja or make;
- nvcc, for the backend `cuda`.

    build = Build(top, work, "cuda", "90", jobs=16, objects=work / "objects"); build.run("patched")
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.packing import BASELINE, PATCHED
from gpu.runner import CheckError, OutOfTime, execute

_SIDES = {"patched": PATCHED, "baseline": BASELINE}
# The disabled options are not needed here, or require more than a compiler.
_OPTIONS = ("CMAKE_BUILD_TYPE=Release", "GGML_CCACHE=OFF", "GGML_CUDA_NCCL=OFF", "SWAA_EDGE_CPU_VARIANTS=OFF")
# Usual places of the driver's library.
_DRIVERS = ("usr/lib/*/libcuda.so*", "usr/lib64/libcuda.so*", "usr/local/nvidia/lib*/libcuda.so*")


@dataclasses.dataclass(frozen=True)
class Build:
    """Settings for building the patched and the unpatched library.

    top: folder of the unpacked archive.
    work: folder for the builds.
    arch: compute capability, such as "90". Only the backend `cuda` uses this value.
    objects: folder for the object files that both builds share.
    native: True builds for this machine's processor, False for any processor with AVX2.
    """

    top: Path
    work: Path
    backend: str
    arch: str | None
    jobs: int
    objects: Path
    native: bool = True

    def library(self, side: str) -> Path:
        """Return the folder of the libraries of `side`, "patched" or "baseline".

        The folder of "patched" also holds test-backend-ops.
        """
        return self.work / f"build-{side}" / "bin"

    def run(self, side: str, seconds: float = float("inf")) -> None:
        """Build what is missing or out of date for the side "patched" or "baseline".

        Raises `CheckError` if the build fails. Raises `OutOfTime` after `seconds`. The next call resumes the build.
        """
        deadline = time.monotonic() + seconds
        folder = self.library(side).parent
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PATH": tool_path(self.top, self.work)}
        commands = {}
        if not (folder / "CMakeCache.txt").exists():
            commands["configure"] = self._configure(folder, self.top / _SIDES[side], environment["PATH"])
        targets = ["swaa-edge-libraries"] + (["test-backend-ops"] if side == "patched" else [])
        commands["build"] = ["cmake", "--build", str(folder), "--parallel", str(self.jobs), "--target", *targets]
        for what, command in commands.items():
            log = folder / f"{what}.log"
            try:
                run_logged(f"{what} of {folder.name}", log, command, deadline - time.monotonic(), env=environment)
            except FileNotFoundError:
                raise CheckError("cmake is not installed; install it, or pack with --with-cmake") from None

    def _configure(self, folder: Path, tree: Path, path: str) -> list[str]:
        launcher = f"{sys.executable};{Path(__file__).with_name('objects.py')};{self.objects};{tree};{folder}"
        options = [*_OPTIONS, f"GGML_NATIVE={'ON' if self.native else 'OFF'}", f"SWAA_EDGE_TREE={tree}"]
        languages = ["C", "CXX"]
        if self.backend == "cuda":
            languages.append("CUDA")
            # A packed build has no PTX for later GPUs. PTX would be a third of the archive.
            kind = "" if self.native else "-real"
            options += ["GGML_CUDA=ON", f"CMAKE_CUDA_ARCHITECTURES={self.arch}{kind}"]
            options += [*cublas_options(), *driver_options()]
        options += [f"CMAKE_{language}_COMPILER_LAUNCHER={launcher}" for language in languages]
        generator = "Ninja" if shutil.which("ninja", path=path) else "Unix Makefiles"
        command = ["cmake", "-S", str(self.top), "-B", str(folder), "-G", generator]
        return command + [f"-D{option}" for option in options]


def run_logged(what: str, log: Path, command: Sequence[str], seconds: float = float("inf"), **options: Any) -> None:
    """Run a build step and write the output to `log`.

    Raises `CheckError` with the first errors if the step fails, and `OutOfTime` after `seconds`.
    """
    with open(log, "w") as out:
        code, _, _ = execute(command, seconds, stdout=out, stderr=subprocess.STDOUT, **options)
    if code is None:
        raise OutOfTime
    if code != 0:
        lines = log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if re.search(r"\b[Ee]rror\b", line)] or lines[-3:]
        raise CheckError(f"{what} failed, see {log}: {' | '.join(errors[:3])}")


def card_arch() -> str:
    """Compute capability of the first GPU, such as "90". Raises `CheckError` if nvidia-smi lists no GPU."""
    found = re.match(r"(\d+)\.(\d+)", _card("compute_cap") or "")
    if not found:
        raise CheckError("nvidia-smi lists no GPU; give the compute capability of the GPU, like --arch 90")
    return "".join(found.groups())


def card_name() -> str | None:
    """Name, memory and driver of the first GPU, or None if there is no GPU."""
    return _card("name,memory.total,driver_version")


def _card(facts: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={facts}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 and done.stdout.strip() else None


def search_path() -> str:
    """Return PATH and the folder of this Python's programs. A virtual environment may have cmake there."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


@functools.cache
def tool_path(top: Path, work: Path) -> str:
    """Return a PATH with cmake and ninja. The archive's wheels supply programs that this machine lacks."""
    path = search_path()
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=path):
            continue
        for wheel in sorted((top / "wheels").glob(f"{tool}-*.whl")):
            folder = work / "tools" / tool
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
            for program in folder.rglob(f"bin/{tool}"):
                program.chmod(0o755)
                path = os.pathsep.join([str(program.parent), path])
    return path


def library_paths() -> list[str]:
    """Folders of CUDA's libraries for LD_LIBRARY_PATH, from the toolkit and from pip packages."""
    found = [
        path
        for name in ("libcudart.so*", "libcublas.so*")
        for path in [*_in_toolkits(f"lib*/{name}"), *in_packages(f"lib*/{name}")]
    ]
    return [str(path.parent) for path in found]


def cublas_options() -> list[str]:
    """Return the CMake options that locate cuBLAS in a pip package, or [] if the toolkit has cuBLAS."""
    if shutil.which("nvcc") is None:
        raise CheckError("nvcc is not on PATH; install CUDA's toolkit, or use --backend cpu")
    if _in_toolkits("include/cublas_v2.h"):
        return []
    patterns = ("include/cublas_v2.h", "lib/libcublas.so.*", "lib/libcublasLt.so.*")
    header, library, light = (next(iter(in_packages(pattern)), None) for pattern in patterns)
    if not (header and library and light):
        raise CheckError("cuBLAS is not installed; install it with the toolkit, or the pip package nvidia-cublas")
    return [
        f"CMAKE_CUDA_FLAGS=-I{header.parent}",
        f"CMAKE_CXX_FLAGS=-I{header.parent}",
        f"CUDA_cublas_LIBRARY={library}",
        f"CUDA_cublasLt_LIBRARY={light}",
        # When a program is linked, the linker also searches for the libraries of ggml-cuda.
        f"CMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,{library.parent}",
    ]


def driver_options() -> list[str]:
    """Return the CMake option that locates the CUDA driver's library.

    If the library is missing, the option turns off CUDA's virtual memory instead.
    """
    installed = (path for pattern in _DRIVERS for path in sorted(Path("/").glob(pattern)))
    for path in [*_in_toolkits("lib*/stubs/libcuda.so"), *installed]:
        return [f"CUDA_cuda_driver_LIBRARY={path}"]
    return ["GGML_CUDA_NO_VMM=ON"]


def _in_toolkits(pattern: str) -> list[Path]:
    """Find `pattern` in nvcc's CUDA toolkit, and then in toolkits at the usual places."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/usr"]
    if nvcc := shutil.which("nvcc"):
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
        dry = subprocess.run(command, capture_output=True, text=True, check=False)
        if top := re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE):
            roots.insert(0, top.group(1).strip())
    places = [place for root in filter(None, roots) for place in (Path(root), *Path(root).glob("targets/*-linux"))]
    return [path for place in dict.fromkeys(places) for path in sorted(place.glob(pattern))]


def in_packages(pattern: str) -> list[Path]:
    """Find `pattern` in NVIDIA's pip packages."""
    entries = dict.fromkeys([*filter(None, sys.path), sysconfig.get_path("purelib")])
    return [path for entry in entries for path in sorted(Path(entry).glob(f"nvidia/*/{pattern}"))]
