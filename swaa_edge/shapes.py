"""Write a GGUF with the shape of a real model and random weights, to measure speed without a download.

A model's speed depends on shapes and number formats, not on the values of the weights. A file with fewer layers than
the real model shows nearly the same speed ratios, in less time and memory.

    write_shape("shape.gguf", "qwen3-0.6b", layers=4, ftype="Q8_0")
    python -m swaa_edge.shapes qwen3-4b shape.gguf --type Q8_0      # the same from a shell

Weights. Each matrix repeats one block of random rows. The block is quantized once, so writing takes seconds instead of
minutes. The weights are not zero, since some processors multiply by zero faster. The scale (std = 1 / sqrt(columns))
keeps activations in the range of a trained model.

Vocabulary. The tokenizer is byte-level BPE with the real model's vocabulary size. Each byte of text becomes one token.
The other tokens are made-up words, which never occur in tokenized text. The chat template is ChatML.

Every command can load the file, and so can unpatched llama.cpp. The model's output is noise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from swaa_edge.errors import ConfigError, SwaaError
from swaa_edge.layers import shown
from swaa_edge.support.atomic import atomic_output

if TYPE_CHECKING:
    import gguf
    import numpy as np

#: The number formats that can be written.
TYPES = ("Q8_0", "F16", "Q4_0")

_BLOCK_ROWS = 256
_CHUNK = 4 << 20
# No training limits the context.
_CONTEXT = 1 << 20
_MAX_LAYERS, _MAX_VOCAB = 1024, 1 << 24
_END, _TURN, _TURN_END = _SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The dimensions of a model.

    width: numbers per token in the residual stream.
    ff: numbers per token in the hidden layer of the feed-forward network.
    head_size: numbers per attention head.
    vocab: number of tokens in the vocabulary.
    """

    architecture: str
    layers: int
    width: int
    ff: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool  # the embedding is also the output matrix
    rope_base: float
    rms_eps: float


#: Shapes by name, copied from the models' configurations.
SHAPES = {
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True, 1e6, 1e-6),
    "qwen3-4b": Shape("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True, 1e6, 1e-6),
    "llama-3.1-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, False, 5e5, 1e-5),
}


def write_shape(
    path: str | os.PathLike[str],
    name: str,
    *,
    layers: int | None = None,
    ftype: str = "Q8_0",
    vocab: int | None = None,
    force: bool = False,
) -> Path:
    """Write a GGUF file with the shape `name` and random weights to `path`. Return the path of the file.

    layers: number of layers, or None for the real model's number.
    ftype: the type of every matrix, one of `TYPES`.
    vocab: number of tokens in the vocabulary, or None for the real model's number.
    force: whether to replace an existing file.

    The same arguments give the same bytes.

    Raises `ConfigError` for arguments out of range, and `OutputError` if `path`
    exists (without `force`) or can't be written.
    """
    shape = _chosen(name, layers, ftype, vocab)
    with atomic_output(path, force=force) as temporary:
        _write_header(temporary, shape, name, ftype)
        with open(temporary, "ab") as file:
            for tensor, dims in _tensors(shape):
                _align(file)
                _write_tensor(file, tensor, dims, ftype)
            _align(file)
    return Path(path)


@contextlib.contextmanager
def temporary_shape(name: str, **options: Any) -> Iterator[Path]:
    """Yield the path of a file from `write_shape`, in a temporary folder. The folder is deleted on exit."""
    with tempfile.TemporaryDirectory(prefix="swaa-edge-bench-") as folder:
        yield write_shape(Path(folder, f"{Path(name).name}.gguf"), name, **options)


def _chosen(name: str, layers: int | None, ftype: str, vocab: int | None) -> Shape:
    if name not in SHAPES:
        near = difflib.get_close_matches(str(name), SHAPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the shapes are {', '.join(SHAPES)}"
        raise ConfigError(f"unknown shape {shown(name)}; {hint}")
    if ftype not in TYPES:
        raise ConfigError(f"the type {shown(ftype)} must be one of {', '.join(TYPES)}")
    sizes = {"layers": layers, "vocab": vocab}
    limits = {"layers": (1, _MAX_LAYERS), "vocab": (256 + len(_SPECIAL), _MAX_VOCAB)}
    given = {what: value for what, value in sizes.items() if value is not None}
    for what, value in given.items():
        least, most = limits[what]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{what} = {shown(value)} must be a whole number from {least} to {most}")
    return dataclasses.replace(SHAPES[name], **given)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor, in file order: (rows, columns), or (length,) for a norm."""
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    yield "token_embd.weight", (shape.vocab, shape.width)
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        yield f"{block}attn_norm.weight", (shape.width,)
        yield f"{block}attn_q.weight", (queries, shape.width)
        yield f"{block}attn_k.weight", (keys, shape.width)
        yield f"{block}attn_v.weight", (keys, shape.width)
        yield f"{block}attn_output.weight", (shape.width, queries)
        if shape.architecture == "qwen3":
            yield f"{block}attn_q_norm.weight", (shape.head_size,)
            yield f"{block}attn_k_norm.weight", (shape.head_size,)
        yield f"{block}ffn_norm.weight", (shape.width,)
        yield f"{block}ffn_gate.weight", (shape.ff, shape.width)
        yield f"{block}ffn_up.weight", (shape.ff, shape.width)
        yield f"{block}ffn_down.weight", (shape.width, shape.ff)
    yield "output_norm.weight", (shape.width,)
    if not shape.tied:
        yield "output.weight", (shape.vocab, shape.width)


def _write_header(path: Path, shape: Shape, name: str, ftype: str) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(f"{name}, {shape.layers} layers, random weights")
    writer.add_block_count(shape.layers)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_vocab_size(shape.vocab)
    _add_vocabulary(writer, shape.vocab)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{ftype}"])
    for tensor, dims in _tensors(shape):
        kind = gguf.GGMLQuantizationType[ftype if len(dims) == 2 else "F32"]
        row = gguf.quant_shape_to_byte_shape(dims, kind)
        # GGUFWriter requires an array type, but only raw_dtype counts.
        writer.add_tensor_info(tensor, dims, np.dtype(np.float32), int(np.prod(row)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Add a tokenizer of `size` tokens: the 256 bytes, made-up words, and the special tokens."""
    import gguf

    words = size - 256 - len(_SPECIAL)
    tokens = [*_byte_letters(), *map(_word, range(words)), *_SPECIAL]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([*[normal] * (size - len(_SPECIAL)), *[control] * len(_SPECIAL)])
    # llama.cpp requires a list of merges. This merge never applies, since both parts are longer than a letter.
    writer.add_token_merges(["merges none"])
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(tokens.index(_END, -len(_SPECIAL)))
    writer.add_eos_token_id(tokens.index(_TURN_END, -len(_SPECIAL)))
    writer.add_chat_template(_CHAT_TEMPLATE)


def _byte_letters() -> list[str]:
    """Return the characters that stand for the bytes 0 to 255 in GPT-2's vocabulary, in this order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _word(number: int) -> str:
    """Return a different made-up word for each number: Ġaa, Ġba, ... (Ġ is a space)."""
    word = ""
    while len(word) < 2 or number:
        number, letter = divmod(number, 26)
        word += chr(ord("a") + letter)
    return "Ġ" + word


def _write_tensor(file: BinaryIO, name: str, dims: tuple[int, ...], ftype: str) -> None:
    import gguf
    import numpy as np

    if len(dims) == 1:
        file.write(np.ones(dims, np.float32).tobytes())
        return
    rows, columns = dims
    block = gguf.quantize(_block(name, min(rows, _BLOCK_ROWS), columns), gguf.GGMLQuantizationType[ftype])
    row = block.nbytes // len(block)
    data = block.tobytes()
    data *= max(1, _CHUNK // len(data))
    left = rows * row
    while left:
        file.write(data[: min(left, len(data))])
        left -= min(left, len(data))


def _block(name: str, rows: int, columns: int) -> np.ndarray:
    """Return random weights [rows, columns]. The tensor's name is the seed."""
    import numpy as np

    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)


def _align(file: BinaryIO) -> None:
    import gguf

    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one file, and print the path and size. On an error, print one line to stderr and exit with code 1."""
    parser = argparse.ArgumentParser(prog="python -m swaa_edge.shapes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("path", metavar="OUT.gguf")
    parser.add_argument("--layers", type=int, metavar="N", help="number of layers (default: the model's)")
    parser.add_argument(
        "--vocab", type=int, metavar="N", help="number of tokens in the vocabulary (default: the model's)"
    )
    parser.add_argument("--type", dest="ftype", default=TYPES[0], help=f"{', '.join(TYPES)} (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    given = vars(parser.parse_args(arguments))
    try:
        path = write_shape(given.pop("path"), given.pop("name"), **given)
    except SwaaError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
