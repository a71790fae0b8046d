"""Runs llama.cpp's converters in a child process, with a few functions replaced.

run(scripts, "convert_hf_to_gguf.py", ["Qwen3-4B", "--outfile", "model.gguf"], name="Qwen3-4B", pre="qwen2")
"""

import runpy
import sys
from pathlib import Path
from typing import Any

from swaa_edge.errors import ConfigError, UnsupportedModelError
from swaa_edge.files.header import Field, Header
from swaa_edge.files.model import swaa_refusal


def run(
    scripts: str,
    program: str,
    arguments: list[str],
    *,
    name: str,
    for_swaa: bool,
    pre: str | None = None,
    n_layers: int | None = None,
    metadata: str | None = None,
) -> None:
    """Run the converter `program` from the folder `scripts` with the command line `arguments`, in this process.

    name: name of the model directory, for error messages.
    for_swaa: refuse a model that SWAA can't be applied to.
    pre: name of the pre-tokenizer, or None if the converter recognises the pre-tokenizer.
    n_layers: layer count to write into an adapter file.
    metadata: path of a metadata override file for an adapter.

    Upstream's adapter converter has no options for `n_layers` and `metadata`.

    Raises `UnsupportedModelError` if SWAA can't be applied to the model. Raises `ConfigError` if `pre` is given but the
    tokenizer uses no pre-tokenizer. Both errors come before any weights are written. Also raises the converter's own
    errors.
    """
    sys.path[:0] = [scripts, str(Path(scripts, "gguf-py"))]
    import conversion
    import gguf

    unused = pre is not None
    write, load = gguf.GGUFWriter.write_header_to_file, gguf.Metadata.load

    def given(model: Any, tokenizer: Any) -> str | None:
        nonlocal unused
        unused = False
        return pre

    def write_if_fit(writer: Any, *positional: Any, **options: Any) -> None:
        if unused:
            raise ConfigError(f"the tokenizer in {name} doesn't use a pre-tokenizer; leave --pre out")
        if n_layers is not None:
            writer.add_block_count(n_layers)
        if for_swaa:
            check_fit(writer, name)
        write(writer, *positional, **options)

    def load_overridden(_: Any, *more: Any) -> Any:
        found = load(Path(metadata), *more)
        # These tags of PEFT's model card contain a path on the training machine.
        found.tags = [tag for tag in found.tags or () if not str(tag).startswith("base_model:")] or None
        return found

    if pre is not None:
        conversion.TextModel.get_vocab_base_pre = given
    if metadata is not None:
        gguf.Metadata.load = staticmethod(load_overridden)
    gguf.GGUFWriter.write_header_to_file = write_if_fit
    sys.argv = [program, *arguments]
    runpy.run_path(str(Path(scripts, program)), run_name="__main__")


def check_fit(writer: Any, name: str) -> None:
    """Raise `UnsupportedModelError` if SWAA can't be applied to the model in `writer`.

    writer: the `gguf.GGUFWriter` that holds the model's keys.
    name: name of the model directory, for the error message.
    """
    fields = {}
    for key, held in writer.kv_data[0].items():
        value = tuple(held.value) if isinstance(held.value, list) else held.value
        fields[key] = Field(key, held.type.name.lower(), 1, value, 0, 0)
    if refusal := swaa_refusal(Header(Path(name), 0, 3, fields, (), 0, 0, 32)):
        raise UnsupportedModelError(refusal)
