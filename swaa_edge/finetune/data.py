"""Training data as tokens, each of which is known to be a prompt's or a reply's.

    examples = read_examples("train.jsonl", tokenizer, max_length=4096)
    batch = Collator(tokenizer.pad_token_id)(examples.kept[:4])

A record of the JSON Lines or Parquet file has one of these forms:

- prompt, answer: strings; question may stand beside them, as in the files that `eval` reads, and is then put behind
  the prompt. `distill` writes such files. Of a list of answers, the first is taken.
- messages: a conversation, a list of {"role", "content"}; every reply of the assistant is learned.

The model's chat template goes around them. A reply is what the engine would have generated: it's tokenized apart from
its prompt, up to the token that ends the turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from swaa_edge.errors import ConfigError, DataFileError
from swaa_edge.evaluate.datafile import to_ask
from swaa_edge.evaluate.prompts import PLAIN_END, asked
from swaa_edge.files.records import present, read_records, sound, text
from swaa_edge.layers import shown

_FIELDS = ("prompt", "question", "answer", "messages")
#: What the loss passes over.
IGNORED = -100


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """tokens: the whole of a conversation. generated: for each, whether it is of a reply; those are learned, and
    decode. source: where the record stands, for errors."""

    tokens: list[int]
    generated: list[bool]
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Examples:
    """kept: in the file's order. too_long: how many records had more tokens than was allowed."""

    kept: list[Example]
    too_long: int


def read_examples(path: str | os.PathLike[str], tokenizer: Any, *, max_length: int, chat: bool = True) -> Examples:
    """The examples of a file. tokenizer: transformers'. max_length: tokens; longer records are left out, since a prompt
    that is cut no longer holds what its answer needs. chat: False goes without the chat template.

    Raises `DataFileError` naming the line of a record that is wrong, and if none is left.
    """
    path, kept, too_long = Path(path), [], 0
    writer = _Writer(tokenizer, chat)
    with contextlib.closing(read_records(path, _FIELDS)) as records:
        for _, source, record in records:
            example = writer.example(source, record)
            if len(example.tokens) > max_length:
                too_long += 1
            else:
                kept.append(example)
    if not kept:
        what = f"none of its {too_long} records has at most {max_length} tokens" if too_long else "it holds no record"
        advice = "raise --max-length, or shorten the prompts" if too_long else "write one object per line"
        raise DataFileError(f"there is nothing to learn in {path}: {what}; {advice}")
    return Examples(kept, too_long)


class Collator:
    """Makes a batch of examples: what a model under `swaa_edge.hf` takes, padded on the right.

    input_ids, attention_mask, labels int64 and decode_mask bool, all [batch, tokens].
    """

    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        width = max(len(example.tokens) for example in examples)

        def stacked(rows: Sequence[Sequence[Any]], fill: Any) -> torch.Tensor:
            return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

        tokens = stacked([example.tokens for example in examples], self._pad)
        generated = stacked([example.generated for example in examples], False)
        return {
            "input_ids": tokens,
            "attention_mask": stacked([[1] * len(example.tokens) for example in examples], 0),
            "labels": torch.where(generated, tokens, IGNORED),
            "decode_mask": generated,
        }


class _Writer:
    """Records as tokens, by one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        self._tokenizer = tokenizer
        self._chat = chat and bool(tokenizer.chat_template)
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._special = {*added, *tokenizer.all_special_tokens}

    def example(self, source: str, record: Any) -> Example:
        if not isinstance(record, dict):
            raise DataFileError(f"{source}: {shown(record)} must be an object with prompt and answer, or messages")
        tokens: list[int] = []
        generated: list[bool] = []
        messages = record.get("messages")
        parts = self._plain(source, record) if messages is None else self._turns(source, messages)
        for part, reply in parts:
            made = self._encode(part)
            tokens += made
            generated += [reply] * len(made)
        if not any(generated):
            raise DataFileError(f"{source}: nothing of it is a reply; give an answer, or messages of an assistant")
        return Example(tokens, generated, source)

    def _plain(self, source: str, record: dict[str, Any]) -> list[tuple[str, bool]]:
        """Prompt and answer, as texts, the second of which is a reply."""
        question = text(source, record, "question") if record.get("question") not in (None, "") else ""
        prompt = text(source, record, "prompt")
        content = asked(prompt, to_ask(prompt, question))
        answer = present(source, record, "answer")
        if isinstance(answer, list) and answer:
            answer = answer[0]
        if not isinstance(answer, str):
            raise DataFileError(f"{source}: answer = {shown(answer)} must be a string")
        answer = sound(source, "answer", answer)
        if self._chat:
            said = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            return self._turns(source, said)
        start = self._tokenizer.bos_token if self._starts() else ""
        return [(f"{start}{content}{PLAIN_END}", False), (answer + (self._tokenizer.eos_token or ""), True)]

    def _turns(self, source: str, messages: Any) -> list[tuple[str, bool]]:
        """The texts of a conversation in order; which of them are replies shows where rendering one more adds it."""
        messages = self._checked(source, messages)
        parts: list[tuple[str, bool]] = []
        written = ""
        replies = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        for at in replies:
            before = self._render(source, messages[:at], True)
            after = self._render(source, messages[: at + 1], False)
            if not before.startswith(written) or not after.startswith(before):
                # A template that leaves out what was thought in earlier turns: only the last reply stands as it was.
                if at != replies[-1]:
                    continue
                written, parts = "", []
                if not after.startswith(before):
                    raise DataFileError(f"{source}: the model's chat template does not put replies behind prompts")
            if len(before) > len(written):
                parts.append((before[len(written) :], False))
            reply = self._ended(after[len(before) :])
            parts.append((reply, True))
            written = before + reply
        return parts

    def _checked(self, source: str, messages: Any) -> list[dict[str, str]]:
        if not self._chat:
            raise DataFileError(
                f"{source}: messages need a chat template, which the model lacks; give prompt and answer"
            )
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise DataFileError(f'{source}: messages must be a list of {{"role", "content"}}')
        for number, message in enumerate(messages, 1):
            place = f"{source}: message {number}"
            text(place, message, "role"), text(place, message, "content")
        return messages

    def _render(self, source: str, messages: Sequence[dict[str, str]], answering: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            what = " ".join(str(error).split())
            raise DataFileError(f"{source}: the model's chat template refuses it: {what}") from error

    def _ended(self, reply: str) -> str:
        """A reply as far as it is generated: a template may put a line's end behind the token that ends the turn."""
        bare = reply.rstrip()
        return bare if any(bare.endswith(token) for token in self._special) else reply

    def _encode(self, part: str) -> list[int]:
        return self._tokenizer.encode(part, add_special_tokens=False)

    def _starts(self) -> bool:
        """Whether the tokenizer puts its start token before a text."""
        bos = self._tokenizer.bos_token_id
        return bos is not None and self._tokenizer.encode("a")[:1] == [bos]


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples to learn from, and a random `share` of them (0 to under 1) held back to measure the loss on.

    Several replies to one prompt stay together. Raises `ConfigError` for another share.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"the share of records to hold back, {share}, must be from 0 to under 1")
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        prompt = example.tokens[: example.generated.index(True)]
        groups.setdefault(tuple(prompt), []).append(example)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted = max(1, round(share * len(examples))) if share and len(order) > 1 else 0
    held: list[Example] = []
    while len(held) < wanted and len(order) > 1:
        held += order.pop(0)
    return [example for group in order for example in group], held
