"""The converters of llama.cpp as a child process runs them: unchanged, with a few answers given in advance.

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
    """Run `program` of the folder `scripts` in this process, with its command line `arguments`.

    name: the checkpoint's name in errors. for_swaa: refuse a model that SWAA can't be applied to. pre: the name to
    take for the tokenizer's pre-tokenizer, instead of looking its fingerprint up. For an adapter, whose converter has
    no ways for them, n_layers: the model's layers, to be written too; metadata: a metadata override file.

    What is wrong with the model is said as soon as its metadata is known, before its weights are written.
    Raises `UnsupportedModelError`, `ConfigError` if the tokenizer has no use for `pre`, and whatever
    the converter raises.
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
            raise ConfigError(f"the tokenizer in {name} is of a kind that has no pre-tokenizer; leave --pre out")
        if n_layers is not None:
            writer.add_block_count(n_layers)
        if for_swaa:
            check_fit(writer, name)
        write(writer, *positional, **options)

    def load_overridden(_: Any, *more: Any) -> Any:
        found = load(Path(metadata), *more)
        # PEFT's model card repeats there where the base model lay when the adapter was trained.
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
    """Refuse a model that SWAA can't be applied to, by the keys that a `gguf.GGUFWriter` holds for it.

    name: the checkpoint's, for the error. Raises `UnsupportedModelError`.
    """
    fields = {}
    for key, held in writer.kv_data[0].items():
        value = tuple(held.value) if isinstance(held.value, list) else held.value
        fields[key] = Field(key, held.type.name.lower(), 1, value, 0, 0)
    if refusal := swaa_refusal(Header(Path(name), 0, 3, fields, (), 0, 0, 32)):
        raise UnsupportedModelError(refusal)
