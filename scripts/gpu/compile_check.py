#!/usr/bin/env python3
"""Compile the unpatched and the patched CUDA flash attention, and compare registers, spills and code per kernel.

The check needs nvcc 12.8 or newer, but no GPU. If the toolkit has no cuBLAS headers, the headers of the pip package
nvidia-cublas are used. The exit code is 1 if a patched kernel without a block table needs more registers than
upstream's kernel.

    scripts/gpu/compile_check.py --arch 90                   # a sample: vec, mma, tile, fattn.cu, our kernels
    scripts/gpu/compile_check.py --arch 75 --arch 86 --all   # every flash attention file of a default build
    scripts/gpu/compile_check.py --arch 90 --write docs/notes/registers.md
"""

from __future__ import annotations

import argparse
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # scripts/, where this package lies

from gpu.building import in_packages

ROOT = Path(__file__).resolve().parents[2]
TREES = {"unpatched": ROOT / "vendor/llama.cpp", "patched": ROOT / "vendor/llama.cpp-patched"}
CUDA = Path("ggml/src/ggml-cuda")
OURS = "fattn-kv-blocks.cu"
SAMPLE = (
    OURS,
    "fattn.cu",
    "template-instances/fattn-vec-instance-f16-f16.cu",
    "template-instances/fattn-vec-instance-q8_0-q8_0.cu",
    "template-instances/fattn-tile-instance-dkq40-dv40.cu",
    "template-instances/fattn-mma-f16-instance-ncols1_16-ncols2_4.cu",
)
TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16", "f16")
COMPILED_PAIRS = (("q4_0", "q4_0"), ("q8_0", "q8_0"), ("f16", "f16"), ("bf16", "bf16"))  # upstream's default
TABLE_KERNELS = ("flash_attn_ext_vec", "flash_attn_tile", "flash_attn_ext_f16")  # with one more template parameter
TRIVIAL = 1024  # bytes of code; upstream leaves smaller kernels empty


@dataclass(frozen=True)
class Kernel:
    registers: int
    spills: int  # bytes stored
    code: bytes


Results = dict[tuple[str, str, str], dict[str, Kernel]]  # by tree, file and architecture; then by kernel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", default=[], metavar="90", help="compute capability (repeatable)")
    parser.add_argument("--all", action="store_true", help="compile every flash attention file of a default build")
    parser.add_argument("--only", default="", metavar="TEXT", help="compile only files with TEXT in their names")
    parser.add_argument("--jobs", type=int, default=2, help="number of compilers to run in parallel (default: 2)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table to this file")
    args = parser.parse_args()
    if not shutil.which("nvcc"):
        parser.error("nvcc is not on PATH: install the CUDA toolkit, 12.8 or newer")
    if missing := [str(tree) for tree in TREES.values() if not (tree / CUDA).is_dir()]:
        parser.error(f"no {missing[0]}: run scripts/patches.py apply")

    arches = args.arch or ["90"]
    names = [name for name in (default_files() if args.all else SAMPLE) if args.only in name]
    if not names:
        parser.error(f"no file has {args.only!r} in its name")
    there = [(tree, name) for name in names for tree in TREES if (TREES[tree] / CUDA / name).exists()]
    work = [(tree, name, arch) for arch in arches for tree, name in there]
    started = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(work, pool.map(lambda item: compile_one(*item), work), strict=True))
    text, wrong = report(arches, names, results)
    print(text)
    print(f"{len(work)} compilations, {time.monotonic() - started:.0f} s")
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


def default_files() -> list[str]:
    vec = [f"template-instances/fattn-vec-instance-{k}-{v}.cu" for k, v in COMPILED_PAIRS]
    rest = sorted((TREES["patched"] / CUDA / "template-instances").glob("fattn-[tm]*.cu"))
    return [OURS, "fattn.cu", *vec, *(f"template-instances/{path.name}" for path in rest)]


def compile_one(tree: str, name: str, arch: str) -> dict[str, Kernel]:
    """Compile one file for one architecture. Return {demangled name: kernel}."""
    folder = TREES[tree] / CUDA
    pairs = [(k, v) for k in TYPES for v in TYPES]
    command = ["nice", "-n", "19", "nvcc", "-std=c++17", "-O3", "-use_fast_math", "-extended-lambda"]
    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-DGGML_CUDA_USE_GRAPHS"]
    command += ['-DGGML_CUDA_FA_QUANTS="default"']
    command += [f"-DGGML_CUDA_FA_{k.upper()}_{v.upper()}={int((k, v) in COMPILED_PAIRS)}" for k, v in pairs]
    command += [f"-I{TREES[tree] / sub}" for sub in ("ggml/include", "ggml/src", CUDA)]
    # For a toolkit without cuBLAS.
    command += [f"-I{header.parent}" for header in in_packages("include/cublas_v2.h")[:1]]
    with tempfile.TemporaryDirectory() as out:
        command += ["-Xptxas", "-v", "-cubin", "-o", f"{out}/kernels.cubin", str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{tree} {name} does not compile for sm_{arch}:\n{done.stderr[-3000:]}")
        return dict(kernels(done.stdout + done.stderr, Path(out, "kernels.cubin")))


def kernels(log: str, cubin: Path) -> Iterator[tuple[str, Kernel]]:
    code = sections(cubin.read_bytes())
    parts = re.split(r"Compiling entry function '(\w+)'", log)[1:]
    names = parts[::2]
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    for name, demangled, text in zip(names, plain.split("\n"), parts[1::2], strict=False):
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        own = text[text.index(f"Function properties for {name}") :]
        spills = int(re.search(r"(\d+) bytes spill stores", own)[1])
        short = re.sub(r"\(ggml_type\)(\d+)", r"type\1", demangled.removeprefix("void ")).split("(")[0]
        yield short.replace(" ", ""), Kernel(registers, spills, code.get(f".text.{name}", b""))


def sections(elf: bytes) -> dict[str, bytes]:
    """Map the name of each section of a 64-bit little-endian ELF file to the section's content."""
    offset = struct.unpack_from("<Q", elf, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, offset + i * size) for i in range(count)]
    strings = headers[names][4]
    found = {}
    for name, _, _, _, start, length in headers:
        begin = strings + name
        found[elf[begin : elf.index(b"\0", begin)].decode()] = elf[start : start + length]
    return found


def report(arches: list[str], names: list[str], results: Results) -> tuple[str, list[str]]:
    lines = [
        "# Registers of the flash attention kernels",
        "",
        "Written by `scripts/gpu/compile_check.py` from real compilations; nothing here ran on a GPU. Registers",
        "per thread (bytes spilled). *Same code*: without a table the patched kernel is upstream's, byte for byte.",
        "Template arguments as in the sources; type1 is F16, type2 Q4_0, type8 Q8_0, type30 BF16. Kernels that",
        "upstream leaves empty are not listed.",
    ]
    wrong = []
    for arch in arches:
        rows, empty = [], 0
        for name in names:
            before = results.get(("unpatched", name, arch), {})
            after = results[("patched", name, arch)]
            for key, old in sorted(before.items()):
                has_table = key.split("<")[0] in TABLE_KERNELS
                new = after.get(f"{key[:-1]},false>" if has_table else key)
                with_table = after.get(f"{key[:-1]},true>") if has_table else None
                if new is None:
                    wrong.append(f"sm_{arch} {key}: gone")
                    continue
                same = bool(old.code) and old.code == new.code
                if not same and (new.registers > old.registers or new.spills > old.spills):
                    wrong.append(f"sm_{arch} {key}: {show(old)} -> {show(new)} registers without a table")
                if len(old.code) < TRIVIAL:
                    empty += 1
                    continue
                rows.append(f"| `{key}` | {show(old)} | {show(new)} | {'yes' if same else 'no'} | {show(with_table)} |")
            for key in sorted(after.keys() - before.keys()):
                if key.split("<")[0].startswith("fattn_kv"):
                    rows.append(f"| `{re.sub(r',&.*|,[(].*', '>', key)}` | | | | {show(after[key])} |")
        lines += [
            "",
            f"## sm_{arch}",
            "",
            "| kernel | upstream | without a table | same code | with a table |",
            "|---|---|---|---|---|",
            *dict.fromkeys(rows),
        ]
        if not rows:
            wrong.append(f"sm_{arch}: no kernel was compared")
    return "\n".join(lines) + "\n", wrong


def show(kernel: Kernel | None) -> str:
    if kernel is None or len(kernel.code) < TRIVIAL:
        return ""
    return f"{kernel.registers}" + (f" ({kernel.spills})" if kernel.spills else "")


if __name__ == "__main__":
    sys.exit(main())
