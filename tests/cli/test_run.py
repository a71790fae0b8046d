"""`swaa-edge run`: output, JSON, questions, errors by their exact line, Ctrl-C."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from support.fakes import gguf_bytes
from swaa_edge.cli import cli
from swaa_edge.errors import NativeLibraryError

TEXT = "The function returns a list of all the keys that the object has, and raises an error if there is none. "


@pytest.fixture(scope="module")
def instruct(gguf_model):
    """A model with a chat template."""
    from swaa_edge import native

    try:
        native.library_dir()
    except NativeLibraryError as error:
        pytest.skip(str(error))
    return str(gguf_model("qwen3", layers=4))


@pytest.fixture(scope="module")
def edited(instruct, tmp_path_factory):
    """edited(old, new): that model with one text in its file replaced by another of the same length."""

    def edit(old, new):
        path, data = tmp_path_factory.mktemp("edited") / "model.gguf", Path(instruct).read_bytes()
        assert (data.count(old), len(old)) == (1, len(new))
        path.write_bytes(data.replace(old, new))
        return str(path)

    return edit


@pytest.fixture(scope="module")
def model(edited):
    """A base model: it has no chat template."""
    return edited(b"tokenizer.chat_template", b"tokenizer.chat_temperat")


def swaa_edge(*arguments, **options):
    """Run the command in this process: exit code, stdout, stderr."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="swaa-edge", **options)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_help_needs_no_library():
    code = "import sys; from swaa_edge.cli import cli; cli(['run', '--help'], standalone_mode=False); "
    code += "print({'llama_cpp', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Complete one prompt, or answer one question about it, streamed to stdout." in done.stdout
    assert done.stdout.endswith("set()\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ([], 2, 'give the prompt with either -p TEXT or -f FILE ("-" means stdin); see swaa-edge run --help'),
        (
            ["-p", "x", "-f", "y"],
            2,
            'give the prompt with either -p TEXT or -f FILE ("-" means stdin); see swaa-edge run --help',
        ),
        (
            ["-p", "x", "-f", "y", "-q", "z"],
            2,
            'give the prompt with either -p TEXT or -f FILE ("-" means stdin); see swaa-edge run --help',
        ),
        (["-p", ""], 1, "the prompt is empty; give a text to continue"),
        (["-p", "", "-q", "z"], 1, "the prompt is empty; give a text to ask about"),
        (["-f", "/none/there.txt"], 1, "cannot read /none/there.txt: No such file or directory; give a text file"),
        (
            ["-p", "x", "--full-attention", "--window", "4"],
            2,
            "--full-attention turns SWAA off; give either --full-attention or SWAA settings; see swaa-edge run --help",
        ),
        (
            ["-p", "x", "--recipe", "qualty"],
            1,
            "unknown recipe 'qualty'; did you mean quality?",
        ),
    ],
)
def test_wrong_command_lines(arguments, code, line):
    assert swaa_edge("run", "model.gguf", *arguments) == (code, "", f"Error: {line}\n")


def test_text_that_is_not_utf_8(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("naïve".encode("latin-1"))
    assert swaa_edge("run", "model.gguf", "-f", file) == (
        1,
        "",
        f"Error: {file} is not UTF-8 text (byte 2); save it as UTF-8\n",
    )
    assert swaa_edge("run", "model.gguf", "-f", "-", input=b"ok \xff")[2] == (
        "Error: stdin is not UTF-8 text (byte 3); save it as UTF-8\n"
    )


@pytest.mark.native
def test_a_file_that_is_not_a_model(model, tmp_path):
    for path in (tmp_path / "none.gguf", __file__):
        code, out, error = swaa_edge("run", path, "-p", "x")
        assert (code, out, error.count("\n")) == (1, "", 1)
        assert error.startswith(f"Error: {path} ")


@pytest.mark.native
def test_a_model_without_a_tokenizer(model, tmp_path):
    path = tmp_path / "bare.gguf"
    path.write_bytes(gguf_bytes.model())
    code, out, error = swaa_edge("run", path, "-p", "x")
    assert (code, out) == (1, "")
    assert error == f"Error: {path} has no tokenizer; convert the model again from a folder that holds its tokenizer\n"


@pytest.mark.native
def test_the_text_is_streamed_and_the_same_as_the_librarys(model, tmp_path):
    from swaa_edge import SwaaConfig, SwaaLlama

    file = tmp_path / "prompt.txt"
    file.write_text(TEXT * 5)
    llm = SwaaLlama(model, swaa=SwaaConfig(16, 2), n_ctx=1024, verbose=False)
    expected = llm.create_completion(TEXT * 5, max_tokens=12, temperature=0)["choices"][0]["text"]
    llm.close()
    code, out, error = swaa_edge("run", model, "-f", file, "-n", 12, "--temp", 0, "--window", 16, "--sinks", 2)
    assert (code, out, error) == (0, expected + "\n" * (not expected.endswith("\n")), "")
    assert swaa_edge("run", model, "-f", "-", "-n", 12, "--temp", 0, "--window", 16, "--sinks", 2, input=TEXT * 5) == (
        0,
        out,
        "",
    )


SLIDING = ["--window", 16, "--sinks", 2, "--fa-decode"]
GREEDY = ["-n", 12, "--temp", 0]
QUESTION = "Which keys does the object have?"


@pytest.mark.native
def test_a_question_is_one_message_after_the_document(instruct, tmp_path):
    from swaa_edge import SwaaConfig, SwaaLlama
    from swaa_edge.generate import Conversation, complete

    file = tmp_path / "report.txt"
    file.write_text(TEXT * 5 + "\n\n")
    swaa = SwaaConfig(16, 2, fa_decode=True, tail_count=64)
    expected = {}
    with contextlib.closing(SwaaLlama(instruct, swaa=swaa, n_ctx=1024, verbose=False)) as llm:
        for message in (f"{(TEXT * 5).strip()}\n\n{QUESTION}", QUESTION):
            for system in (None, "You are brief."):
                sampling = {"temperature": 0.0, "top_p": 0.95, "top_k": 40}
                talk = Conversation(llm, system=system, max_tokens=12, sampling=sampling)
                expected[message == QUESTION, system] = talk.ask(message)
    assert len(set(expected.values())) == 4
    for (alone, system), text in expected.items():
        arguments = [] if alone else ["-f", file]
        arguments += ["--system", system] if system else []
        found = swaa_edge("run", instruct, *arguments, "-q", f" {QUESTION}\n", *GREEDY, *SLIDING, "--tail", 64)
        assert found == (0, text + "\n" * (not text.endswith("\n")), "")
        prompt = "" if alone else TEXT * 5
        sampling = {"temperature": 0.0}
        answer = complete(
            instruct, prompt, question=QUESTION, system=system, max_tokens=12, swaa=swaa, sampling=sampling
        )
        assert answer.text == text


@pytest.mark.native
def test_a_question_that_the_tail_does_not_cover(instruct):
    def note(*arguments):
        code, out, error = swaa_edge("run", instruct, "-q", QUESTION, "-n", 1, "--json", *arguments)
        assert code == 0 and set(json.loads(out)) == {
            *("model", "text", "finish_reason", "prompt_tokens", "generated_tokens", "seed", "n_ctx", "swaa"),
            *("policy", "timings"),
        }
        return error

    document = ["-p", TEXT * 5]
    length = len(tokens_of(instruct, QUESTION)) + len(tokens_of(instruct, "<|im_end|>\n<|im_start|>assistant\n"))
    line = "the question and the end of its turn have {} tokens, but the tail has {}; to cover the question, "
    line += "add --tail {} to the SWAA settings\n"
    for tail in (0, length - 1):
        assert note(*document, *SLIDING, "--tail", tail) == line.format(length, tail, length)
    assert note(*document, *SLIDING, "--tail", length) == ""
    assert note(*document, *SLIDING[:4]) == ""  # without FA decode a tail has no effect
    assert note(*document) == ""  # full attention
    total = len(tokens_of(instruct, f"<|im_start|>user\n{QUESTION}")) + length - len(tokens_of(instruct, QUESTION))
    for window, sinks in ((total - 1, 0), (total, 0), (total - 3, 2), (total - 3, 3)):
        # Window and sinks together may cover the whole prompt.
        assert bool(note("--window", window, "--sinks", sinks, "--fa-decode")) == (window + sinks < total)


def tokens_of(model, text):
    from swaa_edge.engine.tokenizer import tokenize

    return tokenize(model, text)


@pytest.mark.native
def test_a_chat_template_that_is_not_used(instruct):
    hint = f"{instruct} has a chat template, which -p and -f alone don't use; -q QUESTION asks through it\n"
    code, out, error = swaa_edge("run", instruct, "-p", TEXT, "-n", 4, "--json")
    assert (code, error) == (0, hint) and json.loads(out)["prompt_tokens"] == len(tokens_of(instruct, TEXT))


@pytest.mark.native
def test_questions_that_can_not_be_asked(instruct, model, edited):
    raw = "leave out -q to continue a text"
    broken = edited(b"{% endfor %}", b"{% enxfor %}")
    silent = edited(b"message['content']", b"message['role']   ")
    failing = edited(b"message['content']", b"message['role']+1 ")
    for path, arguments, line in (
        (instruct, ["-p", "x", "-q", " \n"], "the question is empty; give the question's text after -q"),
        (instruct, ["-p", "x", "--system", "y"], "--system needs a question; add -q QUESTION"),
        (
            model,
            ["-p", "x", "-q", "y"],
            f"{model} has no chat template, which a question needs; {raw}, or give the file of an instruct model",
        ),
        (silent, ["-q", "y"], f"{silent}: its chat template omits the user's message; {raw}"),
    ):
        assert swaa_edge("run", path, *arguments) == (1, "", f"Error: {line}\n")
    code, out, error = swaa_edge("run", broken, "-q", "y")
    assert (code, out) == (1, "")
    assert error.startswith(f"Error: {broken} has a chat template that is not valid Jinja: ") and error.count("\n") == 1
    code, out, error = swaa_edge("run", failing, "-q", "y")
    assert (code, out) == (1, "")
    assert error.startswith(f"Error: {failing}: its chat template fails (") and error.endswith(f"); {raw}\n")


@pytest.mark.native
def test_json_is_one_document(model):
    arguments = ["run", model, "-p", TEXT, "-n", 4, "--window", 8, "--fa-layers", "1::2", "--fa-decode", "--json"]
    code, out, error = swaa_edge(*arguments, "--seed", 5)
    document = json.loads(out)
    timings = document.pop("timings")
    assert (code, error) == (0, "")
    assert document == {
        "model": model,
        "text": document["text"],
        "finish_reason": "length",
        "prompt_tokens": document["prompt_tokens"],
        "generated_tokens": 4,
        "seed": 5,
        "n_ctx": 256,
        "swaa": {
            "window_size": 8,
            "sink_count": 0,
            "fa_layers": [1, 3],
            "fa_decode": True,
            "tail_count": 0,
            "recipe": "custom",
            "adapter": None,
        },
        "policy": "table",
    }
    assert 20 < document["prompt_tokens"] < len(TEXT)
    assert set(timings) == {
        "load_seconds",
        "prefill_seconds",
        "prefill_tokens_per_second",
        "decode_seconds",
        "decode_tokens_per_second",
    }
    assert timings["prefill_tokens_per_second"] * timings["prefill_seconds"] == pytest.approx(document["prompt_tokens"])
    # The seed that is reported repeats the text, and full attention has no settings.
    assert json.loads(swaa_edge(*arguments, "--seed", 5)[1])["text"] == document["text"]
    full = json.loads(swaa_edge("run", model, "-p", TEXT, "-n", 2, "--full-attention", "--json")[1])
    assert (full["swaa"], full["policy"]) == (None, None)


@pytest.mark.native
def test_progress_goes_to_stderr(model):
    code, out, error = swaa_edge("run", model, "-p", TEXT * 3, "-n", 2, "--ubatch", 32, "--json", "--progress")
    total = json.loads(out)["prompt_tokens"]
    lines = error.splitlines()
    assert (code, lines[0]) == (0, f"prefill 0/{total} tokens")
    assert lines[1] == f"prefill 32/{total} tokens"
    assert lines[-1].startswith(f"prefill {total} tokens in ")
    assert len(lines) == 1 + -(-total // 32)


@pytest.mark.native
def test_a_prompt_beyond_the_training_context(model):
    code, out, error = swaa_edge("run", model, "-p", "x", "-n", 9000)
    assert (code, out) == (1, "")
    assert error.startswith(
        "Error: 1 prompt tokens and 9000 new tokens exceed the model's training context of 8192 tokens"
    )


@pytest.mark.native
def test_a_quantized_cache(model):
    code, out, error = swaa_edge("run", model, "-p", TEXT, "-n", 4, "--temp", 0, "--cache-type", "q8_0", "--window", 8)
    assert (code, error) == (0, "") and out.strip()


@pytest.mark.native
@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("during", ["prefill", "generation"])
def test_ctrl_c_stops_it(model, tmp_path, during):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(TEXT * (190 if during == "prefill" else 1))
    command = [sys.executable, "-m", "swaa_edge", "run", model, "-f", prompt, "--ctx", "8192", "--temp", "0"]
    command += ["--ubatch", "4096", "--batch", "4096", "--progress", "-n", "1500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        # The first line comes before the first ubatch, the first character after the last.
        assert process.stderr.readline().startswith(b"prefill 0/")
        if during == "generation":
            assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    *progress, last = error.decode().splitlines()
    assert last == "Interrupted"
    assert [line for line in progress if not line.startswith("prefill ")] == []
    if during == "prefill":
        assert (out, progress) == (b"", [])


@pytest.mark.native
def test_a_closed_pipe(model):
    # Without a seed a model of random weights may generate nothing printable for minutes.
    command = f"{sys.executable} -m swaa_edge run {model} -p '{TEXT}' -n 2000 --seed 3 | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert len(done.stdout) == 1
    assert "Traceback" not in done.stderr
