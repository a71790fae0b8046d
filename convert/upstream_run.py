"""The converter of llama.cpp as a child process runs it: unchanged, with two answers given in advance.

run(scripts, ["Qwen3-4B", "--outfile", "model.gguf"], pre="qwen2", for_swaa="Qwen3-4B")
"""

import runpy
import sys
from pathlib import Path
from typing import Any

from swaa_edge.errors import ConfigError, UnsupportedModelError
from swaa_edge.header import Field, Header
from swaa_edge.modelfile import swaa_refusal


def run(scripts: str, arguments: list[str], pre: str | None, name: str, for_swaa: bool) -> None:
    """Run `convert_hf_to_gguf.py` of the folder `scripts` in this process, with its command line `arguments`.

    pre: the name to take for the tokenizer's pre-tokenizer, instead of looking its fingerprint up.
    name: the checkpoint's name in errors. for_swaa: refuse a model that SWAA can't be applied to.

    What is wrong with the model is said as soon as its metadata is known, before its weights are written.
    Raises `UnsupportedModelError`, `ConfigError` if the tokenizer has no use for `pre`, and whatever
    the converter raises.
    """
    sys.path[:0] = [scripts, str(Path(scripts, "gguf-py"))]
    import conversion
    import gguf

    unused = pre is not None
    write = gguf.GGUFWriter.write_tensors_to_file

    def given(model: Any, tokenizer: Any) -> str | None:
        nonlocal unused
        unused = False
        return pre

    def write_if_fit(writer: Any, **options: Any) -> None:
        if unused:
            raise ConfigError(f"the tokenizer in {name} is of a kind that has no pre-tokenizer; leave --pre out")
        if for_swaa:
            check_fit(writer, name)
        write(writer, **options)

    if pre is not None:
        conversion.TextModel.get_vocab_base_pre = given
    gguf.GGUFWriter.write_tensors_to_file = write_if_fit
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    runpy.run_path(str(Path(scripts, sys.argv[0])), run_name="__main__")


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
