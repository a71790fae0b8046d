"""Translates the patched CUDA sources to plain C++ for the emulator (emulator.h), changing only syntax.

Inline PTX becomes a call of emu::ptx, a kernel launch one of emu::launch, dynamic shared memory a pointer.

    translate.translate(Path("vendor/llama.cpp-patched/ggml/src/ggml-cuda"), Path("out"))
"""

import re
import shutil
from pathlib import Path

SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
LAUNCH = re.compile(r"(\w+)<<<(.*?)>>>\((.*?)\);", re.S)
ASM = re.compile(r"\basm( volatile)?\s*\(\s*\"")


def translate(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    for path in [*source.glob("*.cuh"), source / "fattn-kv-blocks.cu"]:
        text = _asm(path.read_text())
        text = SHARED.sub(r"\1 * \2 = (\1 *) emu::dynamic_shared();", text)
        text = LAUNCH.sub(r"emu::launch(\1, \2, \3);", text)
        if path.name == "common.cuh":
            # launches run one after another, so there is nothing to wait for
            text = text.replace("#    define GGML_CUDA_USE_PDL", "")
        (target / path.name).write_text(text)
    (target / "vendors").mkdir(exist_ok=True)
    (target / "vendors/cuda.h").write_text('#include "emulator.h"\n')
    for name in ("emulator.h", "emulator.cpp", "run_fattn.cpp"):
        shutil.copy(here / name, target / name)


def _asm(text: str) -> str:
    """asm("op" : "=r"(a), "+r"(b) : "r"(c)) as emu::ptx("op", {&(a), &(b)}, {emu::in(c)})."""
    parts, begin = [], 0
    while found := ASM.search(text, begin):
        end, depth, quoted = found.end() - 1, 1, False
        fields = [""]
        while depth:
            char = text[end]
            if char == '"' and text[end - 1] != "\\":
                quoted = not quoted
            if not quoted:
                depth += (char == "(") - (char == ")")
            if depth:
                if char == ":" and not quoted:
                    fields.append("")
                else:
                    fields[-1] += char
            end += 1
        out, read = ([_operand(item) for item in _split(field)] for field in [*fields, "", ""][1:3])
        outs = ", ".join(f"(void *) &({name})" for name in out)
        reads = ", ".join(f"emu::in({name})" for name in read)
        parts += [text[begin : found.start()], f"emu::ptx({fields[0].strip()}, {{{outs}}}, {{{reads}}})"]
        begin = end
    return "".join([*parts, text[begin:]])


def _split(field: str) -> list[str]:
    items, depth = [""], 0
    for char in field:
        depth += (char in "([") - (char in ")]")
        if char == "," and not depth:
            items.append("")
        else:
            items[-1] += char
    return [item.strip() for item in items if item.strip()]


def _operand(item: str) -> str:
    return re.fullmatch(r'"[^"]*"\s*\((.*)\)', item, re.S)[1]
