"""A scorer that asks another model whether a reply is right, behind any OpenAI-compatible address.

Free answers can be right in many words, which no comparison of texts knows; the servers that people have (our own
`swaa-edge serve`, llama.cpp's, Ollama, hosted ones) all speak one protocol.

    judge = Judge("http://localhost:8000/v1", "judge-model"); judge(sample, "It was Ann.")
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.evaluate.samples import Sample
from swaa_edge.evaluate.scoring import final

#: What the judge is asked; {question}, {answers} and {reply} stand for what is known.
TEMPLATE = """\
Below are a question about a long text, the reference answer, and somebody's reply.
Is the reply right? It is if it says what the reference answer says, in whatever words, and nothing against it. If \
there are several reference answers, the reply needs all of them. You don't need the text itself.

Question: {question}

Reference answer: {answers}

Reply: {reply}

Say "yes" if the reply is right and "no" if it isn't, and nothing else."""

_AGAIN = 'Say "yes" or "no" only: is the reply right?'
_FIELDS = re.compile(r"\{(question|answers|reply)\}")
# Seconds before each further try of a request that failed in passing; a server that loads a model takes a while.
_WAITS = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 60.0


class Judge:
    """Asks `model` at `base_url` ("http://host:port/v1") for a verdict; an instance is a scorer.

    api_key: None for the environment's OPENAI_API_KEY, and none if that isn't set. timeout: seconds without a sign of
    life. template: as `TEMPLATE`, other words. sleep: how to wait between tries.

    Calling it returns whether the reply is right; one that says nothing (after its thinking) is wrong unasked.
    A request that fails in passing (no connection, status 408, 429 or 5xx) is tried again four times. The
    verdict's temperature is 0. Raises `ConfigError` here, and `GenerationError` when called, naming the address.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        template: str = TEMPLATE,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.address, self.model = _address(base_url), model
        self.timeout, self.template = timeout, template
        self._headers = {"Content-Type": "application/json", "User-Agent": "swaa-edge"}
        key = (os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key).strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("the API key has characters that no key has; set OPENAI_API_KEY to the key alone")
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        for field in ("answers", "reply"):
            if f"{{{field}}}" not in template:
                raise ConfigError(f"the judge's template lacks {{{field}}}; it needs {{answers}} and {{reply}}")
        self._sleep = sleep
        # A redirected POST would lose its body, and take the key to another host.
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, sample: Sample, reply: str) -> bool:
        told = final(reply)
        if not told:
            return False
        question, answers = sample.question or "(part of the text)", "; ".join(sample.answers)
        known = {"question": question, "answers": answers, "reply": told}
        talk = [{"role": "user", "content": _FIELDS.sub(lambda field: known[field[1]], self.template)}]
        answer = self._ask(talk)
        verdict = verdict_of(answer)
        if verdict is None:
            talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": _AGAIN}]
            answer = self._ask(talk)
            verdict = verdict_of(answer)
        if verdict is None:
            raise self._failure(f'says neither yes nor no but "{_line(answer)}"; take another judge')
        return verdict

    def _ask(self, messages: list[dict[str, str]]) -> str:
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        for wait in (*_WAITS, None):
            try:
                return self._content(self._post(body))
            except _Passing as problem:
                if wait is None:
                    raise self._failure(f"{problem}, {len(_WAITS) + 1} times in a row") from problem.__cause__
                self._sleep(wait if problem.wait is None else problem.wait)
        raise AssertionError

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.address, body, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            with error:
                what = _refusal(error)
            if error.code in (408, 429) or error.code >= 500:
                raise _Passing(what, _retry_after(error)) from error
            hint = {401: "; set OPENAI_API_KEY", 404: "; is it the address, up to /v1, and the model's name?"}
            raise self._failure(what + hint.get(error.code, "")) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, socket.gaierror) and error.reason.errno != socket.EAI_AGAIN:
                raise self._failure(f"can't be found: {error.reason.strerror}; check its name") from error
            if not isinstance(error.reason, OSError) or "certificate" in str(error.reason).lower():
                raise self._failure(f"can't be reached: {_line(str(error.reason))}") from error
            raise _Passing(_lost(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(_lost(error)) from error

    def _content(self, data: bytes) -> str:
        try:
            content = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            told = _line(data[:1000].decode("utf-8", "replace"))
            what = f'answers with what is no chat completion: "{told}"; is it the address, up to /v1?'
            raise self._failure(what) from error
        return content if isinstance(content, str) else ""

    def _failure(self, what: str) -> GenerationError:
        return GenerationError(f"the judge at {self.address} {what}")


class _Passing(Exception):
    """What may be over in a moment; wait: seconds that the server asks for."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def verdict_of(answer: str) -> bool | None:
    """Yes or no, as the first or the last word of an answer (after its thinking); None if neither, or one of each."""
    words = re.findall(r"\w+", final(answer).casefold())
    found = {word for word in (*words[:1], *words[-1:]) if word in ("yes", "no")}
    return found.pop() == "yes" if len(found) == 1 else None


def _address(base_url: str) -> str:
    base = base_url.strip().rstrip("/").removesuffix("/chat/completions")
    try:
        parts = urllib.parse.urlsplit(base)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole or not base.isascii() or not base.isprintable() or " " in base or parts.query or parts.fragment:
        raise ConfigError(f"{base_url!r} must be an address such as http://localhost:8000/v1")
    if parts.username is not None:
        raise ConfigError("a judge's address holds no user name; put the key into OPENAI_API_KEY")
    return f"{base}/chat/completions"


def _refusal(error: urllib.error.HTTPError) -> str:
    """Status, reason and what the server says about it."""
    try:
        data = error.read(10_000)
    except (OSError, http.client.HTTPException):
        data = b""
    told = data.decode("utf-8", "replace")
    try:
        message = json.loads(data)["error"]
        told = message["message"] if isinstance(message, dict) else message
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    where = error.headers.get("Location")
    status = f"answers {error.code} {error.reason}".rstrip() + (f" to {where}" if where else "")
    return f"{status}: {_line(str(told))}" if str(told).strip() else status


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    seconds = error.headers.get("Retry-After", "")
    return min(float(seconds), _LONGEST_WAIT) if seconds.isascii() and seconds.isdigit() else None


def _lost(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "doesn't answer in time"
    return f"can't be reached: {_line(getattr(error, 'strerror', None) or str(error) or type(error).__name__)}"


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."
