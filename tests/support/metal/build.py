"""Compiles llama.cpp's Metal flash attention, kernels and host code, into a library that runs without a Mac.

Why: Metal is C++ with a few extensions (function constants, attributes of parameters, instantiations with a host_name);
this rewrites the extensions line by line and leaves the code of the kernels alone. Only the instances in KERNELS are
compiled, since each takes seconds.

    library = build.build(ROOT / "vendor" / "llama.cpp-patched", lib_dir, ROOT / "build" / "metal")
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
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


#: A compiler command without its -o, and the files that its object depends on, the source last.
Job = tuple[list[str], list[Path]]


class MissingCompiler(RuntimeError):
    """No suitable clang; the message names the versions and how to install one."""


def compiler() -> str:
    """Path of a clang++ that supports _Float16; the environment variable METAL_CXX takes precedence."""
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
    """The argument that emulator.h passes for each parameter of a kernel: a buffer number or a name like TG_MEMORY."""
    found, buffers = [], 0
    for part in signature.split(","):
        if attribute := re.search(r"\[\[(.*?)\]\]", part):
            found.append("emu::" + ATTRIBUTES[attribute[1]])
        else:
            found.append(str(buffers))
            buffers += 1
    return found


def translate(source: str, wanted: Iterable[str] = ()) -> str:
    """Translate a .metal source to C++ for include/metal_stdlib; registers the instances in `wanted` by name."""
    # kernels of another op in the same file
    source = re.split(
        r"^template<\s*(?:typename|short)[^{}]*?^kernel void kernel_lightning_indexer\(", source, flags=re.M
    )[0]
    source = FUNCTION_CONSTANT.sub(r"static const emu::function_constant<\1, (\3)> \2;", source)
    source = re.sub(r"^constant ", "static const ", source, flags=re.M)
    # threadgroup memory declared in a kernel can be static: threadgroups run one after another
    source = re.sub(r"^( +)threadgroup (\w+)(\s+\w+\[)", r"\1static \2\3", source, flags=re.M)
    source = source.replace('_Pragma("clang loop unroll(full)")', "")
    source = re.sub(r"^\s*#pragma unroll.*$", "", source, flags=re.M)
    # without a mask its sizes are 0: a GPU gets some remainder and reads nothing there, a CPU traps
    source = re.sub(r"%args\.(ne3[123])", r"%emu::divisor(args.\1)", source)
    wanted = set(wanted)
    # of upstream's two simdgroup counts, the larger is for heads of 512 and more, which are not in KERNELS
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
        # the typedef must precede the template parameters of the kernel
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
    """Write the translated kernels below `folder`; returns those to compile."""
    target = folder / "kernels"
    target.mkdir(parents=True, exist_ok=True)
    units, left = [], set(kernels)
    for path in sorted((tree / METAL / "kernels").iterdir()):
        if not (path.name in ("common.h", "dequantize.h") or path.name.startswith("fa_")):
            continue
        text = path.read_text(encoding="utf-8")
        for place in IN_STEP.get(path.name, []):
            if text.count(place) != 1:
                raise ValueError(f"{path.name} has changed; check again where lanes must move in step: {place.strip()}")
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
        raise ValueError(f"no upstream source has the kernels {sorted(left)}")
    return units


def build(
    tree: Path, lib_dir: Path, cache: Path, kernels: Sequence[str] = KERNELS, level: str = "-O1", jobs: int = 2
) -> Path:
    """Build the library of the kernels and host code of `tree`, or return it from the cache if nothing changed.

    lib_dir: has libggml-base, which the host code calls. Raises MissingCompiler, or RuntimeError with clang's errors.
    """
    cxx = compiler()
    sources = cache / "sources" / hashlib.sha256(str(tree).encode()).hexdigest()[:16]
    shutil.rmtree(sources, ignore_errors=True)
    units = write_sources(tree, sources, kernels)

    work = [*_kernel_jobs(cxx, tree, sources / "kernels", units, level), *_host_jobs(cxx, tree)]
    work.sort(key=lambda job: -job[1][-1].stat().st_size)  # the longest first
    with ThreadPoolExecutor(jobs) as pool:
        objects = sorted(pool.map(lambda job: _compile(*job, cache / "objects"), work))
    library = cache / f"{hashlib.sha256(repr((objects, str(lib_dir))).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        # functions that only other ops call stay undefined
        _run(
            [cxx, "-shared", *map(str, objects), f"-L{lib_dir}", "-lggml-base", f"-Wl,-rpath,{lib_dir}", "-Wl,-z,lazy"],
            library,
        )
    return library


def _kernel_jobs(cxx: str, tree: Path, folder: Path, units: Sequence[Path], level: str) -> Iterator[Job]:
    arch = ["-mavx2", "-mfma", "-mf16c"] if os.uname().machine == "x86_64" else []
    metal_flags = ["-DGGML_METAL_HAS_BF16", "-D__METAL_VERSION__=310", "-include", "metal_stdlib", "-x", "c++"]
    folders = [f"-I{HERE / 'include'}", f"-I{folder}", f"-I{tree / METAL}"]
    flags = [*_common_flags(tree), level, *arch, "-fno-math-errno", "-fno-unroll-loops", *folders, *metal_flags]
    inputs = [*_shared_headers(tree), HERE / "include" / "metal_stdlib"]
    inputs += [folder / name for name in ("common.h", "dequantize.h")]
    for unit in units:
        common = folder / ("fa_vec_common.metal" if "vec" in unit.stem else "fa_common.metal")
        yield [cxx, *flags, "-c", str(unit)], [*inputs, common, unit]


def _host_jobs(cxx: str, tree: Path) -> Iterator[Job]:
    metal = tree / METAL
    flags = [*_common_flags(tree), "-O0", "-include", "memory", f"-I{metal}"]  # on a Mac other headers include memory
    headers = [*sorted(metal.glob("*.h")), metal / "ggml-metal.cpp", *sorted((tree / "ggml" / "include").glob("*.h"))]
    sources = [metal / f"ggml-metal-{name}.cpp" for name in ("ops", "device", "common", "tuning")]
    for path in [HERE / "emulator.cpp", HERE / "host.cpp", *sources]:
        yield [cxx, *flags, "-c", str(path)], [*_shared_headers(tree), *headers, path]


def _common_flags(tree: Path) -> list[str]:
    folders = [tree / "ggml" / "include", tree / "ggml" / "src", HERE]
    return ["-std=c++17", "-fPIC", "-w", "-fvisibility=hidden", *(f"-I{folder}" for folder in folders)]


def _shared_headers(tree: Path) -> list[Path]:
    return [HERE / "emulator.h", tree / METAL / "ggml-metal-impl.h", tree / "ggml" / "src" / "ggml-common.h"]


def _compile(command: list[str], inputs: Sequence[Path], objects: Path) -> Path:
    """Compile a job, or return its object from `objects` if it was made from the same bytes before."""
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
