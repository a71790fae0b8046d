"""Quantizes a GGUF file with llama.cpp's own quantizer.

The quantizer is a function of the llama.cpp library. A child process calls the function, since the library may abort
the process. All metadata are kept, including the SWAA keys.

    quantize("model-f16.gguf", "model-q4.gguf", "Q4_K_M")
"""

import difflib
import errno
import functools
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from swaa_edge.convert import child
from swaa_edge.errors import ConfigError, ModelFileError, NativeLibraryError
from swaa_edge.files.header import read_header
from swaa_edge.files.model import read_shards
from swaa_edge.support.atomic import atomic_output

# Types for which llama.cpp requires an importance matrix.
_NEED_IMATRIX = frozenset(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"])
# llama.cpp lists this type, but can only read such files.
_NOT_MADE = frozenset(["NVFP4"])
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR


@functools.cache
def file_types() -> dict[str, int]:
    """Return llama.cpp's quantization types, as a dict from name (such as "Q4_K_M") to number.

    The types are read from the source text of `llama_cpp`. Importing `llama_cpp` would load a native library.

    Raises `NativeLibraryError` if `llama_cpp` is not installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise NativeLibraryError("llama-cpp-python is not installed; reinstall swaa-edge")
    source = Path(spec.submodule_search_locations[0], "llama_cpp.py").read_text(encoding="utf-8")
    return {
        name: int(number)
        for name, number in re.findall(r"^LLAMA_FTYPE_(?:ALL|MOSTLY)_(\w+) = (\d+)$", source, re.MULTILINE)
        if name not in _NOT_MADE
    }


def check_type(name: str) -> str:
    """Return `name` in llama.cpp's spelling. Raises `ConfigError` for an unknown or unsupported type."""
    spelled = name.upper()
    if spelled in _NEED_IMATRIX:
        raise ConfigError(
            f"{spelled} needs an importance matrix, which is not supported here; use Q3_K_S or a larger type"
        )
    usable = [known for known in file_types() if known not in _NEED_IMATRIX]
    if spelled not in usable:
        near = difflib.get_close_matches(spelled, usable, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{name!r} is not a quantization type; {hint}the types are {', '.join(usable)}")
    return spelled


def quantize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    file_type: str,
    *,
    threads: int = 0,
    force: bool = False,
    verbose: bool = False,
) -> Path:
    """Quantize the GGUF file `source` and write the result to `output`. Return the path of the output.

    source: the model file, or the first file of a split model. A split model becomes one file.
    file_type: a type such as "Q4_K_M", in upper or lower case. If a tensor's row length doesn't fit the type,
        llama.cpp chooses another type for the tensor.
    threads: number of threads; 0 uses all cores.

    Raises `ModelFileError` if `source` is damaged or already quantized. Raises `ConfigError` if the type is unknown or
    unsupported. Raises `OutputError` if `output` exists (without `force`) or can't be written. Raises
    `NativeLibraryError` if the library is missing.
    """
    file_type = check_type(file_type)
    header = read_header(source)
    read_shards(header)
    request = {"source": os.fspath(source), "number": file_types()[file_type], "threads": threads}
    with atomic_output(output, force=force) as temporary:
        try:
            child.run("swaa_edge.convert.quantize:quantize_here", {**request, "output": temporary}, verbose=verbose)
        except child.ChildError as error:
            raise _explained(str(error), header.path, file_type) from None
    return Path(output)


def _explained(reason: str, source: Path, file_type: str) -> Exception:
    if found := re.search(r"requantizing from type (\S+) is disabled", reason):
        return ModelFileError(f"{source} is already quantized ({found[1]}); quantize an f32, f16 or bf16 file instead")
    if "imatrix" in reason:
        return ConfigError(f"{file_type} needs an importance matrix for this model; choose a larger type")
    return ModelFileError(f"{source} can't be quantized to {file_type}: {reason}; --verbose shows llama.cpp's log")


def quantize_here(source: str, output: str, number: int, threads: int) -> None:
    """Quantize in this process, with progress on a terminal. Raises the error that llama.cpp logs."""
    from tqdm import tqdm

    from swaa_edge import native

    llama_cpp = native.load()
    verbose = "SWAA_EDGE_VERBOSE" in os.environ
    bar = tqdm(desc="Quantizing", unit=" tensors", disable=verbose or not sys.stderr.isatty())
    logged: list[str] = []

    def listen(level: int, text: bytes, _data: Any) -> None:
        line = text.decode("utf-8", "replace")
        if verbose:
            sys.stderr.write(line)
        if level == _ERROR_LEVEL and line.strip(" =\n"):
            logged.append(line.strip())
        # Each tensor's line begins with "[   3/ 291] blk.0.attn_q.weight - [ ...".
        if found := re.match(r"\[ *(\d+)/ *(\d+)\]", line):
            bar.total = int(found[2])
            bar.update(int(found[1]) - bar.n)

    callback = llama_cpp.llama_log_callback(listen)
    llama_cpp.llama_log_set(callback, None)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = number, threads
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), parameters)
    bar.close()
    if code == 0:
        return
    reason = logged[-1].split("failed to quantize: ")[-1] if logged else f"llama_model_quantize returned {code}"
    # C++ streams don't keep errno. A failed write means a full disk or a size limit.
    if "basic_ios::clear" in reason or "iostream error" in reason:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise RuntimeError(reason)
