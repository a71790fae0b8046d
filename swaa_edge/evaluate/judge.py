"""A scorer that asks another model whether a response is correct.

A correct answer can have many wordings, and a comparison of texts does not recognize all of them. The judge can be any
server with OpenAI's protocol: `swaa-edge serve`, llama.cpp, Ollama or a hosted service. The `openai` package sends the
requests and retries them after a failure.

    judge = Judge("http://localhost:8000/v1", "judge-model"); judge(sample, "It was Ann.")
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from typing import Any

from swaa_edge.errors import ConfigError, GenerationError
from swaa_edge.evaluate.samples import Sample
from swaa_edge.evaluate.scoring import final

#: The prompt for the judge, with the fields {question}, {answers} and {reply}.
TEMPLATE = """\
Below are a question about a long text, the reference answer, and somebody's reply.
Is the reply right? It is if it says what the reference answer says, in whatever words, and nothing against it. If \
there are several reference answers, the reply needs all of them. You don't need the text itself.

Question: {question}

Reference answer: {answers}

Reply: {reply}

Say "yes" if the reply is right and "no" if it isn't, and nothing else."""

#: Number of retries after a temporary failure. The waits take 23 s in all, unless the server sends Retry-After. A
#: server that is loading its model may need that time.
RETRIES = 6

_AGAIN = 'Say "yes" or "no" only: is the reply right?'
_FIELDS = re.compile(r"\{(question|answers|reply)\}")


class Judge:
    """A scorer that asks a model (at temperature 0) whether a response is correct.

    base_url: address of the server, such as "http://host:port/v1".
    model: name of the model on the server.
    timeout: seconds to wait for a connection or for data.

    The API key comes from the environment variable OPENAI_API_KEY. If the variable is not set, no key is sent.
    A response without text after the reasoning is wrong. The judge is not asked about such a response.

    The constructor raises `ConfigError` for an invalid address or key, or if the `openai` package is missing. A call
    raises `GenerationError` if the judge gives no verdict.
    """

    def __init__(self, base_url: str, model: str, *, timeout: float = 120.0) -> None:
        base = _base(base_url)
        self.address, self.model = f"{base}/chat/completions", model
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                "OPENAI_API_KEY contains characters that are not allowed in a key; set it to the key alone"
            )
        try:
            import openai
        except ImportError as error:
            raise ConfigError("a judge needs the package openai; pip install 'swaa-edge[judge]'") from error
        # The client requires a key. Without one, the header is omitted, and the client gets a placeholder.
        self._headers = {} if key else {"Authorization": openai.Omit()}
        self._client = openai.OpenAI(
            base_url=base,
            api_key=key or "none",
            timeout=timeout,
            max_retries=RETRIES,
            default_headers={"User-Agent": "swaa-edge"},
            # A redirected POST would lose its body.
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

    def __call__(self, sample: Sample, response: str) -> bool:
        text = final(response)
        if not text:
            return False
        question, answers = sample.question or "(part of the text)", "; ".join(sample.answers)
        values = {"question": question, "answers": answers, "reply": text}
        messages = [{"role": "user", "content": _FIELDS.sub(lambda field: values[field[1]], TEMPLATE)}]
        answer = self._ask(messages)
        verdict = verdict_of(answer)
        if verdict is None:
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": _AGAIN}]
            answer = self._ask(messages)
            verdict = verdict_of(answer)
        if verdict is None:
            raise GenerationError(f'{self} answers neither yes nor no but "{_line(answer)}"; use another judge')
        return verdict

    def _ask(self, messages: list[Any]) -> str:
        import openai

        try:
            # The raw response, because the client does not check the body.
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, temperature=0, extra_headers=self._headers
            )
        except openai.APIStatusError as error:
            raise GenerationError(f"{self} {_refusal(error)}") from error
        except openai.APITimeoutError as error:
            raise GenerationError(f"{self} didn't answer in time{_retries(error)}") from error
        except openai.APIConnectionError as error:
            reason = _line(str(error.__cause__ or error))
            raise GenerationError(f"{self} can't be reached: {reason}{_retries(error)}") from error
        return self._content(raw.content)

    def _content(self, data: bytes) -> str:
        try:
            content = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            text = _line(data[:1000].decode("utf-8", "replace"))
            raise GenerationError(
                f'{self} does not return a chat completion but "{text}"; check the address, up to /v1'
            ) from error
        return content if isinstance(content, str) else ""

    def __str__(self) -> str:
        return f"the judge {self.model} at {self.address}"


def verdict_of(answer: str) -> bool | None:
    """Return True if the answer begins or ends with yes, False for no, None for neither or both. Skips reasoning."""
    words = re.findall(r"\w+", final(answer).casefold())
    found = {word for word in (*words[:1], *words[-1:]) if word in ("yes", "no")}
    return found.pop() == "yes" if len(found) == 1 else None


def _base(base_url: str) -> str:
    """Check a server's address, and return it without /chat/completions."""
    base = base_url.strip().rstrip("/").removesuffix("/chat/completions")
    try:
        parts = urllib.parse.urlsplit(base)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not base.isascii() or not base.isprintable() or " " in base or parts.query or parts.fragment:
        raise ConfigError(f"{base_url!r} must be an address such as http://localhost:8000/v1")
    if parts.username is not None:
        raise ConfigError("a judge's address must not contain a user name; put the key into OPENAI_API_KEY")
    return base


def _refusal(error: Any) -> str:
    """Return the text of an `openai.APIStatusError`, with advice for the user."""
    response = error.response
    try:
        message = response.json()["error"]
        message = message["message"] if isinstance(message, dict) else message
    except (ValueError, LookupError, TypeError, RecursionError):
        message = response.text
    target = response.headers.get("Location")
    text = f"answers {error.status_code} {response.reason_phrase}".rstrip() + (f" to {target}" if target else "")
    if str(message).strip():
        text += f": {_line(str(message))}"
    hints = {401: "; set OPENAI_API_KEY", 404: "; check the address, up to /v1, and the model's name"}
    return text + _retries(error) + hints.get(error.status_code, "")


def _retries(error: Any) -> str:
    # The client numbers its requests in this header.
    count = error.request.headers.get("x-stainless-retry-count", "0")
    return "" if count == "0" else f", after {count} retries"


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."
