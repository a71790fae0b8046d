"""`swaa-edge serve`: a real server on a free port of this machine, used as a client would use it."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from click.testing import CliRunner

from swaa_edge import server as serving
from swaa_edge.cli import cli
from swaa_edge.errors import ConfigError, NativeLibraryError

# Variables that upstream's settings classes read, and one that keeps proxies out.
ENVIRONMENT = {"CONFIG_FILE": "/none/there.json", "PORT": "not a number", "CACHE": "maybe", "no_proxy": "*"}


def test_a_port_in_use_is_reported_before_the_model_is_read():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli, ["serve", "/none/there.gguf", "--port", str(port)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert result.stderr.endswith("; choose another --host or --port\n") and result.stderr.count("\n") == 1


def test_an_unknown_host():
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid:80: "):
        serving.listen("no.such.host.invalid", 80)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None if name == "sse_starlette" else object())
    result = CliRunner().invoke(cli, ["serve", "model.gguf", "--port", "0"])
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: serve needs the package sse_starlette; pip install 'swaa-edge[server]'\n",
    )


@pytest.fixture
def server(gguf_model):
    """server(*options): a running server's base address and process; it is stopped when the test ends."""
    from swaa_edge import native

    try:
        native.library_dir()
    except NativeLibraryError as error:
        pytest.skip(str(error))
    model = str(gguf_model("qwen3", layers=4))
    running = []

    def start(*options):
        command = [sys.executable, "-m", "swaa_edge", "serve", model, "--port", "0", "--ctx", "2048", *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
        running.append(process)
        line = process.stderr.readline()
        assert line.startswith("serving qwen3-f32.gguf at http://127.0.0.1:"), line + process.stderr.read()
        return line.split(" at ")[1].split(" ")[0], process

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stderr.close()


def ask(url, body=None, key=None):
    """POST `body` as JSON (or GET) and return the answer, parsed unless it is a stream."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as answer:
        text = answer.read().decode()
    return text if text.startswith("data:") else json.loads(text)


@pytest.mark.native
def test_completions_chats_streams_and_an_end(server):
    address, process = server("--window", "16", "--sinks", "2")
    body = {"prompt": "The list of keys", "max_tokens": 6, "temperature": 0}
    answer = ask(f"{address}/completions", body)
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    text = answer["choices"][0]["text"]

    from swaa_edge import SwaaConfig, SwaaLlama

    path = process.args[4]
    llm = SwaaLlama(path, swaa=SwaaConfig(16, 2), n_ctx=2048, verbose=False)
    assert text == llm.create_completion(**body)["choices"][0]["text"]
    llm.close()

    events = [line[6:] for line in ask(f"{address}/completions", body | {"stream": True}).splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == text

    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
    answer = ask(f"{address}/chat/completions", chat)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] >= 1
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    again = ask(f"{address}/chat/completions", chat)["usage"]
    assert again["prompt_tokens_details"] == {"cached_tokens": again["prompt_tokens"] - 1}
    assert [model["id"] for model in ask(f"{address}/models")["data"]] == ["qwen3-f32.gguf"]

    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(f"{address}/completions", {"prompt": "word " * 3000, "max_tokens": 4})
    assert caught.value.code == 400
    assert "maximum context length is 2048 tokens" in caught.value.read().decode()

    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


@pytest.mark.native
def test_requests_without_the_key_are_refused(server):
    address, _ = server("--api-key", "secret")
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(f"{address}/models")
    assert caught.value.code == 401
    assert ask(f"{address}/models", key="secret")["object"] == "list"
