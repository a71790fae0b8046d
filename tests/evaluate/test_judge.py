"""The judge against a real HTTP server: what it asks, what it makes of the answers, and what goes wrong on the way."""

import contextlib
import http.server
import json
import socket
import threading
import traceback

import pytest

from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.evaluate.judge import TEMPLATE, Judge, verdict_of
from swaa_edge.evaluate.samples import Sample

SAMPLE = Sample("talks/1", "talks", (), ("Ann", "Bo"), question="Who {reply}?")


def says(content):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}), {}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, dict(self.headers), json.loads(body)))
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
def serve():
    """serve(answer, ...): a server that gives these, the last again and again, and a judge there that notes waits."""
    with contextlib.ExitStack() as stack:

        def make(*answers, **settings):
            server = stack.enter_context(listening(answers))
            server.waits = []
            settings = {"sleep": server.waits.append} | settings
            server.judge = Judge(f"http://127.0.0.1:{server.server_port}/v1/", "referee", **settings)
            return server

        yield make


def test_what_is_asked(serve):
    server = serve(says("Yes."))
    assert server.judge(SAMPLE, "<think>hm, {answers}</think> It was Ann {question}.") is True
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret" and headers["Content-Type"] == "application/json"
    assert body["model"] == "referee" and body["temperature"] == 0
    ((role, content),) = [(message["role"], message["content"]) for message in body["messages"]]
    # What is filled in is not searched for fields again.
    expected = TEMPLATE.replace("{question}", "Who @?").replace("{answers}", "Ann; Bo")
    assert (role, content) == ("user", expected.replace("{reply}", "It was Ann {question}.").replace("@", "{reply}"))


def test_key_and_template_are_the_callers(serve, monkeypatch):
    server = serve(says("no"), api_key=" sk-other\n", template="{answers}|{reply}|{}")
    assert server.judge(SAMPLE, "x") is False
    assert server.seen[0][1]["Authorization"] == "Bearer sk-other"
    assert server.seen[0][2]["messages"][0]["content"] == "Ann; Bo|x|{}"
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(says("no"))
    assert server.judge(SAMPLE, "x") is False and "Authorization" not in server.seen[0][1]


def test_a_reply_that_says_nothing_is_wrong_unasked(serve):
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


def test_an_unclear_verdict_is_asked_for_once_more(serve):
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
        assert str(caught.value) == (
            f'the judge at {server.judge.address} says neither yes nor no but "{shown}"; take another judge'
        )
        assert len(server.seen) == 2 and server.waits == []


def test_what_passes_is_tried_again(serve):
    busy = (429, "{}", {"Retry-After": "7"})
    loading = (503, '{"error": {"message": "Loading model"}}', {})
    cut = (200, '{"choices"', {"Content-Length": 500})
    server = serve(busy, loading, "hang up", cut, says("yes"))
    assert server.judge(SAMPLE, "Ann") is True
    assert len(server.seen) == 5 and server.waits == [7, 2, 4, 8]


@pytest.mark.parametrize(
    "answer, told",
    [
        (
            (503, '{"error": {"message": "Loading\\n model"}}', {}),
            "answers 503 Service Unavailable: Loading model, 5 times in a row",
        ),
        ((500, "", {"Retry-After": "999"}), "answers 500 Internal Server Error, 5 times in a row"),
    ],
)
def test_what_does_not_pass_ends_in_an_error(serve, answer, told):
    server = serve(answer)
    with pytest.raises(GenerationError) as caught:
        server.judge(SAMPLE, "Ann")
    assert str(caught.value) == f"the judge at {server.judge.address} {told}"
    assert len(server.seen) == 5 and server.waits == ([60] * 4 if "Retry-After" in answer[2] else [1, 2, 4, 8])


@pytest.mark.parametrize(
    "answer, told",
    [
        (
            (401, '{"error": {"message": "no such key"}}', {}),
            "answers 401 Unauthorized: no such key; set OPENAI_API_KEY",
        ),
        (
            (404, "<html>nothing here</html>", {}),
            "answers 404 Not Found: <html>nothing here</html>; is it the address, up to /v1, and the model's name?",
        ),
        ((400, '{"error": "temperature"}', {}), "answers 400 Bad Request: temperature"),
        ((302, "", {"Location": "http://127.0.0.1:9/"}), "answers 302 Found to http://127.0.0.1:9/"),
        (
            (200, '{"choices": [}', {}),
            'answers with what is no chat completion: "{"choices": [}"; is it the address, up to /v1?',
        ),
        (
            (200, '{"choices": []}', {}),
            'answers with what is no chat completion: "{"choices": []}"; is it the address, up to /v1?',
        ),
        (
            (200, "[" * 100_000, {}),
            f'answers with what is no chat completion: "{"[" * 197}..."; is it the address, up to /v1?',
        ),
    ],
)
def test_what_no_patience_mends_is_told_at_once(serve, answer, told):
    server = serve(answer)
    with pytest.raises(GenerationError) as caught:
        server.judge(SAMPLE, "Ann")
    assert str(caught.value) == f"the judge at {server.judge.address} {told}"
    assert len(server.seen) == 1 and server.waits == []
    assert "sk-secret" not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_starts_late_is_waited_for():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with contextlib.ExitStack() as stack:
        waits = []

        def sleep(seconds):
            waits.append(seconds)
            if len(waits) == 2:
                stack.enter_context(listening([says("yes")], port))

        assert Judge(f"http://127.0.0.1:{port}/v1", "referee", sleep=sleep)(SAMPLE, "Ann") is True
        assert waits == [1, 2]


def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    waits = []
    with pytest.raises(GenerationError) as caught:
        Judge(f"http://127.0.0.1:{port}", "referee", sleep=waits.append)(SAMPLE, "Ann")
    assert str(caught.value) == (
        f"the judge at http://127.0.0.1:{port}/chat/completions can't be reached: Connection refused, 5 times in a row"
    )
    assert waits == [1, 2, 4, 8]


def test_a_server_that_keeps_silent(serve):
    server = serve("keep silent", says("yes"), timeout=0.2)
    assert server.judge(SAMPLE, "Ann") is True
    server = serve("keep silent", timeout=0.05)
    with pytest.raises(GenerationError) as caught:
        server.judge(SAMPLE, "Ann")
    assert str(caught.value) == f"the judge at {server.judge.address} doesn't answer in time, 5 times in a row"


@pytest.mark.parametrize(
    "address", ["localhost:8000/v1", "ftp://a/v1", "http://", "http://a:x/v1", "http://a b/v1", "http://a/v1?k=1", ""]
)
def test_addresses_that_are_none(address):
    with pytest.raises(ConfigError) as caught:
        Judge(address, "referee")
    assert str(caught.value) == f"{address!r} must be an address such as http://localhost:8000/v1"


def test_addresses_keys_and_templates_are_checked_first():
    assert Judge("https://a/v1/chat/completions/", "referee").address == "https://a/v1/chat/completions"
    with pytest.raises(ConfigError) as caught:
        Judge("http://ann:secret@a/v1", "referee")
    assert str(caught.value) == "a judge's address holds no user name; put the key into OPENAI_API_KEY"
    with pytest.raises(ConfigError) as caught:
        Judge("http://a/v1", "referee", api_key="a\nHost: b")
    assert str(caught.value) == "the API key has characters that no key has; set OPENAI_API_KEY to the key alone"
    with pytest.raises(ConfigError) as caught:
        Judge("http://a/v1", "referee", template="{answers}")
    assert str(caught.value) == "the judge's template lacks {reply}; it needs {answers} and {reply}"
