"""Converts a Hugging Face model directory to GGUF: merge, convert, quantize, write SWAA keys.

This module checks all inputs before the first step. llama.cpp's own programs convert and quantize, in child processes.
The output is written completely or not at all. Intermediate files beside the output take up to twice the size of the
unquantized model.

    convert("Qwen3-4B", "qwen3-q4.gguf", quantize="Q4_K_M", swaa=SwaaConfig.from_recipe("balanced"))
"""

import contextlib
import difflib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from swaa_edge import native
from swaa_edge.config import SwaaConfig
from swaa_edge.convert import child
from swaa_edge.convert import quantize as quantizer
from swaa_edge.convert.annotate import annotate
from swaa_edge.convert.hf_folder import HfFolder, read_hf_folder
from swaa_edge.convert.lora_merge import check_merging, read_adapter
from swaa_edge.convert.upstream import architectures, pre_tokenizers, upstream_scripts
from swaa_edge.errors import ConfigError, ModelFileError, OutputError, SwaaError, UnsupportedModelError
from swaa_edge.support.atomic import atomic_output

__all__ = ["OUTTYPES", "convert", "upstream_scripts"]

#: Bytes per weight of each number format that a conversion can write. "auto" keeps 16-bit numbers unchanged.
OUTTYPES = {"auto": 2.0, "f16": 2.0, "bf16": 2.0, "f32": 4.0, "q8_0": 34 / 32}

_NEEDED_PACKAGES = ("torch", "transformers", "safetensors", "sentencepiece")
#: The end of an error message whose cause is only in the log.
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
    """Convert the Hugging Face model in the folder `source` to the GGUF file `output`. Return the path of the output.

    outtype: one of `OUTTYPES`.
    quantize: one of `quantize.file_types()`.
    lora: folder of a PEFT adapter to merge into the model first.
    pre: name of the pre-tokenizer, for a tokenizer that llama.cpp's converter doesn't recognise.
    swaa: SWAA settings to write. By default, the settings of the adapter's training, if any.
    verbose: show the logs of all steps on stderr.
    on_step: called with a short description when a step starts.

    Raises `ConfigError` if the adapter was trained under other settings. Raises `UnsupportedModelError` if the adapter
    was trained on another model. Other failures raise other `SwaaError`s. On an error, `output` is unchanged.
    """
    steps = on_step or (lambda _: None)
    with atomic_output(output, force=force) as temporary:
        model = read_hf_folder(source)
        scripts = upstream_scripts()
        check_options(model, scripts, outtype, quantize, pre)
        if swaa is not None and model.n_layers is not None:
            swaa.fa_decode_layers(model.n_layers)
        swaa, provenance = (swaa, None) if lora is None else _check_adapter(lora, model.folder, swaa)
        check_packages()
        _check_space(model, Path(output), outtype, copies=2 if lora is not None or swaa is not None else 1)
        with workspace(Path(output)) as work:
            folder, result = model.folder, work / "model.gguf"
            if lora is not None:
                steps("merging the adapter")
                folder = _merged(folder, Path(lora), work, verbose)
            steps("converting")
            arguments = [os.path.abspath(folder), "--outfile", result]
            if provenance is not None:
                (work / "metadata.json").write_text(json.dumps(provenance), encoding="utf-8")
                arguments += ["--metadata", work / "metadata.json"]
            request = {"outtype": outtype, "verbose": verbose, "pre": pre, "for_swaa": swaa is not None}
            run_upstream(str(model.folder), scripts, "convert_hf_to_gguf.py", arguments, name=model.folder, **request)
            if lora is not None:
                shutil.rmtree(folder)
            if quantize is not None:
                steps(f"quantizing to {quantizer.check_type(quantize)}")
                quantizer.quantize(result, work / "quantized.gguf", quantize, verbose=verbose)
                result.unlink()
                result = work / "quantized.gguf"
            if swaa is not None:
                steps("writing SWAA keys")
                annotate(result, in_place=True, config=swaa)
            os.replace(result, temporary)
    return Path(output)


def _check_adapter(
    lora: str | os.PathLike[str], base: Path, swaa: SwaaConfig | None
) -> tuple[SwaaConfig | None, dict[str, Any]]:
    """Check that the adapter was trained on `base`.

    Returns the SWAA settings to write, and the metadata keys that describe the fine-tune.
    """
    adapter = read_adapter(lora)
    check_merging()
    if adapter.training is not None:
        adapter.training.check_base(base, adapter.name)
    return adapter.settings(swaa), adapter.provenance(adapter.label(swaa), base)


def check_options(
    model: HfFolder, scripts: Path, outtype: str, quantize: str | None = None, pre: str | None = None
) -> None:
    """Check the outtype, the quantization type, the pre-tokenizer and the model's architecture.

    Raises `ConfigError`, `UnsupportedModelError` or `NativeLibraryError`.
    """
    if outtype not in OUTTYPES:
        raise ConfigError(f"outtype {outtype!r} must be one of {', '.join(OUTTYPES)}")
    if quantize is not None:
        quantizer.check_type(quantize)
        if outtype == "q8_0":
            raise ConfigError("outtype q8_0 is already a quantization; give only one of outtype and quantize")
        # If the library is missing, fail now instead of after the conversion.
        native.library_dir()
    if pre is not None and pre not in pre_tokenizers(scripts):
        near = difflib.get_close_matches(pre, pre_tokenizers(scripts), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{pre!r} is not a pre-tokenizer; {hint}{_pre_names(scripts)}")
    known = architectures(scripts)
    if not known.intersection(model.architectures):
        name = model.architectures[0]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; the nearest of its {len(known)} are {', '.join(near)}" if near else ""
        raise UnsupportedModelError(f"llama.cpp's converter does not support the architecture {name}{hint}")


def _pre_names(scripts: Path) -> str:
    return f"llama.cpp's names are {', '.join(pre_tokenizers(scripts))}"


def check_packages() -> None:
    """Raise `SwaaError` unless all packages for upstream's converters are installed."""
    missing = [name for name in _NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SwaaError(f"converting needs {', '.join(missing)}; pip install 'swaa-edge[convert]'")


def _check_space(model: HfFolder, output: Path, outtype: str, copies: int) -> None:
    """Raise `OutputError` if the disk lacks space for the output and the intermediate files.

    If the model's size is unknown, nothing is checked.
    """
    needed = int(model.n_weights * OUTTYPES[outtype]) * copies
    free = shutil.disk_usage(output.absolute().parent).free
    if needed > free:
        raise OutputError(
            f"cannot write {output}: the conversion needs {needed / 1e6:,.1f} MB of disk space, "
            f"but only {free / 1e6:,.1f} MB are free; free some space or choose another disk"
        )


@contextlib.contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """Make a folder for intermediate files beside the output, so that the result only has to be renamed."""
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".work", dir=output.absolute().parent) as folder:
        try:
            yield Path(folder)
        except OutputError as error:
            # This error names an intermediate file. The caller turns the cause into an error about the output.
            raise error.__cause__ or error from None


def _merged(base: Path, adapter: Path, work: Path, verbose: bool) -> Path:
    # Upstream names the model after the folder. If `base` is a link, the name of the link may say more.
    folder = work / "merged" / (os.path.basename(os.path.abspath(base)) or "model")
    folder.mkdir(parents=True)
    request = {"base": base, "adapter": adapter, "output": folder}
    try:
        child.run("swaa_edge.convert.lora_merge:merge", request, verbose=verbose)
    except child.ChildError as error:
        raise ModelFileError(f"the adapter {adapter} can't be merged into {base}: {error}; {MORE}") from None
    return folder


def run_upstream(
    what: str, scripts: Path, program: str, arguments: list[Any], *, outtype: str, verbose: bool, **request: Any
) -> None:
    """Run `upstream_run.run` in a child process. Raises `ModelFileError` if the converter fails.

    what: description of the input, for the error message.
    """
    arguments = [*arguments, "--outtype", outtype, *["--verbose"] * verbose]
    request |= {"scripts": scripts, "program": program, "arguments": arguments}
    try:
        child.run("swaa_edge.convert.upstream_run:run", request, verbose=verbose)
    except child.ChildError as error:
        if "BPE pre-tokenizer was not recognized" in str(error):
            raise ModelFileError(
                f"llama.cpp's converter does not recognise the tokenizer in {request['name']}; "
                f"name its pre-tokenizer with --pre NAME: {_pre_names(scripts)}"
            ) from None
        raise ModelFileError(f"{what} can't be converted: {error}; {MORE}") from None
