"""The demo model's tokenizer: byte-level BPE in which every name and every two-digit number is one token."""

from __future__ import annotations

from swaa_edge.evaluate.facts import WORDS

BOS, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
SIZE = 3072
#: llama.cpp's name of the pre-tokenizer.
PRE_TOKENIZER = "gpt-2"
#: Type of the shipped model's weights.
QUANTIZED = "Q8_0"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(text: str):
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = _tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[BOS, END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = [f" {word}" for word in WORDS] + [f'"{word}"' for word in WORDS]
    pieces += [f" {number}" for number in range(10, 100)]
    question = "what is the number behind the code of fox? Answer in a sentence:"
    pieces += [f' The code of fox is 47. {question} {{"fox": 47, "'] * 10
    tokenizer.train_from_iterator(text.splitlines(keepends=True) + pieces * 3000, trainer)
    made = _wrapped(tokenizer)
    for piece in pieces[:-10]:
        count = len(made.encode(piece, add_special_tokens=False))
        assert count == (3 if piece.startswith('"') else 1), (piece, made.tokenize(piece))
    return made


def tokenizer_of(path):
    """Return the demo model's tokenizer, read from the GGUF file at `path`."""
    from gguf import GGUFReader
    from tokenizers import models

    reader = GGUFReader(path)
    tokens, merges = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "merges"))
    vocabulary = {token: at for at, token in enumerate(tokens)}
    tokenizer = _tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.add_special_tokens([BOS, END, USER, ASSISTANT])
    return _wrapped(tokenizer)


def _tokenizer(model):
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrapped(tokenizer):
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
    made.chat_template = CHAT_TEMPLATE
    return made
