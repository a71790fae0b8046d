"""Training data as tokens. Each token is marked as part of a prompt or of a response.

    examples, too_long = read_examples("train.jsonl", tokenizer, max_length=4096)
    batch = Collator(tokenizer.pad_token_id)(examples[:4])

A record of the JSON Lines or Parquet file has one of these forms:

- prompt, answer: strings. An optional question is appended to the prompt. If the answer is a list, the first element
is used. `eval` reads and `distill` writes files of this form.
- messages: a conversation as a list of {"role", "content"}. The model learns the responses of the assistant.

Prompts and messages are formatted with the model's chat template. A response is tokenized separately from the prompt,
as in generation. The response includes the token that ends the turn.
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
from swaa_edge.files.records import present, read_records, sound, text
from swaa_edge.generate.prompts import PLAIN_END, asked
from swaa_edge.layers import shown

_FIELDS = ("prompt", "question", "answer", "messages")
#: The label of a token that the loss ignores.
IGNORED = -100


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A record of the data file as tokens.

    tokens: the tokens of the whole conversation.
    generated: for each token, whether the token belongs to a response. Only response tokens count in the loss. They
        see the same tokens as in decode.
    source: the record's place in the file, for error messages.
    """

    tokens: list[int]
    generated: list[bool]
    source: str = ""


def read_examples(
    path: str | os.PathLike[str], tokenizer: Any, *, max_length: int, chat: bool = True
) -> tuple[list[Example], int]:
    """Return the examples in a file, in file order, and the number of records left out.

    tokenizer: a tokenizer of transformers.
    max_length: maximum length in tokens. Longer records are left out, since a truncated prompt may lack the facts for
        the answer.
    chat: whether to use the chat template instead of plain text.

    Raises `DataFileError` if no record is left or a record is invalid. The message names the line of an invalid record.
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
        if too_long:
            what = f"all {too_long} records have more than {max_length} tokens; raise --max-length, or shorten them"
        else:
            what = "it has no records; write one object per line"
        raise DataFileError(f"{path} has no training examples: {what}")
    return kept, too_long


class Collator:
    """Turns examples into a batch for a model under `swaa_edge.hf`. The batch is padded on the right.

    All tensors are [batch, tokens]. input_ids, attention_mask and labels are int64, and decode_mask is bool.
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
    """Turns records into tokens."""

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
        for part, is_response in parts:
            made = self._tokenizer.encode(part, add_special_tokens=False)
            tokens += made
            generated += [is_response] * len(made)
        if not any(generated):
            raise DataFileError(f"{source}: no response to learn; give an answer, or messages of an assistant")
        return Example(tokens, generated, source)

    def _plain(self, source: str, record: dict[str, Any]) -> list[tuple[str, bool]]:
        """Return the prompt and the answer as pairs (text, is_response)."""
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
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            return self._turns(source, messages)
        # The start token, if the tokenizer puts this token before a text.
        bos = self._tokenizer.bos_token_id
        start = self._tokenizer.bos_token if bos is not None and self._tokenizer.encode("a")[:1] == [bos] else ""
        return [(f"{start}{content}{PLAIN_END}", False), (answer + (self._tokenizer.eos_token or ""), True)]

    def _turns(self, source: str, messages: Any) -> list[tuple[str, bool]]:
        """Return a conversation as pairs (text, is_response), in order.

        A response is the text that the template adds for one more message.
        """
        messages = self._checked(source, messages)
        parts: list[tuple[str, bool]] = []
        written = ""
        responses = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        for at in responses:
            before = self._render(source, messages[:at], True)
            after = self._render(source, messages[: at + 1], False)
            if not before.startswith(written) or not after.startswith(before):
                # The template drops the reasoning of earlier turns. Only the last response is complete.
                if at != responses[-1]:
                    continue
                written, parts = "", []
                if not after.startswith(before):
                    raise DataFileError(f"{source}: the model's chat template does not put a response after its prompt")
            if len(before) > len(written):
                parts.append((before[len(written) :], False))
            response = self._generated(after[len(before) :])
            parts.append((response, True))
            written = before + response
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

    def _render(self, source: str, messages: Sequence[dict[str, str]], generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            what = " ".join(str(error).split())
            raise DataFileError(f"{source}: the model's chat template rejects this record: {what}") from error

    def _generated(self, rendered: str) -> str:
        """Remove the line break that a template may add after the end token of a response."""
        bare = rendered.rstrip()
        return bare if any(bare.endswith(token) for token in self._special) else rendered


def split(examples: Sequence[Example], val_fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split examples at random into training and validation examples.

    val_fraction: fraction of validation examples, at least 0 and less than 1.

    Examples with the same prompt stay together. Raises `ConfigError` for a fraction out of range.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"val_fraction = {val_fraction} must be at least 0 and less than 1")
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        prompt = example.tokens[: example.generated.index(True)]
        groups.setdefault(tuple(prompt), []).append(example)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    expected = max(1, round(val_fraction * len(examples))) if val_fraction and len(order) > 1 else 0
    validation: list[Example] = []
    while len(validation) < expected and len(order) > 1:
        validation += order.pop(0)
    return [example for group in order for example in group], validation
