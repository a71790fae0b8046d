"""Files in the shape of real models: dimensions, weights, vocabulary, memory while written, and that they run."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from swaa_edge import shapes
from swaa_edge.errors import ConfigError, OutputError
from swaa_edge.files.model import read_model
from swaa_edge.shapes import SHAPES, write_shape

BASELINE = Path(__file__).parents[1] / "build/baseline/lib"


@pytest.mark.parametrize("ftype", shapes.TYPES)
def test_the_file_has_the_dimensions_of_its_shape(tmp_path, ftype):
    path = write_shape(tmp_path / "shape.gguf", "qwen3-0.6b", layers=2, ftype=ftype, vocab=300)
    model = read_model(path)
    assert (model.architecture, model.n_layers, model.n_vocab, model.file_type) == ("qwen3", 2, 300, ftype)
    assert (model.n_heads, model.n_kv_heads, model.key_length, model.value_length) == ((16, 16), (8, 8), 128, 128)
    assert model.refusal is None and model.context_length >= 1 << 20
    # Queries, keys, values and output of one layer, its three feed-forward matrices, its norms.
    layer = 1024 * (2048 + 1024 + 1024 + 2048) + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    assert model.n_parameters == 2 * layer + 1024 + 300 * 1024
    assert model.tensor_types == {ftype: 15, "F32": 9}


# From the models' own cards: all parameters, those of the embedding included.
@pytest.mark.parametrize(
    "name, parameters", [("qwen3-0.6b", 0.596e9), ("qwen3-4b", 4.022e9), ("llama-3.1-8b", 8.030e9)]
)
def test_all_dimensions_together_give_the_number_of_parameters(name, parameters):
    count = sum(int(np.prod(dims)) for _, dims in shapes._tensors(SHAPES[name]))
    assert count == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("ftype", shapes.TYPES)
def test_weights_are_random_at_the_right_scale(tmp_path, ftype):
    path = write_shape(tmp_path / "shape.gguf", "qwen3-0.6b", layers=1, ftype=ftype, vocab=300)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == len(list(shapes._tensors(SHAPES["qwen3-0.6b"]))) - 27 * 11
    for name, tensor in tensors.items():
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            assert (values == 1).all(), name
            continue
        assert values.std() == pytest.approx(values.shape[1] ** -0.5, rel=0.02), name
        assert (values == 0).mean() < 0.2, name  # 4 bits have a zero among their 16 values
        assert abs(values.mean()) < 0.05 * values.std(), name
    # One block of rows, repeated: row 256 is row 0 again, and no row before it is.
    rows = tensors["token_embd.weight"].data
    assert (rows[256:] == rows[:44]).all() and not (rows[1:256] == rows[0]).all(axis=1).any()
    blocks = [tensors[f"blk.0.attn_{which}.weight"].data[:8] for which in "qkv"]
    assert not (blocks[0] == blocks[1]).all() and not (blocks[1] == blocks[2]).all()


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    files = [write_shape(tmp_path / name, "llama-3.1-8b", layers=1, vocab=300, ftype="Q4_0") for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_memory_stays_far_below_the_file(tmp_path):
    write_shape(tmp_path / "warm.gguf", "qwen3-4b", layers=1, vocab=300)  # imports
    tracemalloc.start()
    path = write_shape(tmp_path / "shape.gguf", "qwen3-4b", layers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 500e6 and peak < 150e6, peak


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "qwen3-8b"}, "unknown shape 'qwen3-8b'; did you mean qwen3-4b?"),
        ({"name": "gpt"}, "unknown shape 'gpt'; the shapes are qwen3-0.6b, qwen3-4b, llama-3.1-8b"),
        ({"ftype": "Q4_K_M"}, "the type 'Q4_K_M' must be one of Q8_0, F16, Q4_0"),
        ({"layers": 0}, "layers = 0 must be a whole number from 1 to 1024"),
        ({"layers": True}, "layers = True must be a whole number"),
        ({"vocab": 1 << 25}, "vocab = 33554432 must be a whole number from 259 to 16777216"),
        ({"vocab": 258}, "vocab = 258 must be a whole number from 259 to 16777216"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(ConfigError) as error:
        write_shape(tmp_path / "shape.gguf", **{"name": "qwen3-4b", **arguments})
    assert str(error.value).startswith(message) and list(tmp_path.iterdir()) == []


def test_a_vocabulary_has_every_byte_and_no_token_twice(tmp_path):
    path = write_shape(tmp_path / "shape.gguf", "qwen3-0.6b", layers=1, vocab=2000)
    listed = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"]
    tokens = [listed.contents(i) for i in range(2000)]
    assert read_model(path).n_vocab == len(listed.data) == len(set(tokens)) == 2000
    # GPT-2's letters for bytes: printable ones stand for themselves, a space is Ġ.
    assert (tokens[ord("A")], tokens[ord(" ")], tokens[ord("\n")], tokens[0xE4]) == ("A", "Ġ", "Ċ", "ä")
    assert all(len(token) == 1 for token in tokens[:256])
    assert tokens[256:258] == ["Ġaa", "Ġba"] and tokens[-3:] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_a_whole_vocabulary_adds_little_to_a_file_of_the_real_size(tmp_path):
    model = read_model(write_shape(tmp_path / "shape.gguf", "qwen3-0.6b", layers=1))
    assert model.n_vocab == SHAPES["qwen3-0.6b"].vocab == 151936
    # Q8_0: 34 bytes for 32 numbers; the norms in F32.
    matrices, norms = 1024 * (151936 + 2048 + 1024 * 2 + 2048 + 3 * 3072), 3 * 1024 + 2 * 128
    assert model.n_parameters == matrices + norms
    weights = matrices * 34 // 32 + norms * 4
    assert weights < model.size < weights + (4 << 20)


def test_an_existing_file_is_replaced_by_force_only(tmp_path):
    path = tmp_path / "shape.gguf"
    path.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        write_shape(path, "qwen3-0.6b", layers=1, vocab=300)
    assert path.read_text() == "precious"
    write_shape(path, "qwen3-0.6b", layers=1, vocab=300, force=True)
    assert path.read_bytes().startswith(b"GGUF")


def test_the_command_writes_the_same_file_and_prints_its_size(tmp_path, capsys):
    whole = write_shape(tmp_path / "library.gguf", "qwen3-4b", layers=1, vocab=300, ftype="Q4_0")
    path = tmp_path / "command.gguf"
    arguments = ["qwen3-4b", str(path), "--layers", "1", "--vocab", "300", "--type", "Q4_0"]
    shapes.main(arguments)
    assert path.read_bytes() == whole.read_bytes()
    assert capsys.readouterr().out == f"{path}: {path.stat().st_size / 1e9:.2f} GB\n"
    with pytest.raises(SystemExit) as end:
        shapes.main(arguments)
    assert end.value.code == 1 and "exists already" in capsys.readouterr().err
    shapes.main([*arguments, "--force"])


@pytest.mark.native
@pytest.mark.parametrize("name", SHAPES)
def test_the_engine_runs_it_to_sound_logits(tmp_path, name):
    from support.engine.process import Engine, library_dir, tokens_of

    path = write_shape(tmp_path / "shape.gguf", name, layers=1, vocab=512)
    with Engine(library_dir()) as engine:
        result = engine.run(path, [("decode", tokens_of(range(1, 60)))], {}, n_ctx=256)
    logits = result.logits[0]
    assert logits.shape == (59, 512) and np.isfinite(logits).all()
    # What one position answers differs from what the next one does.
    assert logits.std(axis=0).min() > 0.01


@pytest.mark.native
def test_run_and_inspect_take_it(tmp_path):
    path = write_shape(tmp_path / "shape.gguf", "qwen3-0.6b", layers=1)

    def command(*arguments):
        line = [sys.executable, "-m", "swaa_edge", *arguments, "--json"]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    inspected = command("inspect", str(path))
    assert (inspected["model"]["vocabulary"], inspected["size"]) == (151936, path.stat().st_size)
    text = "Grüße, 日本!"
    result = command("run", str(path), "-p", text, "-n", "4", "--window", "8")
    # One token per byte of the prompt.
    assert result["prompt_tokens"] == len(text.encode()) and result["generated_tokens"] >= 1


@pytest.mark.native
def test_text_and_special_tokens_come_back(tmp_path):
    from swaa_edge.engine.tokenizer import open_vocabulary

    path = write_shape(tmp_path / "shape.gguf", "llama-3.1-8b", layers=1, vocab=300)
    text = "Grüße,\n\t日本 aa ba!".encode()
    with open_vocabulary(path) as vocabulary:
        tokens = vocabulary.tokenize(text + b"<|im_end|>", add_bos=True, special=True)
        assert tokens == [*text, 299] and vocabulary.token_eos() == 299
        assert vocabulary.detokenize(tokens[:-1]) == text


@pytest.mark.native
def test_the_unpatched_library_takes_it(tmp_path):
    if not any(BASELINE.glob("*llama.*")):
        pytest.skip("no unpatched library; make baseline builds it")
    path = write_shape(tmp_path / "shape.gguf", "qwen3-0.6b", layers=1, vocab=300)
    program = """
import sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=256, verbose=False)
response = llm.create_chat_completion([{"role": "user", "content": "hello"}], max_tokens=3)
print(response["usage"]["prompt_tokens"])
"""
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(BASELINE)}
    line = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    # One token per byte and per special one.
    letters = len("user\nhello\nassistant\n")
    assert (done.returncode, done.stdout) == (0, f"{letters + 3}\n"), done.stderr
