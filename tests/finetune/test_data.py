"""Training data: which tokens belong to prompts and which to responses, by record form and chat template."""

import json

import pytest
import torch

from support.models import tiny_tokenizer
from swaa_edge.errors import ConfigError, DataFileError
from swaa_edge.finetune.data import Collator, Example, read_examples, split
from swaa_edge.generate.prompts import PLAIN_END


@pytest.fixture
def write(tmp_path):
    def written(*records, name="data.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    return written


def read(file, tokenizer=None, **options):
    return read_examples(file, tokenizer or tiny_tokenizer(), **{"max_length": 1000} | options)


def parts(example: Example, tokenizer=None) -> list[tuple[str, bool]]:
    """An example as text, in runs of prompt and response."""
    decode, found = (tokenizer or tiny_tokenizer()).decode, []
    for token, generated in zip(example.tokens, example.generated, strict=True):
        if not found or found[-1][1] != generated:
            found.append(([], generated))
        found[-1][0].append(token)
    return [(decode(tokens), generated) for tokens, generated in found]


def test_a_prompt_and_its_answer(write):
    (example,), _ = read(write({"prompt": "A text.", "question": "What is it?", "answer": " A text"}))
    assert parts(example) == [
        ("<|im_start|>user\nA text.\n\nWhat is it?<|im_end|>\n<|im_start|>assistant\n", False),
        # What a template adds after the end of the turn is not generated.
        (" A text<|im_end|>", True),
    ]
    assert example.source.endswith("data.jsonl:1")


def test_a_prompt_is_tokenized_as_it_will_be_asked(write):
    # Tokenized as one text, "assistant\n" and the first line end of the response would become one token.
    (example,), _ = read(write({"prompt": "p", "answer": "\n\nyes"}))
    start = "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
    encode = lambda text: tiny_tokenizer().encode(text, add_special_tokens=False)  # noqa: E731
    assert example.tokens == encode(start) + encode("\n\nyes<|im_end|>")


def test_a_question_in_the_prompt_is_not_asked_again(write):
    record = {"prompt": "A text. What is it? Be brief.", "question": "What is it?", "answer": "A text"}
    (example,), _ = read(write(record))
    assert parts(example)[0][0].count("What is it?") == 1


def test_every_response_of_a_conversation(write):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Nothing"},
        {"role": "user", "content": "Well"},
    ]
    (example,), _ = read(write({"messages": messages}))
    assert parts(example) == [
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hi<|im_end|>", True),
        ("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Nothing<|im_end|>", True),
    ]


def test_a_template_that_drops_earlier_reasoning_teaches_the_last_response(write):
    tokenizer = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "hm</think>one"},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "so</think>two"},
    ]
    (example,), _ = read(write({"messages": messages}), tokenizer)
    (before, first), (response, second) = parts(example, tokenizer)
    assert (first, second) == (False, True)
    assert "hm" not in before and before.endswith("2?<|im_end|>\n<|im_start|>assistant\n")
    assert response == "so</think>two<|im_end|>"


def test_plain_text_without_a_template(write):
    file = write({"prompt": "A text.", "question": "What?", "answer": " It"})
    (example,), _ = read(file, chat=False)
    assert parts(example) == [(f"A text.\n\nWhat?{PLAIN_END}", False), (" It<|endoftext|>", True)]
    with pytest.raises(DataFileError, match=r"data.jsonl:1: messages need a chat template"):
        read(write({"messages": []}), chat=False)


def test_long_records_are_left_out_and_counted(write):
    short, long = {"prompt": "p", "answer": "a"}, {"prompt": "word " * 200, "answer": "a"}
    examples, too_long = read(write(short, long, short), max_length=60)
    assert len(examples) == 2 and too_long == 1
    with pytest.raises(DataFileError, match="all 1 records have more than 60 tokens; raise --max-length"):
        read(write(long), max_length=60)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (7, "7 must be an object with prompt and answer, or messages"),
        ({"answer": "a"}, "the field prompt is missing; the record has answer"),
        ({"prompt": "p"}, "the field answer is missing; the record has prompt"),
        ({"prompt": "p", "answer": 7}, "answer = 7 must be a string"),
        ({"prompt": " ", "answer": "a"}, "prompt is empty"),
        ({"messages": "hello"}, 'messages must be a list of {"role", "content"}'),
        ({"messages": [{"role": "user"}]}, "message 1: the field content is missing; the record has role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no response to learn"),
    ],
)
def test_an_invalid_record_is_named_by_its_line(write, record, message):
    with pytest.raises(DataFileError, match=r"data.jsonl:2: ") as caught:
        read(write({"prompt": "p", "answer": "a"}, record))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_file(write):
    with pytest.raises(DataFileError, match="it has no records"):
        read(write())


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}]
    parquet.write_table(pyarrow.table({"messages": [messages], "other": [1]}), tmp_path / "data.parquet")
    (example,), _ = read(tmp_path / "data.parquet")
    assert parts(example)[-1] == ("one<|im_end|>", True)


def test_a_batch():
    batch = Collator(9)([Example([1, 2, 3], [False, False, True]), Example([4, 5], [False, True])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 3], [-100, 5, -100]]
    assert batch["decode_mask"].tolist() == [[False, False, True], [False, True, False]]
    assert batch["decode_mask"].dtype == torch.bool


def test_split_holds_out_a_random_fraction():
    examples = [Example([i, 1], [False, True]) for i in range(40)]
    learned, held = split(examples, 0.1, seed=3)
    assert len(held) == 4 and {e.tokens[0] for e in learned + held} == set(range(40))
    assert split(examples, 0.1, seed=3)[1] == held and split(examples, 0.1, seed=4)[1] != held
    assert split(examples, 0, seed=3)[1] == [] and len(split(examples[:2], 0.01, seed=3)[1]) == 1
    assert split(examples[:1], 0.5, seed=3)[1] == []
    # Responses to one prompt are all trained on, or all held out.
    several = [Example([i // 4, i], [False, True]) for i in range(40)]
    learned, held = split(several, 0.2, seed=3)
    assert len(held) == 8 and not {e.tokens[0] for e in learned} & {e.tokens[0] for e in held}
    with pytest.raises(ConfigError, match="val_fraction = 1 must be at least 0 and less than 1"):
        split(examples, 1, seed=3)
