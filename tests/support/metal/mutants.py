"""Breaks the kernels and their host code, one line at a time, and checks that a case fails.

Why: a comparison that overlooks a wrong row proves nothing. Each mutation of mutations.txt is made in a copy of the
Metal folder; the changed file is compiled again, and the cases below run until one fails.

    lab = mutants.Lab(ROOT / "vendor" / "llama.cpp-patched", lib_dir, ROOT / "build" / "metal")
    lab.killer(mutation)    # the first failure, or None: the mutant has survived
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

from support.metal import attention, build
from support.metal.attention import Case

MUTATIONS = Path(__file__).resolve().parent / "mutations.txt"
KERNELS = ["f16_dk64_dv64", "vec_f16_dk64_dv64", "pad", "blk", "vec_idx", "vec_reduce", "kv_q8_0_f16"]

_head = {"dk": 64, "dv": 64, "gqa": 1}
_sliding = {"table": True, "window": 300, "sinks": 64, "pad": 1, "kv": 1024, "streams": 2, **_head}
_causal = {"table": True, "past": True, "pad": 1, "kv": 1024, **_head}
CASES = [
    Case(n_q=21, kv=97, **_head),
    Case(type="q8_0", n_q=33, kv=97, **_head),
    *(Case(type=t, n_q=n, **m) for m in (_sliding, _causal) for t, n in (("f16", 1), ("f16", 21), ("q8_0", 33))),
    Case(n_q=1, n_kv_max=384, **_sliding),
]


class Mutation(Protocol):
    """As scripts/mutate.py reads them."""

    name: str
    file: str
    old: str
    new: str


class Lab:
    """A tree of links to another, except for ggml-metal, which is a copy."""

    def __init__(self, tree: Path, lib_dir: Path, cache: Path):
        self.original, self.lib_dir, self.cache = tree, lib_dir, cache
        self.tree = cache / "mutant"
        shutil.rmtree(self.tree, ignore_errors=True)
        (self.tree / "ggml" / "src").mkdir(parents=True)
        (self.tree / "ggml" / "include").symlink_to(tree / "ggml" / "include")
        for path in (tree / "ggml" / "src").iterdir():
            if path.name != build.METAL.name:
                (self.tree / "ggml" / "src" / path.name).symlink_to(path)
        shutil.copytree(tree / build.METAL, self.tree / build.METAL)

    def killer(self, mutation: Mutation | None) -> str | None:
        """The first failure of a mutant, or None; without a mutation, of the unbroken tree."""
        if mutation is None:
            return self._complaint()
        path = self.tree / mutation.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        try:
            return self._complaint()
        finally:
            path.write_text(text, encoding="utf-8")

    def _complaint(self) -> str | None:
        # -O0: compiling takes longer than running
        library = build.build(self.tree, self.lib_dir, self.cache, KERNELS, level="-O0")
        return next(iter(attention.check(library, CASES)), None)
