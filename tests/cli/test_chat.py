"""`swaa-edge chat`, through a pipe as a program would use it, and its conversation at a pretended terminal."""

import contextlib
import io
import os
import select
import sys
import time

import jinja2
import pytest
from click.testing import CliRunner

from swaa_edge.cli import chat as chat_module
from swaa_edge.cli import cli
from swaa_edge.errors import GenerationError, NativeLibraryError
from swaa_edge.generate import Conversation


class Model:
    """Answers each turn with how many messages it saw; `answer` may be replaced."""

    def __init__(self):
        self.seen, self.cancelled = [], 0

    def create_chat_completion(self, messages, *, max_tokens, stream, **sampling):
        self.seen.append(([(m["role"], m["content"]) for m in messages], sampling["seed"]))
        yield {"choices": [{"delta": {"role": "assistant"}}]}
        yield from ({"choices": [{"delta": {"content": piece}}]} for piece in self.answer(messages))

    def answer(self, messages):
        return ["saw ", str(len(messages))]

    def cancel(self):
        self.cancelled += 1

    def n_ctx(self):
        return 512


def converse(monkeypatch, model, text, *, system=None, terminal=False):
    """Run a conversation over `text`; returns it."""
    stdin = io.StringIO(text)
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)
    lines = iter(text.splitlines())

    def typed(prompt):
        try:
            line = next(lines)
        except StopIteration:
            raise EOFError from None
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", typed)
    sampling = {"temperature": 0, "top_p": 1, "top_k": 0, "seed": 1}
    conversation = Conversation(model, system=system, sampling=sampling)
    chat_module.talk(model, conversation)
    return conversation


def test_history_grows_and_is_cleared(monkeypatch, capsys):
    model = Model()
    converse(monkeypatch, model, "one\n\ntwo\n/clear\nthree\n/exit\nfour\n", system="be brief")
    system = ("system", "be brief")
    assert [messages for messages, _ in model.seen] == [
        [system, ("user", "one")],
        [system, ("user", "one"), ("assistant", "saw 2"), ("user", "two")],
        [system, ("user", "three")],
    ]
    assert len({seed for _, seed in model.seen}) == 3
    assert capsys.readouterr() == ("saw 2\nsaw 4\nsaw 2\n", "")


def test_ctrl_c_keeps_the_partial_answer_and_continues(monkeypatch, capsys):
    model = Model()

    def interrupted(messages):
        yield "half"
        if len(messages) == 1:
            raise KeyboardInterrupt

    model.answer = interrupted
    conversation = converse(monkeypatch, model, "^C\none\ntwo\n", terminal=True)
    assert [m["content"] for m in conversation.messages] == ["one", "half", "two", "half"]
    out, error = capsys.readouterr()
    assert out == "halfhalf\n"
    assert error.count(chat_module.HELP) == 2 and " [stopped]\n" in error


def test_ctrl_c_in_a_pipe_ends_it(monkeypatch):
    model = Model()

    def interrupted(messages):
        raise KeyboardInterrupt
        yield

    model.answer = interrupted
    with pytest.raises(KeyboardInterrupt):
        converse(monkeypatch, model, "one\ntwo\n")


def test_an_unknown_command(monkeypatch, capsys):
    model = Model()
    converse(monkeypatch, model, "/quit\n/etc is a folder\n", terminal=True)
    assert "unknown command /quit; " in capsys.readouterr().err
    assert model.seen[0][0] == [("user", "/etc is a folder")]


def test_a_conversation_too_long_for_the_context(monkeypatch, capsys):
    model = Model()

    def too_long(messages):
        if len(messages) == 3:
            raise ValueError("Requested tokens (600) exceed context window of 512")
        return ["fine"]

    model.answer = too_long
    conversation = converse(monkeypatch, model, "one\ntwo\n/clear\nthree", terminal=True)
    assert [m["content"] for m in conversation.messages] == ["three", "fine"]
    problem = "the conversation is longer than the context of 512 tokens; /clear it, or raise --ctx"
    assert problem in capsys.readouterr().err
    with pytest.raises(GenerationError, match="the conversation is longer than the context of 512 tokens"):
        converse(monkeypatch, model, "one\ntwo\n")


@pytest.mark.parametrize("error", [ValueError, jinja2.TemplateError])
def test_a_template_that_refuses(monkeypatch, error):
    model = Model()

    def refuse(messages):
        raise error("System role not supported")
        yield

    model.answer = refuse
    with pytest.raises(GenerationError) as caught:
        converse(monkeypatch, model, "one\n", system="be brief")
    assert str(caught.value) == "the model's chat template refuses this conversation: System role not supported"


@pytest.fixture(scope="module")
def model_file(gguf_model):
    from swaa_edge import native

    try:
        native.library_dir()
    except NativeLibraryError as error:
        pytest.skip(str(error))
    return str(gguf_model("qwen3", layers=4))


@pytest.mark.native
def test_a_real_conversation_reuses_what_it_has(model_file, monkeypatch):
    from swaa_edge.llama import SwaaLlama

    timings = []
    original = SwaaLlama.create_chat_completion

    def recorded(self, *arguments, **options):
        yield from original(self, *arguments, **options)
        timings.append(self.last_timings)

    monkeypatch.setattr(SwaaLlama, "create_chat_completion", recorded)
    command = ["chat", model_file, "-n", "6", "--temp", "0", "--window", "16", "--ctx", "512"]
    result = CliRunner().invoke(cli, command, input="Hello there\nAnd now?\n")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("\n") >= 2
    first, second = timings
    assert first.reused_tokens == 0
    assert second.reused_tokens >= first.prompt_tokens


class Terminal:
    """A program at a terminal: what it shows is read up to a given text, what is typed is sent to it."""

    def __init__(self, command):
        import pty

        self.child, self.end = pty.fork()
        if self.child == 0:
            os.execv(command[0], command)

    def expect(self, text, seconds=120):
        shown, deadline = "", time.monotonic() + seconds
        while text not in shown:
            ready, _, _ = select.select([self.end], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {shown!r}"
            try:
                part = os.read(self.end, 1024)
            except OSError:  # the other end is closed
                part = b""
            assert part, f"it ended without {text!r}: {shown!r}"
            shown += part.decode("utf-8", "replace")
        return shown

    def type(self, text):
        os.write(self.end, text.encode())

    def wait(self):
        # Closing our end first would hang up on the program.
        status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        os.close(self.end)
        return status


@pytest.mark.native
@pytest.mark.skipif(os.name == "nt", reason="terminals")
def test_ctrl_c_at_a_terminal_stops_the_answer_and_not_the_program(model_file):
    size = ["--ctx", "4096", "--ubatch", "4096", "--batch", "4096"]
    terminal = Terminal([sys.executable, "-m", "swaa_edge", "chat", model_file, "--temp", "0", *size])
    terminal.expect("> ")
    terminal.type("the keys of the list " * 150 + "\n")
    terminal.expect("prefill:   0%")
    terminal.type("\x03")
    shown = terminal.expect("> ")
    assert " [stopped]" in shown and "Traceback" not in shown
    # Python's input() misses a signal that comes between its prompt and its read, until there is another one.
    shown = ""
    for _ in range(5):
        terminal.type("\x03")
        with contextlib.suppress(AssertionError):
            shown = terminal.expect("an answer", seconds=20)
            break
    assert chat_module.HELP in shown
    terminal.type("/exit\n")
    terminal.expect("/exit")
    assert terminal.wait() == 0
