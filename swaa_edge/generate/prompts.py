"""Build prompts in tokens from a document and a question, with the model's chat template.

with Prompts("model.gguf") as prompts: tokens = prompts.ask(document, "What is the code of fox?")
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Sequence
from typing import Any

import jinja2

from swaa_edge.engine.tokenizer import open_vocabulary
from swaa_edge.errors import ModelFileError
from swaa_edge.files.model import read_model

# Placeholder for the document while the template is rendered. Templates don't change letters.
_MARK = "DOCUMENTSTANDSHERE"
#: Text after the question if there is no chat template.
PLAIN_END = "\nAnswer:"


class Prompts:
    """Builds prompts for a model. Only the vocabulary is loaded.

    path: a path or a `ModelFile`.
    chat: use the chat template. If false, or without a chat template, prompts are plain text.
    system: the system prompt, for the chat template only.
    advice: end of the error message if the template fails.

    Raises `ModelFileError` if the file has no vocabulary or an invalid template.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        chat: bool = True,
        system: str | None = None,
        advice: str = "use --no-chat",
    ) -> None:
        self._path, self._stack = os.fspath(path), contextlib.ExitStack()
        self._system, self._advice = system, advice
        header = read_model(path).header
        template = header.value("tokenizer.chat_template") if chat else None
        self._vocabulary = self._stack.enter_context(open_vocabulary(path))
        try:
            self._format = None if template is None else self._formatter(str(template))
        except BaseException:
            self._stack.close()
            raise
        self._spaced = _spaced(self._vocabulary)
        #: Whether a chat template is in use.
        self.chat = self._format is not None

    def __enter__(self) -> Prompts:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of `text`, without a start token. Names of special tokens are treated as text.

        Some vocabularies (SentencePiece) add a space before every text. A leading space in `text` is then not doubled.
        """
        text = text[1:] if self._spaced and text.startswith(" ") else text
        return self._vocabulary.tokenize(text.encode("utf-8"), False, False)

    def ask(self, document: str | Sequence[int], question: str) -> array[int]:
        """Return the tokens of a prompt with `document` and `question`: a user turn and the start of the answer.

        document: tokens or text. Tokens are inserted unchanged. The prompt then has `len(document)` tokens plus the
            numbers from `around`. Text is tokenized without special tokens, because a user's file may contain the text
            of an end-of-turn token.
        """
        if isinstance(document, str):
            head, tail = self._around("")
            return array("i", [*head, *self.tokenize(asked(document, question)), *tail])
        head, tail = self._around(question)
        return array("i", [*head, *document, *tail])

    def around(self, question: str) -> tuple[int, int]:
        """Return the numbers of tokens that `ask` puts before and after a document of tokens."""
        head, tail = self._around(question)
        return len(head), len(tail)

    def asking(self, question: str) -> int:
        """Return the number of tokens from the start of `question` to the end of the prompt."""
        return len(self.tokenize(question)) + self.around("")[1]

    @property
    def stops(self) -> list[str]:
        """Names of the tokens that end a text or a turn. A response also ends where the model spells out a name."""
        ends = (self._vocabulary.token_eos(), self._vocabulary.token_eot())
        return sorted({self._name(token) for token in ends} - {""})

    def _around(self, question: str) -> tuple[list[int], list[int]]:
        content = asked(_MARK, question)
        text = content + PLAIN_END if self._format is None else self._rendered(content)
        head, mark, tail = text.partition(_MARK)
        if not mark:
            raise ModelFileError(f"{self._path}: its chat template omits the user's message; {self._advice}")
        return self._special(head, self._format is None), self._special(tail, False)

    def _special(self, text: str, start: bool) -> list[int]:
        return self._vocabulary.tokenize(text.encode("utf-8"), start, True)

    def _rendered(self, content: str) -> str:
        system = [{"role": "system", "content": self._system}] if self._system else []
        try:
            return self._format(messages=[*system, {"role": "user", "content": content}]).prompt
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise ModelFileError(f"{self._path}: its chat template fails ({error}); {self._advice}") from error

    def _formatter(self, template: str) -> Any:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            return Jinja2ChatFormatter(
                template,
                eos_token=self._name(self._vocabulary.token_eos()),
                bos_token=self._name(self._vocabulary.token_bos()),
            )
        except jinja2.TemplateError as error:
            raise ModelFileError(f"{self._path} has a chat template that is not valid Jinja: {error}") from error

    def _name(self, token: int) -> str:
        """Return a token's text for templates. A missing token is -1 in llama.cpp and has the text ""."""
        return self._vocabulary.token_get_text(token) if token >= 0 else ""


def asked(document: str, question: str) -> str:
    """Return the user's message: the document and, unless empty, the question."""
    return f"{document}\n\n{question}" if question else document


def _spaced(vocabulary: Any) -> bool:
    """Return whether a vocabulary adds a space before every text."""
    tokens = vocabulary.tokenize(b"a", False, False)
    return bool(tokens) and vocabulary.token_get_text(tokens[0]).startswith("\u2581")
