"""Makes a GGUF from a Hugging Face checkpoint: merge, convert, quantize, write SWAA keys.

Converting and quantizing are llama.cpp's, in child processes; this puts them in order, finds what is wrong
before they start, and leaves either the whole result or nothing.

    convert("Qwen3-4B", "qwen3-q4.gguf", quantize="Q4_K_M", swaa=SwaaConfig.from_recipe("balanced"))
"""

import contextlib
import difflib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from swaa_edge import native
from swaa_edge.config import SwaaConfig
from swaa_edge.convert import child
from swaa_edge.convert import quantize as quantizer
from swaa_edge.convert.annotate import annotate
from swaa_edge.convert.hf_folder import Checkpoint, read_checkpoint
from swaa_edge.convert.lora_merge import check_merging, read_adapter
from swaa_edge.convert.upstream import architectures, pre_tokenizers, upstream_scripts
from swaa_edge.errors import ConfigError, ModelFileError, OutputError, SwaaError, UnsupportedModelError
from swaa_edge.support.atomic import atomic_output

__all__ = ["OUTTYPES", "convert", "upstream_scripts"]

#: The number formats a conversion writes, and their bytes per weight; "auto" keeps 16-bit numbers as they are.
OUTTYPES = {"auto": 2.0, "f16": 2.0, "bf16": 2.0, "f32": 4.0, "q8_0": 34 / 32}

_NEEDED_PACKAGES = ("torch", "transformers", "safetensors", "sentencepiece")
#: The end of an error whose cause only a log tells.
MORE = "--verbose shows the log"


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    outtype: str = "auto",
    quantize: str | None = None,
    lora: str | os.PathLike[str] | None = None,
    pre: str | None = None,
    swaa: SwaaConfig | None = None,
    force: bool = False,
    verbose: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> Path:
    """Write the Hugging Face checkpoint in the folder `source` as one GGUF file to `output`; return that path.

    outtype: one of `OUTTYPES`. quantize: one of `quantize.file_types()`, made from the 16- or 32-bit file.
    lora: folder of a PEFT adapter to merge first. pre: the tokenizer's pre-tokenizer, for one that
    llama.cpp's converter doesn't recognise. swaa: the settings to write; None makes a plain GGUF, but with an
    adapter that says what it was trained under it means that. verbose: show the logs of all steps on stderr.
    on_step: called with a few words as each step starts.

    Intermediate files lie beside `output` while this runs, up to twice the size of the unquantized model.
    Raises a `SwaaError` whose line says what is wrong; `output` is then as it was before. That is a `ConfigError` if
    the adapter was trained under other settings, `UnsupportedModelError` if on another model.
    """
    steps = on_step or (lambda _: None)
    with atomic_output(output, force=force) as temporary:
        checkpoint = read_checkpoint(source)
        scripts = upstream_scripts()
        check_options(checkpoint, scripts, outtype, quantize, pre)
        if swaa is not None and checkpoint.n_layers is not None:
            swaa.fa_decode_layers(checkpoint.n_layers)
        provenance = None
        if lora is not None:
            adapter = read_adapter(lora)
            check_merging()
            adapter.check_base(checkpoint.folder)
            provenance = adapter.provenance(adapter.label(swaa), checkpoint.folder)
            swaa = adapter.recipe(swaa)
        check_packages()
        _check_space(checkpoint, Path(output), outtype, copies=2 if lora is not None or swaa is not None else 1)
        with workspace(Path(output)) as work:
            folder = checkpoint.folder
            if lora is not None:
                steps("merging the adapter")
                folder = _merged(folder, Path(lora), work, verbose)
            steps("converting")
            model = work / "model.gguf"
            _run_converter(checkpoint, folder, model, scripts, outtype, pre, swaa is not None, provenance, verbose)
            if lora is not None:
                shutil.rmtree(folder)
            if quantize is not None:
                steps(f"quantizing to {quantizer.check_type(quantize)}")
                quantizer.quantize(model, work / "quantized.gguf", quantize, verbose=verbose)
                model.unlink()
                model = work / "quantized.gguf"
            if swaa is not None:
                steps("writing SWAA keys")
                annotate(model, in_place=True, config=swaa)
            os.replace(model, temporary)
    return Path(output)


def check_options(
    checkpoint: Checkpoint, scripts: Path, outtype: str, quantize: str | None = None, pre: str | None = None
) -> None:
    """Refuse an outtype, quantization type, pre-tokenizer or architecture that isn't there, before any work.

    Raises `ConfigError`, `UnsupportedModelError`.
    """
    if outtype not in OUTTYPES:
        raise ConfigError(f"outtype {outtype!r} must be one of {', '.join(OUTTYPES)}")
    if quantize is not None:
        quantizer.check_type(quantize)
        if outtype == "q8_0":
            raise ConfigError("a q8_0 file is quantized already; leave outtype out, or quantize out")
        # Better said now than after the conversion.
        native.library_dir()
    if pre is not None and pre not in pre_tokenizers(scripts):
        near = difflib.get_close_matches(pre, pre_tokenizers(scripts), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{pre!r} is no pre-tokenizer; {hint}{_pre_names(scripts)}")
    known = architectures(scripts)
    if not known.intersection(checkpoint.architectures):
        name = checkpoint.architectures[0]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; the nearest of its {len(known)} are {', '.join(near)}" if near else ""
        raise UnsupportedModelError(f"llama.cpp's converter does not know the architecture {name}{hint}")


def _pre_names(scripts: Path) -> str:
    return f"llama.cpp's names are {', '.join(pre_tokenizers(scripts))}"


def check_packages() -> None:
    """Raise `SwaaError` if a package that upstream's converters need is not installed."""
    missing = [name for name in _NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SwaaError(f"converting needs {', '.join(missing)}; pip install 'swaa-edge[convert]'")


def _check_space(checkpoint: Checkpoint, output: Path, outtype: str, copies: int) -> None:
    """Find a disk that can't hold the model before the minutes it takes to fill it; unknown sizes pass."""
    needed = int(checkpoint.n_weights * OUTTYPES[outtype]) * copies
    free = shutil.disk_usage(output.absolute().parent).free
    if needed > free:
        raise OutputError(
            f"cannot write {output}: {_megabytes(needed)} are needed meanwhile, {_megabytes(free)} are free; "
            "free some space or choose another disk"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """A folder for intermediate files, on the disk of the output, so that the last of them only needs a new name."""
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".work", dir=output.absolute().parent) as folder:
        try:
            yield Path(folder)
        except OutputError as error:
            # It names an intermediate file; its cause, the full disk, is worded anew for the output.
            raise error.__cause__ or error from None


def _name(folder: str | os.PathLike[str]) -> str:
    """The last part of the path as it was given, which for a link says more than what it points to."""
    return os.path.basename(os.path.abspath(folder))


def _merged(base: Path, adapter: Path, work: Path, verbose: bool) -> Path:
    # The folder's name becomes the model's name in the file.
    folder = work / "merged" / (_name(base) or "model")
    folder.mkdir(parents=True)
    request = {"base": base, "adapter": adapter, "output": folder}
    try:
        child.run("swaa_edge.convert.lora_merge:merge", request, verbose=verbose)
    except child.ChildError as error:
        raise ModelFileError(f"the adapter {adapter} can't be merged into {base}: {error}; {MORE}") from None
    return folder


def _run_converter(
    checkpoint: Checkpoint,
    folder: Path,
    target: Path,
    scripts: Path,
    outtype: str,
    pre: str | None,
    for_swaa: bool,
    provenance: Mapping[str, Any] | None,
    verbose: bool,
) -> None:
    arguments = [os.path.abspath(folder), "--outfile", str(target), "--outtype", outtype]
    if provenance is not None:
        metadata = target.with_suffix(".json")
        metadata.write_text(json.dumps(provenance), encoding="utf-8")
        arguments += ["--metadata", str(metadata)]
    request = {
        "scripts": scripts,
        "program": "convert_hf_to_gguf.py",
        "arguments": arguments + ["--verbose"] * verbose,
        "pre": pre,
        "name": checkpoint.folder,
        "for_swaa": for_swaa,
    }
    try:
        child.run("swaa_edge.convert.upstream_run:run", request, verbose=verbose)
    except child.ChildError as error:
        if "BPE pre-tokenizer was not recognized" in str(error):
            raise ModelFileError(
                f"llama.cpp's converter does not recognise the tokenizer in {checkpoint.folder}; "
                f"name its pre-tokenizer with --pre NAME: {_pre_names(scripts)}"
            ) from None
        raise ModelFileError(f"{checkpoint.folder} can't be converted: {error}; {MORE}") from None
