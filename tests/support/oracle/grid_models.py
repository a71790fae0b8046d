"""The tiny models of the grid, and their GGUF files.

Starting upstream's converter takes seconds, so one child process makes all files with its classes, without a tokenizer.

Use: `zoo = Zoo(folder); zoo.prepare([("qwen3", 4)]); zoo.model("qwen3", 4); zoo.gguf("qwen3", 4)`
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from support import module_environment
from support.models import save_model, tiny_model
from support.oracle.grid import MOE, VOCAB


@functools.cache
def grid_model(arch: str, layers: int):
    """The transformers model of one pool entry, fp32, in evaluation mode; always the same weights."""
    if arch not in MOE:
        return tiny_model(arch, seed=layers, layers=layers)
    # Calm attention, a sharp router, and so many experts that the last has little weight: then noise that flips two
    # experts changes little.
    experts = {"num_experts": 8} if arch == "qwen3moe" else {"num_local_experts": 8, "intermediate_size": 128}
    model = tiny_model(arch, seed=layers, layers=layers, peak=1.0, num_experts_per_tok=4, **experts)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight.mul_(4.0)
    return model


class Zoo:
    """The pool's models and files, made on first use."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def model(self, arch: str, layers: int):
        return grid_model(arch, layers)

    def gguf(self, arch: str, layers: int) -> Path:
        """The file of one model, float32."""
        self.prepare([(arch, layers)])
        return self._path(arch, layers)

    def prepare(self, entries: Iterable[tuple[str, int]]) -> None:
        """Make the missing files of `entries` (architecture, layers) in one go."""
        missing = sorted({entry for entry in entries if not self._path(*entry).exists()})
        if missing:
            words = [f"{arch}/{layers}" for arch, layers in missing]
            done = subprocess.run(
                [sys.executable, "-m", "support.oracle.grid_models", str(self.folder), *words],
                env=module_environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise RuntimeError(f"the models of the grid could not be converted:\n{done.stderr[-3000:]}")

    def _path(self, arch: str, layers: int) -> Path:
        return self.folder / f"{arch}-{layers}.gguf"


def convert(arch: str, layers: int, target: Path) -> None:
    """Write one pool model as a GGUF file without a vocabulary. Only for the child process: it changes sys.path."""
    from swaa_edge.convert.upstream import upstream_scripts

    sys.path[:0] = [str(upstream_scripts()), str(upstream_scripts() / "gguf-py")]
    import conversion
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        save_model(grid_model(arch, layers), None, folder)
        hparams = conversion.ModelBase.load_hparams(Path(folder), False)
        upstream = conversion.get_model_class(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))

        def no_vocabulary(self) -> None:
            self._set_vocab_none()
            self.gguf_writer.add_vocab_size(VOCAB)

        members = {"set_vocab": no_vocabulary, "model_arch": upstream.model_arch}
        writer = type("WithoutVocabulary", (upstream,), members)(
            Path(folder), gguf.LlamaFileType.ALL_F32, target.with_suffix(".part")
        )
        writer.write()
    target.with_suffix(".part").rename(target)


if __name__ == "__main__":
    for word in sys.argv[2:]:
        name, depth = word.split("/")
        convert(name, int(depth), Path(sys.argv[1]) / f"{name}-{depth}.gguf")
