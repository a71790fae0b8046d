"""Downloads the sdist of the pinned upstream, checks the hash and unpacks the source tree.

Only this module uses the network. The module needs only Python and pip. CMake runs the module in build isolation.
There, `python -m pip` is often missing or uses the wrong environment, so several pips are tried.

    pin = read_pin(Path("patches/UPSTREAM")); files = read_tree(get_sdist(pin, Path("vendor")), pin)
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from patches_lib.patchfile import PatchError

# Two thirds of the sdist, not needed for a build: test vocabularies, manuals, pictures, upstream's housekeeping.
SKIP = (".git", ".git/*", ".github/*", ".devops/*", ".gemini/*", ".pi/*", "benches/*", "docs/*", "media/*", "skills/*")
SKIP += ("models/*.gguf", "models/*.gguf.*")


@dataclass(frozen=True)
class Pin:
    name: str
    version: str
    sha256: str  # of the sdist; "" accepts any hash, to inspect another release
    tree: str  # folder inside the sdist

    @property
    def sdist(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"


def read_pin(path: Path) -> Pin:
    """Read the `key = value` lines of patches/UPSTREAM."""
    try:
        pairs = dict(re.findall(r"^(\w+) *= *(\S+)$", path.read_text(), re.MULTILINE))
        return Pin(**pairs)
    except (OSError, TypeError) as error:
        raise PatchError(f"{path}: needs the lines name, version, sha256 and tree ({error})") from None


def get_sdist(pin: Pin, cache: Path) -> Path:
    """Return the path of the sdist in the cache folder. A missing sdist is downloaded."""
    return get_file(pin, cache / pin.sdist, "sdist, about 75 MB", "patches/UPSTREAM")


def get_file(pin: Pin, path: Path, what: str, pinned_in: str) -> Path:
    """Return `path`, an sdist or wheel, after checking the hash. A missing file is downloaded."""
    if path.exists():
        _check_hash(path, pin, "delete it to download it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {pin.name} {pin.version} ({what})", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        _pip_download(pin, Path(folder), "--only-binary" if path.suffix == ".whl" else "--no-binary")
        found = list(Path(folder).glob(f"*{path.suffix}"))
        if len(found) != 1:
            raise PatchError(f"pip did not download exactly one {path.suffix} file of {pin.name} {pin.version}")
        _check_hash(found[0], pin, f"the package index serves a file that differs from the one pinned in {pinned_in}")
        os.replace(found[0], path)
    return path


def _check_hash(path: Path, pin: Pin, hint: str) -> None:
    got = sha256_of(path)
    if pin.sha256 and got != pin.sha256:
        raise PatchError(f"{path}: sha256 is {got}, expected {pin.sha256}; {hint}")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _pip_download(pin: Pin, folder: Path, kind: str) -> None:
    # With a requirements file, pip checks the hash before running the sdist's build backend.
    requirement = f"{pin.name}=={pin.version}" + (f" --hash=sha256:{pin.sha256}" if pin.sha256 else "")
    (folder / "requirements.txt").write_text(requirement + "\n")
    args = ["download", "--no-deps", kind, pin.name, "--disable-pip-version-check", "--no-input"]
    args += ["--progress-bar", "off", "--dest", str(folder), "-r", str(folder / "requirements.txt")]
    # The isolation variables of an outer pip would hide the inner pip.
    hide = ("PYTHONPATH", "PYTHONNOUSERSITE", "_PYPROJECT_HOOKS_", "PEP517_", "PIP_BUILD_TRACKER", "PIP_REQ_TRACKER")
    hide += ("PIP_REQUIRE_VIRTUALENV", "PIP_CONSTRAINT")
    env = {key: value for key, value in os.environ.items() if not key.startswith(hide)}
    done = subprocess.run([*_find_pip(env), *args], env=env, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1]).removeprefix("ERROR: ")
        reason = reason.replace("(from versions: none)", "(no network?)").partition(" (from versions:")[0]
        if "hash" in done.stderr.lower() and (got := re.search(r"Got\s+(\w{64})", done.stderr)):
            reason = f"sha256 is {got.group(1)}, expected {pin.sha256}"
        raise PatchError(f"pip could not download {pin.name} {pin.version}: {reason}")


def _find_pip(env: dict[str, str]) -> list[str]:
    """Return the first pip that runs.

    Tries this interpreter's pip, the base interpreter's pip, the pip on PATH and the pip bundled with Python.
    """
    pythons = [sys.executable, getattr(sys, "_base_executable", None), shutil.which("python3"), shutil.which("python")]
    candidates = [[python, "-m", "pip"] for python in pythons if python]
    candidates += [[pip] for pip in (shutil.which("pip"), shutil.which("pip3")) if pip]
    try:
        import ensurepip

        wheels = [*Path(ensurepip.__path__[0], "_bundled").glob("pip-*.whl")]
        wheels += Path("/usr/share/python-wheels").glob("pip-*.whl")
        candidates += [[sys.executable, f"{wheel}/pip"] for wheel in wheels]
    except ImportError:
        pass
    for command in candidates:
        if subprocess.run([*command, "--version"], env=env, capture_output=True).returncode == 0:
            return command
    raise PatchError("no pip found (tried this Python, PATH and ensurepip); install pip or set SWAA_EDGE_CACHE")


def read_tree(sdist: Path, pin: Pin) -> dict[str, tuple[bytes, bool]]:
    """Return {path: (content, is executable)} of the sdist's files, except those in SKIP. About 60 MB."""
    files = {}
    prefix = PurePosixPath(pin.sdist.removesuffix(".tar.gz"), pin.tree)
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if not path.is_relative_to(prefix) or path == prefix:
                    continue
                name = str(path.relative_to(prefix))
                if ".." in path.parts or not (member.isreg() or member.isdir()):
                    raise PatchError(f"{sdist}: member {member.name} is not a plain file inside the tree")
                if member.isreg() and not any(fnmatch(name, pattern) for pattern in SKIP):
                    files[name] = (archive.extractfile(member).read(), bool(member.mode & 0o100))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PatchError(f"{sdist} is not a readable sdist ({error})") from None
    if not files:
        raise PatchError(f"{sdist} holds no files under {prefix}")
    return files


def unpack(files: dict[str, tuple[bytes, bool]], target: Path) -> None:
    """Write the files to the folder `target`. The folder appears only when all files are written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        for name, (data, executable) in files.items():
            path = scratch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o755 if executable else 0o644)
        scratch.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
