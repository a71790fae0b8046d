"""Compiles llama.cpp's Metal flash attention, kernels and host code, into a library that runs without a Mac.

Why: the kernels are Metal, which is C++ but for a few things; this rewrites those (function constants, attributes of
parameters, instantiations with a host_name) line by line and leaves the code of the kernels alone. Only the instances
in KERNELS are compiled, since each takes seconds.

    library = build.build(ROOT / "vendor" / "llama.cpp-patched", lib_dir, ROOT / "build" / "metal")
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPILERS = [*(f"clang++-{version}" for version in range(16, 23)), "clang++"]
METAL = Path("ggml", "src", "ggml-metal")

# Instances, by host_name without "kernel_flash_attn_ext_". One of each K/V type that upstream has, in both kernels;
# head sizes that take each branch of the code: 128 and 64, which 64 divides, 80 and 96 (16, not 64), 72 (neither).
TYPES = ["f16", "f32", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
KERNELS = [
    *(f"{t}_dk128_dv128" for t in TYPES),
    *(f"vec_{t}_dk128_dv128" for t in TYPES),
    "f16_dk64_dv64",
    "f16_dk80_dv80",
    "f16_dk72_dv72",
    "f16_dk96_dv96",
    "q8_0_dk96_dv96",
    "f16_dk192_dv128",
    "vec_f16_dk64_dv64",
    "vec_q8_0_dk64_dv64",
    "vec_f16_dk64_dv64_q2_ne4",
    "vec_f16_dk64_dv64_q4_ne2",
    "vec_q8_0_dk64_dv64_q2_ne4",
    "pad",
    "blk",
    "vec_idx",
    "vec_reduce",
    *(f"kv_{t}_f16" for t in TYPES if t.startswith("q")),
]

# What an attribute of a kernel's parameter stands for in emulator.h.
ATTRIBUTES = {
    "threadgroup(0)": "TG_MEMORY",
    "threadgroup_position_in_grid": "TG_POSITION",
    "thread_position_in_grid": "THREAD_IN_GRID",
    "thread_index_in_threadgroup": "THREAD_INDEX",
    "thread_index_in_simdgroup": "LANE",
    "simdgroup_index_in_threadgroup": "SIMDGROUP",
    "threads_per_threadgroup": "THREADS",
}

# Places where upstream's vector kernel lets a lane overwrite shared memory that the others have just read, with no
# barrier between: the lanes of a GPU move in step, those of the emulator one after another. One goes before each.
IN_STEP = {
    "fa_vec_common.metal": [
        "            // load the sparse KV indices for the current block into shared memory\n",
        "        // these are needed for reducing the results from the simdgroups (reuse the ss buffer)\n",
        "                if (tiisg == 0) {\n                    ss[2*qq + 0] = Sx;\n",
    ]
}

FUNCTION_CONSTANT = re.compile(r"^constant\s+(\w+)\s+(\w+)\s*\[\[function_constant\((.*?)\)\]\];", re.M)
INSTANCE = re.compile(r'^template \[\[host_name\("kernel_(\w+?)"\s*\)\]\]\s*kernel \w+ (\w+)(<.*>);$', re.M)
KERNEL = re.compile(r"^kernel void (\w+)\((.*?)\) \{$", re.M | re.S)


class MissingCompiler(RuntimeError):
    """No clang: the message says which would do and how to get it."""


def compiler() -> str:
    """Path of a clang++ that knows _Float16 and the rest; the environment variable METAL_CXX goes first."""
    for name in [os.environ.get("METAL_CXX", ""), *COMPILERS]:
        path = shutil.which(name) if name else None
        if path and int(_output([path, "-dumpversion"]).split(".")[0] or 0) >= 16:
            return path
    raise MissingCompiler(
        "the Metal emulator needs clang 16 or newer (_Float16): apt-get install clang-16, or set METAL_CXX to a clang++"
    )


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def parameters(signature: str) -> list[str]:
    """What emulator.h has to pass for each parameter of a kernel: numbers of buffers, names of TG_MEMORY's kind."""
    found, buffers = [], 0
    for part in signature.split(","):
        if attribute := re.search(r"\[\[(.*?)\]\]", part):
            found.append("emu::" + ATTRIBUTES[attribute[1]])
        else:
            found.append(str(buffers))
            buffers += 1
    return found


def translate(source: str, wanted: Iterable[str] = ()) -> str:
    """A .metal source as C++ for include/metal_stdlib, with the instances in `wanted` registered by their names."""
    # kernels of another op that lie in the same file
    source = re.split(
        r"^template<\s*(?:typename|short)[^{}]*?^kernel void kernel_lightning_indexer\(", source, flags=re.M
    )[0]
    source = FUNCTION_CONSTANT.sub(r"static const emu::function_constant<\1, (\3)> \2;", source)
    source = re.sub(r"^constant ", "static const ", source, flags=re.M)
    # memory of a threadgroup, declared in a kernel: threadgroups run one after another, so static is the same
    source = re.sub(r"^( +)threadgroup (\w+)(\s+\w+\[)", r"\1static \2\3", source, flags=re.M)
    source = source.replace('_Pragma("clang loop unroll(full)")', "")
    source = re.sub(r"^\s*#pragma unroll.*$", "", source, flags=re.M)
    # without a mask its sizes are 0: a GPU gets some remainder and reads nothing there, a CPU stops
    source = re.sub(r"%args\.(ne3[123])", r"%emu::divisor(args.\1)", source)
    wanted = set(wanted)
    # of the two numbers of simdgroups that upstream compiles the larger is for heads of 512 and more, not in KERNELS
    source = re.sub(r"^ +case 8: kernel_flash_attn_ext_impl.*$", "", source, flags=re.M)

    def instance(match: re.Match[str]) -> str:
        name = match[1].removeprefix("flash_attn_ext_")
        if name not in wanted:
            return ""
        entry = f"emu::entry<{match[2]}{match[3]}, params_{match[2]}>"
        return f'static emu::add_kernel add_{name}("kernel_{match[1]}", {entry});'

    source = INSTANCE.sub(instance, source)

    out, end, registered = [], 0, []
    for match in KERNEL.finditer(source):
        name = match[1]
        before = source[end : match.start()]
        # a template's parameters stand before its kernel, and the typedef has to go in front of them
        starts = [m.start() for m in re.finditer(r"^template ?<", before, re.M)]
        own = starts and not re.search(r"[;}]", re.sub(r"//.*", "", before[starts[-1] :]))
        start = starts[-1] if own else len(before)
        signature = re.sub(r"\s*\[\[.*?\]\]", "", match[2])
        typedef = f"typedef emu::params<{', '.join(parameters(match[2]))}> params_{name};\n"
        out += [before[:start], typedef, before[start:], f"static void {name}({signature}) {{"]
        if name.removeprefix("kernel_flash_attn_ext_") in wanted:
            registered.append(f'static emu::add_kernel add_{name}("{name}", emu::entry<{name}, params_{name}>);\n')
        end = match.end()
    return "".join([*out, source[end:], *registered])


def write_sources(tree: Path, folder: Path, kernels: Sequence[str]) -> list[Path]:
    """The translated kernels below `folder`; returns those to compile."""
    target = folder / "kernels"
    target.mkdir(parents=True, exist_ok=True)
    units, left = [], set(kernels)
    for path in sorted((tree / METAL / "kernels").iterdir()):
        if not (path.name in ("common.h", "dequantize.h") or path.name.startswith("fa_")):
            continue
        text = path.read_text(encoding="utf-8")
        for place in IN_STEP.get(path.name, []):
            if text.count(place) != 1:
                raise ValueError(f"{path.name} has changed; look again where lanes must move in step: {place.strip()}")
            text = text.replace(place, "emu::simdgroup_barrier();\n" + place)
        named = {
            m.removeprefix("flash_attn_ext_")
            for m in re.findall(r'"kernel_(\w+?)"|^kernel void kernel_(\w+)\(', text, re.M)
            for m in m
            if m
        }
        mine = sorted(left & named)
        (target / path.name).write_text(translate(text, mine), encoding="utf-8")
        if mine and path.suffix == ".metal":
            units.append(target / path.name)
            left -= set(mine)
    if left:
        raise ValueError(f"no source of upstream's has the kernels {sorted(left)}")
    return units


def build(
    tree: Path, lib_dir: Path, cache: Path, kernels: Sequence[str] = KERNELS, level: str = "-O1", jobs: int = 2
) -> Path:
    """The library for the kernels and host code of `tree`, from the cache if nothing has changed since.

    `lib_dir` has libggml-base, which the host code calls. Raises MissingCompiler, or RuntimeError with clang's words.
    """
    cxx = compiler()
    ggml, metal = tree / "ggml", tree / METAL
    sources = cache / "sources" / hashlib.sha256(str(tree).encode()).hexdigest()[:16]
    shutil.rmtree(sources, ignore_errors=True)
    units = write_sources(tree, sources, kernels)

    common = [
        "-std=c++17",
        "-fPIC",
        "-w",
        "-fvisibility=hidden",
        f"-I{ggml / 'include'}",
        f"-I{ggml / 'src'}",
        f"-I{HERE}",
    ]
    arch = ["-mavx2", "-mfma", "-mf16c"] if os.uname().machine == "x86_64" else []
    metal_flags = ["-DGGML_METAL_HAS_BF16", "-D__METAL_VERSION__=310", "-include", "metal_stdlib", "-x", "c++"]
    folders = [f"-I{HERE / 'include'}", f"-I{sources / 'kernels'}", f"-I{metal}"]
    kernel_flags = [*common, level, *arch, "-fno-math-errno", "-fno-unroll-loops", *folders, *metal_flags]
    # -include memory: on a Mac other headers bring it
    host_flags = [*common, "-O0", "-include", "memory", f"-I{metal}"]

    shared = [HERE / "emulator.h", metal / "ggml-metal-impl.h", ggml / "src" / "ggml-common.h"]
    kernel_inputs = [
        *shared,
        HERE / "include" / "metal_stdlib",
        *(sources / "kernels" / n for n in ("common.h", "dequantize.h")),
    ]
    host_inputs = [
        *shared,
        *sorted(metal.glob("*.h")),
        metal / "ggml-metal.cpp",
        *sorted((ggml / "include").glob("*.h")),
    ]
    host = [
        HERE / "emulator.cpp",
        HERE / "host.cpp",
        *(metal / f"ggml-metal-{n}.cpp" for n in ("ops", "device", "common", "tuning")),
    ]

    work = []
    for unit in units:
        inputs = [
            *kernel_inputs,
            sources / "kernels" / ("fa_vec_common.metal" if "vec" in unit.stem else "fa_common.metal"),
            unit,
        ]
        work.append(([cxx, *kernel_flags, "-c", str(unit)], inputs))
    work += [([cxx, *host_flags, "-c", str(path)], [*host_inputs, path]) for path in host]
    work.sort(key=lambda job: -job[1][-1].stat().st_size)  # the longest first
    with ThreadPoolExecutor(jobs) as pool:
        objects = sorted(pool.map(lambda job: _compile(*job, cache / "objects"), work))
    library = cache / f"{hashlib.sha256(repr((objects, str(lib_dir))).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        # what only other ops call stays undefined
        _run(
            [cxx, "-shared", *map(str, objects), f"-L{lib_dir}", "-lggml-base", f"-Wl,-rpath,{lib_dir}", "-Wl,-z,lazy"],
            library,
        )
    return library


def _compile(command: list[str], inputs: Sequence[Path], objects: Path) -> Path:
    """The object file of a command without its -o, from `objects` if it was made from the same bytes before."""
    digest = hashlib.sha256(repr(command).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    target = objects / f"{inputs[-1].stem}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        _run(command, target)
    return target


def _run(command: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.tmp")
    done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
    part.rename(target)
