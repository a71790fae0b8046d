"""GGUF files spelled out byte by byte, for tests of the code that reads and splices them.

Independent of swaa_edge and of the gguf package, so that a shared mistake cannot hide.

    model(layers=4, extra=[text("general.name", "tiny")])
"""

import struct

CODES = {"u8": 0, "u16": 2, "i32": 5, "u32": 4, "f32": 6, "bool": 7, "str": 8, "arr": 9, "u64": 10}
FORMS = {"u8": "<B", "u16": "<H", "i32": "<i", "u32": "<I", "f32": "<f", "bool": "<B", "u64": "<Q"}


def string(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def kv(key, kind, value):
    body = string(value) if kind == "str" else struct.pack(FORMS[kind], value)
    return string(key) + struct.pack("<I", CODES[kind]) + body


def array(key, kind, values):
    body = b"".join(string(value) if kind == "str" else struct.pack(FORMS[kind], value) for value in values)
    return string(key) + struct.pack("<IIQ", CODES["arr"], CODES[kind], len(values)) + body


def gguf(keys, tensors=(), *, version=3, alignment=32, fill=b"\0", tail=b"", pad=True):
    """A file of ready-made `keys` and `tensors` (name, f32 values); `fill` is the padding's byte."""
    infos, data = b"", b""
    for name, values in tensors:
        infos += string(name) + struct.pack("<IQIQ", 1, len(values), 0, len(data))
        data += struct.pack(f"<{len(values)}f", *values)
        data += bytes(-len(data) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + infos
    padding = fill * (-len(head) % alignment) if pad else b""
    return head + padding + data + tail


def base_keys(layers=4, arch="llama", alignment=None):
    keys = [
        kv("general.architecture", "str", arch),
        kv("general.name", "str", "tiny"),
        kv(f"{arch}.block_count", "u32", layers),
        kv(f"{arch}.context_length", "u32", 4096),
        kv(f"{arch}.embedding_length", "u32", 64),
        kv(f"{arch}.attention.head_count", "u32", 8),
        kv(f"{arch}.attention.head_count_kv", "u32", 2),
        array("tokenizer.ggml.tokens", "str", ["a", "b", "c"]),
        kv("general.file_type", "u32", 0),
    ]
    return keys if alignment is None else [*keys, kv("general.alignment", "u32", alignment)]


TENSORS = (("token_embd.weight", [0.5, -1.0, 3.25, 7.0, 1.0]), ("output.weight", [float(n) for n in range(40)]))


def model(layers=4, *, arch="llama", extra=(), tensors=TENSORS, **layout):
    """A small file of an architecture that SWAA can be applied to, with `extra` keys at its end."""
    keys = base_keys(layers, arch, layout.get("alignment"))
    return gguf([*keys, *extra], tensors, **layout)


def swaa_keys(layers=4, **changed):
    """Correct SWAA keys; a key named in `changed` (version=..., None to leave out) is replaced."""
    keys = {
        "version": kv("swaa.version", "u32", 1),
        "window_size": kv("swaa.window_size", "u32", 2048),
        "sink_count": kv("swaa.sink_count", "u32", 64),
        "sliding_layers": array("swaa.sliding_layers", "bool", [layer % 2 == 0 for layer in range(layers)]),
        "fa_decode_layers": array("swaa.fa_decode_layers", "bool", [layer == 0 for layer in range(layers)]),
        "recipe": kv("swaa.recipe", "str", "quality"),
    }
    return [key for key in (keys | changed).values() if key is not None]


def shard(number, count=3, *, of=3):
    """File `number`, from 0, of a model that is split into `of` files."""
    split = [kv("split.no", "u16", number), kv("split.count", "u16", of), kv("split.tensors.count", "i32", count)]
    name, values = f"blk.{number}.weight", [float(number)] * 9
    return model(extra=split, tensors=[(name, values)]) if number == 0 else gguf(split, [(name, values)])
