"""Builds the patched and the unpatched llama.cpp of an unpacked archive, with or without CUDA.

Needs a C++ compiler, and nvcc for `cuda`; CMake on PATH or as a wheel in the archive; ninja or make. No network.

    build = Build(top=Path("gpu-check"), work=Path("work"), backend="cuda", arch="90"); build.run("patched")
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu.errors import CheckError, OutOfTime
from gpu.packing import BASELINE, PATCHED

_SIDES = {"patched": PATCHED, "baseline": BASELINE}
# Off: not needed here, or they would require more than a compiler.
_OPTIONS = ("GGML_CCACHE=OFF", "GGML_CUDA_NCCL=OFF", "SWAA_EDGE_CPU_VARIANTS=OFF")
# Where a system keeps the driver's library.
_DRIVERS = ("usr/lib/*/libcuda.so*", "usr/lib64/libcuda.so*", "usr/local/nvidia/lib*/libcuda.so*")


@dataclasses.dataclass(frozen=True)
class Build:
    """How both sides are built.

    top: the unpacked archive. work: the folder for builds. arch: like "90"; None: the card's. objects: the folder of
    shared objects; None: one in `work`. native: for this machine's processor, else for any with AVX2.
    """

    top: Path
    work: Path
    backend: str
    arch: str | None = None
    jobs: int = os.cpu_count() or 1
    objects: Path | None = None
    native: bool = True

    def folder(self, side: str) -> Path:
        return self.work / f"build-{side}"

    def run(self, side: str, seconds: float = float("inf")) -> None:
        """Build a side ("patched" or "baseline"), incrementally.

        Raises `CheckError`, or `OutOfTime` after `seconds`; the next call resumes.
        """
        deadline = time.monotonic() + seconds
        folder, tree = self.folder(side), self.top / _SIDES[side]
        environment = tool_environment(self.top, self.work)
        if not (folder / "CMakeCache.txt").exists():
            self._execute(self._configure(folder, tree, environment), environment, folder, "configure", deadline)
        targets = ["swaa-edge-libraries"] + (["test-backend-ops"] if side == "patched" else [])
        command = ["cmake", "--build", str(folder), "--parallel", str(self.jobs), "--target", *targets]
        self._execute(command, environment, folder, "build", deadline)

    def _configure(self, folder: Path, tree: Path, environment: dict[str, str]) -> list[str]:
        objects = self.objects or self.work / "objects"
        words = (sys.executable, Path(__file__).with_name("objects.py"), objects, tree, folder)
        launcher = ";".join(map(str, words))
        options = [*_OPTIONS, f"GGML_NATIVE={'ON' if self.native else 'OFF'}", f"SWAA_EDGE_TREE={tree}"]
        options.append("CMAKE_BUILD_TYPE=Release")
        languages = ["C", "CXX"]
        if self.backend == "cuda":
            languages.append("CUDA")
            # No PTX for later cards in a build that travels: it would be a third of the archive.
            kind = "" if self.native else "-real"
            options += ["GGML_CUDA=ON", f"CMAKE_CUDA_ARCHITECTURES={self.arch or card_arch()}{kind}"]
            options += [*cublas_options(), *driver_options()]
        options += [f"CMAKE_{language}_COMPILER_LAUNCHER={launcher}" for language in languages]
        generator = "Ninja" if shutil.which("ninja", path=environment["PATH"]) else "Unix Makefiles"
        command = ["cmake", "-S", str(self.top), "-B", str(folder), "-G", generator]
        return command + [f"-D{option}" for option in options]

    def _execute(
        self, command: Sequence[str], environment: dict[str, str], folder: Path, what: str, deadline: float
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{what}.log"
        with open(log, "wb") as out:
            try:
                # A process group of its own, so that the compilers stop with the build tool.
                child = subprocess.Popen(
                    command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
            except FileNotFoundError:
                raise CheckError(f"{command[0]} is not installed; install it, or pack with --with-cmake") from None
            try:
                code = child.wait(None if deadline == float("inf") else max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                raise OutOfTime from None
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGTERM)
                    child.wait()
        if code != 0:
            lines = log.read_text(errors="replace").splitlines()
            errors = [line for line in lines if re.search(r"\b[Ee]rror\b", line)] or lines
            raise CheckError(f"{what} of {folder.name} failed, see {log}:\n" + "\n".join(errors[-8:]))

    def library(self, side: str) -> Path:
        """Folder of the libraries of a side."""
        return self.folder(side) / "bin"

    def op_tests(self) -> Path:
        return self.folder("patched") / "bin" / "test-backend-ops"


def card_arch() -> str:
    """Compute capability of the first card, like "90". Raises `CheckError` if nvidia-smi lists none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        output = ""
    found = re.match(r"\s*(\d+)\.(\d+)", output)
    if not found:
        raise CheckError("nvidia-smi lists no card; name the one to build for, like --arch 90")
    return "".join(found.groups())


def card_name() -> str | None:
    """Name, memory and driver of the first card, from nvidia-smi; None without one."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return None
    return output.splitlines()[0] if output else None


@functools.cache
def tool_environment(top: Path, work: Path) -> dict[str, str]:
    """The environment for cmake and ninja: this machine's, else those from the wheels in the archive."""
    environment = dict(os.environ)
    scripts = sysconfig.get_path("scripts")
    environment["PATH"] = os.pathsep.join([environment.get("PATH", os.defpath), scripts])
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=environment["PATH"]):
            continue
        for wheel in sorted((top / "wheels").glob(f"{tool}-*.whl")):
            folder = work / "tools" / tool
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
            for program in folder.rglob(f"bin/{tool}"):
                program.chmod(0o755)
                environment["PATH"] = os.pathsep.join([str(program.parent), environment["PATH"]])
    return environment


def library_paths() -> list[str]:
    """Folders of CUDA's libraries, for LD_LIBRARY_PATH: the toolkit's, and those of pip packages."""
    return [str(path.parent) for name in ("libcudart.so*", "libcublas.so*") for path in _find("lib*", name)]


def cublas_options() -> list[str]:
    """CMake options that locate cuBLAS in a pip package; [] where CMake finds it in the toolkit."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CheckError("nvcc is not on PATH; CUDA's toolkit is needed, or --backend cpu")
    if any((root / "include" / "cublas_v2.h").exists() for root in _toolkits()):
        return []
    headers, libraries = list(_packages("include", "cublas_v2.h")), list(_packages("lib", "libcublas.so.*"))
    light = list(_packages("lib", "libcublasLt.so.*"))
    if not headers or not libraries or not light:
        raise CheckError("cuBLAS is not installed; install it with the toolkit, or the pip package nvidia-cublas")
    flags = f"-I{headers[0].parent}"
    return [
        f"CMAKE_CUDA_FLAGS={flags}",
        f"CMAKE_CXX_FLAGS={flags}",
        f"CUDA_cublas_LIBRARY={libraries[0]}",
        f"CUDA_cublasLt_LIBRARY={light[0]}",
        # The linker of a program also looks for the libraries that ggml-cuda needs.
        f"CMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,{libraries[0].parent}",
    ]


def driver_options() -> list[str]:
    """CMake options that locate the driver's library, which a toolkit may lack; without one, virtual memory is off."""
    stubs = [path for root in _toolkits() for path in root.glob("lib*/stubs/libcuda.so")]
    found = [path for pattern in _DRIVERS for path in sorted(Path("/").glob(pattern))]
    for path in stubs + found:
        return [f"CUDA_cuda_driver_LIBRARY={path}"]
    return ["GGML_CUDA_NO_VMM=ON"]


def _toolkits() -> Iterator[Path]:
    seen = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/usr"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
        dry = subprocess.run(command, capture_output=True, text=True, check=False)
        if top := re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE):
            seen.insert(0, top.group(1).strip())
    for root in dict.fromkeys(filter(None, seen)):
        yield Path(root)
        yield from Path(root).glob("targets/*-linux")


def _find(folder: str, name: str) -> Iterator[Path]:
    for root in _toolkits():
        yield from sorted(root.glob(f"{folder}/{name}"))
    yield from _packages(folder, name)


def _packages(folder: str, name: str) -> Iterator[Path]:
    for entry in dict.fromkeys([*sys.path, sysconfig.get_path("purelib")]):
        if entry:
            yield from sorted(Path(entry).glob(f"nvidia/*/{folder}/{name}"))
