"""The judge against a real HTTP server: its requests, its verdicts, retries, and every failure in one line."""

import contextlib
import http.server
import json
import socket
import sys
import threading
import traceback

import pytest

pytest.importorskip("openai")

from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.evaluate.judge import RETRIES, TEMPLATE, Judge, verdict_of
from swaa_edge.evaluate.samples import Sample

SAMPLE = Sample("talks/1", "talks", (), ("Ann", "Bo"), question="Who {reply}?")


def says(content):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}), {}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, self.headers, json.loads(body)))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer == "hang up":
            return
        if answer == "keep silent":
            self.server.over.wait(10)
            return
        status, text, headers = answer
        self.send_response(status)
        for name, value in ({"Content-Length": len(text.encode())} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def listening(answers, port=0):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.answers, server.seen, server.over = list(answers), [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")


@pytest.fixture
def waits(monkeypatch):
    """The seconds between retries, which nobody waits for."""
    found = []
    monkeypatch.setattr("time.sleep", found.append)
    return found


@pytest.fixture
def serve(waits):
    """serve(answer, ...): a server that gives these, the last one repeatedly, and its judge."""
    with contextlib.ExitStack() as stack:

        def make(*answers, **settings):
            server = stack.enter_context(listening(answers))
            server.judge = Judge(f"http://127.0.0.1:{server.server_port}/v1/", "referee", **settings)
            return server

        yield make


def where(server):
    return f"the judge referee at http://127.0.0.1:{server.server_port}/v1/chat/completions"


def seconds(waits, expected):
    """Whether each wait is the expected one, of which the client takes up to a quarter at random."""
    return len(waits) == len(expected) and all(0.75 * e <= w <= e for w, e in zip(waits, expected, strict=True))


def test_the_request(serve):
    server = serve(says("Yes."))
    assert server.judge(SAMPLE, "<think>hm, {answers}</think> It was Ann {question}.") is True
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret" and headers["Content-Type"] == "application/json"
    assert body["model"] == "referee" and body["temperature"] == 0
    ((role, content),) = [(message["role"], message["content"]) for message in body["messages"]]
    # Filled-in values are not searched for fields.
    expected = TEMPLATE.replace("{question}", "Who @?").replace("{answers}", "Ann; Bo")
    assert (role, content) == ("user", expected.replace("{reply}", "It was Ann {question}.").replace("@", "{reply}"))


def test_the_key_of_the_environment(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-other\n")
    server = serve(says("no"))
    assert server.judge(SAMPLE, "x") is False
    assert server.seen[0][1]["Authorization"] == "Bearer sk-other"
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(says("no"))
    assert server.judge(SAMPLE, "x") is False and "Authorization" not in server.seen[0][1]


def test_an_empty_response_is_wrong_without_asking(serve):
    server = serve(says("yes"))
    assert server.judge(SAMPLE, "<think>Ann, Bo</think>\n") is False
    assert server.seen == []


@pytest.mark.parametrize(
    "answer, verdict",
    [
        ("yes", True),
        ("No.", False),
        ("**Yes**, it names both.", True),
        ("The verdict is: no", False),
        ("<think>yes or no? no</think>YES", True),
        ("No, wait: yes", None),
        ("There is no way to tell", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_verdicts(answer, verdict):
    assert verdict_of(answer) is verdict


def test_an_unclear_verdict_is_requested_once_more(serve):
    server = serve(says("Well, maybe."), says("no"))
    assert server.judge(SAMPLE, "Ann") is False
    first, second = (body["messages"] for _, _, body in server.seen)
    assert second[:1] == first
    assert second[1:] == [
        {"role": "assistant", "content": "Well, maybe."},
        {"role": "user", "content": 'Say "yes" or "no" only: is the reply right?'},
    ]
    for content, shown in (("Well,\nmaybe.", "Well, maybe."), (None, "")):
        server = serve(says(content))
        with pytest.raises(GenerationError) as caught:
            server.judge(SAMPLE, "Ann")
        assert str(caught.value) == f'{where(server)} answers neither yes nor no but "{shown}"; use another judge'
        assert len(server.seen) == 2


def test_temporary_failures_are_retried(serve, waits):
    busy = (429, "{}", {"Retry-After": "7"})
    loading = (503, '{"error": {"message": "Loading model"}}', {})
    truncated = (200, '{"choices"', {"Content-Length": 500})
    server = serve(busy, loading, "hang up", truncated, says("yes"))
    assert server.judge(SAMPLE, "Ann") is True
    assert len(server.seen) == 5 and waits[0] == 7 and seconds(waits[1:], [1, 2, 4])


@pytest.mark.parametrize(
    "answer, message",
    [
        (
            (503, '{"error": {"message": "Loading\\n model"}}', {}),
            "answers 503 Service Unavailable: Loading model, after 6 retries",
        ),
        ((500, "", {"x-should-retry": "false"}), "answers 500 Internal Server Error"),
        ("hang up", "can't be reached: Server disconnected without sending a response., after 6 retries"),
    ],
)
def test_failures_that_last_end_in_an_error(serve, waits, answer, message):
    server = serve(answer)
    with pytest.raises(GenerationError) as caught:
        server.judge(SAMPLE, "Ann")
    assert str(caught.value) == f"{where(server)} {message}"
    retries = RETRIES if "retries" in message else 0
    assert len(server.seen) == 1 + retries and seconds(waits, [0.5, 1, 2, 4, 8, 8][:retries])


@pytest.mark.parametrize(
    "answer, message",
    [
        (
            (401, '{"error": {"message": "no such key"}}', {}),
            "answers 401 Unauthorized: no such key; set OPENAI_API_KEY",
        ),
        (
            (404, "<html>nothing here</html>", {}),
            "answers 404 Not Found: <html>nothing here</html>; check the address, up to /v1, and the model's name",
        ),
        ((400, '{"error": "temperature"}', {}), "answers 400 Bad Request: temperature"),
        ((302, "", {"Location": "http://127.0.0.1:9/"}), "answers 302 Found to http://127.0.0.1:9/"),
        (
            (200, '{"choices": [}', {}),
            'does not return a chat completion but "{"choices": [}"; check the address, up to /v1',
        ),
        (
            (200, '{"choices": []}', {"Content-Type": "application/json"}),
            'does not return a chat completion but "{"choices": []}"; check the address, up to /v1',
        ),
        (
            (200, "[" * 100_000, {}),
            f'does not return a chat completion but "{"[" * 197}..."; check the address, up to /v1',
        ),
    ],
)
def test_permanent_failures_are_not_retried(serve, waits, answer, message):
    server = serve(answer)
    with pytest.raises(GenerationError) as caught:
        server.judge(SAMPLE, "Ann")
    assert str(caught.value) == f"{where(server)} {message}"
    assert len(server.seen) == 1 and waits == []
    assert "sk-secret" not in "".join(traceback.format_exception(caught.value))


@pytest.fixture
def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_server_that_starts_late_is_waited_for(free_port, monkeypatch):
    with contextlib.ExitStack() as stack:
        waits = []

        def sleep(seconds):
            waits.append(seconds)
            if len(waits) == 2:
                stack.enter_context(listening([says("yes")], free_port))

        monkeypatch.setattr("time.sleep", sleep)
        assert Judge(f"http://127.0.0.1:{free_port}/v1", "referee")(SAMPLE, "Ann") is True
        assert seconds(waits, [0.5, 1])


def test_nobody_there(free_port, waits):
    with pytest.raises(GenerationError) as caught:
        Judge(f"http://127.0.0.1:{free_port}", "referee")(SAMPLE, "Ann")
    assert str(caught.value) == (
        f"the judge referee at http://127.0.0.1:{free_port}/chat/completions can't be reached: "
        "[Errno 111] Connection refused, after 6 retries"
    )
    assert seconds(waits, [0.5, 1, 2, 4, 8, 8])


def test_a_server_that_keeps_silent(serve):
    server = serve("keep silent", says("yes"), timeout=0.2)
    assert server.judge(SAMPLE, "Ann") is True
    server = serve("keep silent", timeout=0.05)
    with pytest.raises(GenerationError) as caught:
        server.judge(SAMPLE, "Ann")
    assert str(caught.value) == f"{where(server)} didn't answer in time, after 6 retries"


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError) as caught:
        Judge("http://a/v1", "referee")
    assert str(caught.value) == "a judge needs the package openai; pip install 'swaa-edge[judge]'"


@pytest.mark.parametrize(
    "address", ["localhost:8000/v1", "ftp://a/v1", "http://", "http://a:x/v1", "http://a b/v1", "http://a/v1?k=1", ""]
)
def test_wrong_addresses(address):
    with pytest.raises(ConfigError) as caught:
        Judge(address, "referee")
    assert str(caught.value) == f"{address!r} must be an address such as http://localhost:8000/v1"


def test_addresses_and_keys_are_checked_first(monkeypatch):
    assert Judge("https://a/v1/chat/completions/", "referee").address == "https://a/v1/chat/completions"
    with pytest.raises(ConfigError) as caught:
        Judge("http://ann:secret@a/v1", "referee")
    assert str(caught.value) == "a judge's address must not contain a user name; put the key into OPENAI_API_KEY"
    monkeypatch.setenv("OPENAI_API_KEY", "a\nHost: b")
    with pytest.raises(ConfigError) as caught:
        Judge("http://a/v1", "referee")
    assert (
        str(caught.value) == "OPENAI_API_KEY contains characters that are not allowed in a key; set it to the key alone"
    )
