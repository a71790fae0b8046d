"""Fake vocabularies, chat templates and an engine, for tests of code that asks a model and counts its answers.

The engine looks up the answer in the part of the prompt that its configuration can see, and reports made-up times. So
the results of full attention and of a window are known without a model or the library.

    prompts = fake_prompts(PIECES, "system"); text = prompts.read(tokens)
"""

import contextlib
import re
from types import SimpleNamespace

from support.fakes.gguf_bytes import kv, model
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.generate.prompts import Prompts

#: Patterns of one token.
WORDS, PIECES, CHARACTERS = r"\s*\S+|\s+$", r" ?[A-Za-z]{1,4}|\d|\s|[^\sA-Za-z\d]", r"(?s)."
#: Chat templates by name; None is a model without one.
TEMPLATES = {
    "plain": None,
    "chat": "<|user|>{}<|end|><|assistant|>",
    "system": "<|system|>You answer questions about long texts, and you are brief.<|end|><|user|>\n{} [/ask]\n",
}
_SPECIAL = re.compile(r"(<\|[a-z_]+\|>)")


class Vocabulary:
    """Replaces llama_cpp's model: a token per match of a pattern; <|names|> are special tokens if requested."""

    def __init__(self, pattern):
        self._pattern, self._ids, self.names = re.compile(pattern), {}, []

    def _id(self, text, special=False):
        if (text, special) not in self._ids:
            self._ids[text, special] = len(self.names)
            self.names.append(text)
        return self._ids[text, special]

    def tokenize(self, data, start, special):
        found = [self._id("<|begin|>", True)] if start else []
        for at, part in enumerate(_SPECIAL.split(data.decode()) if special else [data.decode()]):
            found += [self._id(part, True)] if at % 2 else map(self._id, self._pattern.findall(part))
        return found

    def token_get_text(self, token):
        return self.names[token]

    def special(self, name):
        return self._id(name, True)


class FakePrompts(Prompts):
    """`Prompts` without a model file: everything but the vocabulary and the template is the real thing."""

    def __init__(self, pattern, template):
        self._path, self._stack, self._spaced = "model.gguf", contextlib.ExitStack(), False
        self._system, self._advice = None, "use --no-chat"
        self._vocabulary, self._template = Vocabulary(pattern), template
        self._format = template and self._fill
        self.chat = template is not None

    def _fill(self, messages):
        (message,) = messages
        assert message["role"] == "user"
        return SimpleNamespace(prompt=self._template.replace("{}", message["content"]))

    def read(self, tokens):
        return "".join(self._vocabulary.names[token] for token in tokens)

    def special(self, name):
        return self._vocabulary.special(name)

    def token_at(self, tokens, place):
        """The token, counted from 0, that holds the character at `place` of the text."""
        end = 0
        for at, token in enumerate(tokens):
            end += len(self._vocabulary.names[token])
            if end > place:
                return at
        raise AssertionError(f"no character {place} in {end}")


def fake_prompts(pattern=PIECES, template="chat"):
    return FakePrompts(pattern, TEMPLATES[template])


def answer(seen, question):
    """The response to a built-in question of a model that sees the text `seen`; "I don't know." if it isn't there."""
    codes = dict(re.findall(r"The code of (\w+) is (\w+)\.", seen))
    if key := re.search(r'value of "(\w+)"', question):
        value = re.search(rf'"{key[1]}": (\d+)', seen)
        return f' "{key[1]}": {value[1]}' if value else " I don't know."
    names = re.search(r"codes? of (\w+)(?: and (\w+))?\?", question)
    found = []
    for name in filter(None, names.groups() if names else ()):
        while name in codes:
            name = codes[name]
        found.append(name)
    if not found or not all(value.isdigit() for value in found):
        return " I don't know."
    return f" It is {' and '.join(found)}."


class Reader:
    """Replaces SwaaLlama. A prompt token takes a thousandth of a second, under a window half of that."""

    open = 0
    loaded = ()  # of (configuration, size of the context)
    asked = ()  # of (configuration, question)
    fail_at = None  # (number of the question, exception)

    def __init__(self, prompts, config, n_ctx, responses=None):
        self._prompts, self._config, self._n_ctx, self._responses = prompts, config, n_ctx, responses or {}
        self._cache = []
        self.n_tokens = 0
        Reader.open += 1
        Reader.loaded = (*Reader.loaded, (config, n_ctx))

    def close(self):
        Reader.open -= 1

    def reset(self):
        self._cache = []

    def cancel(self):
        pass

    def eval(self, tokens):
        self._cache, self.n_tokens = list(tokens), len(tokens)

    def create_completion(self, prompt, *, max_tokens, temperature):
        assert isinstance(prompt, list) and temperature == 0 and len(prompt) + max_tokens <= self._n_ctx
        if Reader.fail_at and Reader.fail_at[0] == len(Reader.asked):
            raise Reader.fail_at[1]
        text, config = self._prompts.read(prompt), self._config
        question = text[text.rindex("\n\n") :]
        Reader.asked = (*Reader.asked, (config, question.strip()))
        # Only tokens after the first one are decoded.
        decodes = config and config.fa_decode and " only" not in question
        hidden = range(0)
        if config and not decodes:
            hidden = range(config.sink_count, len(prompt) - config.window_size)
        seen = self._prompts.read(token for at, token in enumerate(prompt) if at not in hidden)
        reused, self._cache = 0, self._cache[: self.n_tokens]
        while reused < min(len(prompt) - 1, len(self._cache)) and prompt[reused] == self._cache[reused]:
            reused += 1
        self._cache, self.n_tokens = list(prompt), len(prompt)
        speed = 2000 if config else 1000
        count = len(prompt) - reused
        self.last_timings = SimpleNamespace(
            reused_tokens=reused,
            prefill_seconds=count / speed,
            generated_tokens=5,
            decode_seconds=0.5 if config else 1.0,
        )
        given = next((text for part, text in self._responses.items() if part in question), None)
        return {"choices": [{"text": given or answer(seen, question)}]}


def forget_runs(monkeypatch):
    """Reset the record of what `Reader`s did."""
    for name, value in {"open": 0, "loaded": (), "asked": (), "fail_at": None}.items():
        monkeypatch.setattr(Reader, name, value)


def fake_engine(monkeypatch, cache):
    """Replace engine and vocabulary of `evaluate.compare`, and keep its journals in the folder `cache`.

    In the result, responses: by a part of the question; cache: the folder of journals; engines: what was loaded.
    """
    forget_runs(monkeypatch)
    state = SimpleNamespace(prompts=None, responses={}, cache=cache / "swaa-edge", engines=[])

    def prompts(path, *, chat=True):
        state.prompts = fake_prompts(WORDS, "chat" if chat else "plain")
        return state.prompts

    def load(engine, path, *, swaa, n_ctx):
        state.engines.append((engine, str(path)))
        return Reader(state.prompts, swaa, n_ctx, state.responses)

    monkeypatch.setattr("swaa_edge.generate.prompts.Prompts", prompts)
    monkeypatch.setattr(EngineSettings, "load", load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return state


def write_model(path, *keys):
    """A model file of four layers and a context of 4096 tokens, which no engine could run."""
    path.write_bytes(model(extra=[kv("tokenizer.ggml.model", "str", "none"), *keys]))
    return path
