"""The CUDA flash attention kernels, executed on the host (tests/support/cuda/emulator.h), against plain loops.

Every kernel runs with a block table and without one: without, it is upstream's and validates the emulator.
Needs the CUDA headers (a toolkit's, or those of the test extra) and the library's libggml-base.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT
from support.cuda.translate import translate

pytestmark = pytest.mark.native

TREE = ROOT / "vendor/llama.cpp-patched"
LIBRARIES = ROOT / "build/editable/bin"
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16")
# kernel, compute capability: 610 has no tensor cores, 750 no asynchronous copies
RUNS = {"vec": ("VEC", 890), "tile": ("TILE", 610), "mma": ("MMA", 890), "mma-turing": ("MMA", 750)}


def headers():
    """Folders of the CUDA headers, or nothing."""
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        toolkits.append(str(Path(nvcc).resolve().parent.parent))
    folders = [Path(toolkit) / "include" for toolkit in toolkits if toolkit]
    for entry in sys.path:
        folders += sorted(Path(entry).glob("nvidia/*/include"))
        folders += sorted(Path(entry).glob("nvidia/*/include/cccl"))
    found = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    return found if any((folder / "cuda_fp16.h").exists() for folder in found) else []


def build(name, mutate=None):
    """Compile one run; a finished one with the same sources is used again."""
    kernel, arch = RUNS[name]
    folder = ROOT / "build/cuda-emulator" / (name if mutate is None else f"{name}-mutant")
    translate(TREE / "ggml/src/ggml-cuda", folder)
    if mutate is not None:
        old, new = mutate
        path = folder / "fattn-kv-blocks.cuh"
        text = path.read_text()
        assert text.count(old) == 1, f"{path.name} no longer holds: {old}"
        path.write_text(text.replace(old, new))
    program, stamp = folder / "run", folder / "stamp"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.c*")) + sorted(folder.glob("*.h")):
        digest.update(path.read_bytes())
    if not (program.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest()):
        pairs = [f"-DGGML_CUDA_FA_{k}_{v}=0" for k in TYPES for v in TYPES]
        include = [folder, TREE / "ggml/include", TREE / "ggml/src", *headers()]
        command = [
            *("g++", "-std=c++17", "-O1", "-w", "-fpermissive", f"-DEMU_ARCH={arch}", f"-DRUN_{kernel}", *pairs),
            *(f"-I{path}" for path in include),
            *(str(folder / "run_fattn.cpp"), str(folder / "emulator.cpp"), "-o", str(program)),
            *(f"-L{LIBRARIES}", f"-Wl,-rpath,{LIBRARIES}", "-lggml-base"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        stamp.write_text(digest.hexdigest())
    return program


@pytest.fixture(scope="module", autouse=True)
def needed():
    if not headers():
        pytest.skip("no CUDA headers; pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl")
    if not (LIBRARIES / "libggml-base.so").exists():
        pytest.skip("the library is not built; run `make setup`")
    if not shutil.which("g++"):
        pytest.skip("the emulator is compiled with g++")


@pytest.mark.parametrize("name", RUNS)
def test_attention(name):
    done = subprocess.run([build(name)], capture_output=True, text=True, timeout=1200, check=False)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if not line.startswith("OK ")]
    assert done.returncode == 0 and not wrong, "\n".join([*wrong, done.stderr[-2000:]])
    assert sum(" table 1 " in line for line in lines) >= 15
    assert sum(" table 0 " in line for line in lines) >= 2


@pytest.mark.parametrize(
    "mutate",
    [
        # V's rows where K's are: differs only where one of the two is converted
        ("entry.row_V + inside", "entry.row_K + inside"),
        # no table
        ("const int row = columns.list[block]*FATTN_KV_BLOCK + inside;", "const int row = k;"),
    ],
)
def test_a_mistake_is_found(mutate):
    done = subprocess.run([build("vec", mutate)], capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 1 and "FAIL" in done.stdout
