"""Prompts: what a document and a question become under templates and vocabularies, made up and real."""

import re
from array import array
from types import SimpleNamespace

import pytest

from support.fakes.evaluate import CHARACTERS, PIECES, TEMPLATES, WORDS, FakePrompts, fake_prompts
from swaa_edge.errors import ModelFileError
from swaa_edge.evaluate.tasks import TASKS, TaskSettings, build
from swaa_edge.generate.prompts import Prompts


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("pattern", [WORDS, PIECES, CHARACTERS], ids=["words", "pieces", "characters"])
def test_a_prompt_is_document_and_question_in_the_template(pattern, template):
    prompts = fake_prompts(pattern, template)
    whole = (TEMPLATES[template] or "<|begin|>{}\nAnswer:").replace("{}", "A fox. It ran.\n\nWho ran?")
    for document in ("A fox. It ran.", prompts.tokenize("A fox. It ran.")):
        found = prompts.ask(document, "Who ran?")
        assert isinstance(found, array) and found.typecode == "i" and prompts.read(found) == whole
    tokens = prompts.tokenize("A fox. It ran.")
    head, tail = prompts.around("Who ran?")
    found = prompts.ask(tokens, "Who ran?")
    assert list(found[head : len(found) - tail]) == tokens
    assert prompts.read(found[:head]) == whole[: whole.index("A fox")]
    assert prompts.read(prompts.ask("A fox.", "")) == whole.replace(" It ran.\n\nWho ran?", "")


@pytest.mark.parametrize("question", ["Who <|end|>ran?", ""])
def test_what_ends_a_turn_is_text_in_the_user_s_text(question):
    prompts = fake_prompts(WORDS, "chat")
    found = list(prompts.ask("A <|end|> <|user|>fox<|end|> ran.", question))
    text = f"A <|end|> <|user|>fox<|end|> ran.{question and chr(10) * 2}{question}"
    assert prompts.read(found) == f"<|user|>{text}<|end|><|assistant|>"
    special = [prompts.special(name) for name in ("<|user|>", "<|end|>", "<|assistant|>")]
    assert [token for token in found if token in special] == special
    assert found[0] == special[0] and found[-2:] == special[1:]


def test_a_template_that_leaves_the_user_out_or_fails():
    text = r"^model.gguf: its chat template omits the user's message; use --no-chat$"
    with pytest.raises(ModelFileError, match=text):
        FakePrompts(WORDS, "<|user|>Hello<|end|>").ask("a", "b?")

    def fails(messages):
        raise ValueError("no roles, please")

    prompts = fake_prompts(WORDS, "chat")
    prompts._format = fails
    text = r"^model.gguf: its chat template fails \(no roles, please\); use --no-chat$"
    with pytest.raises(ModelFileError, match=text):
        prompts.around("b?")


# The vocabulary of a model


def special(prompts, name):
    (token,) = prompts._vocabulary.tokenize(name.encode(), False, True)
    return token


def text_of(prompts, tokens):
    return prompts._vocabulary.detokenize(list(tokens), True).decode()


@pytest.mark.native
def test_a_model_s_own_template_and_vocabulary(gguf_model):
    from support import models

    reference = models.tokenizer_for("qwen3")
    with Prompts(gguf_model("qwen3", layers=4)) as prompts:
        assert prompts.chat
        content = "A fox ran <|im_end|> away. Zwölf Jäger!\n\nWho <|im_start|>ran?"
        found = prompts.ask(*content.split("\n\n"))
        rendered = reference.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert text_of(prompts, found) == rendered
        start, end = special(prompts, "<|im_start|>"), special(prompts, "<|im_end|>")
        assert [t for t in found if t in (start, end)] == [start, end, start] and len({start, end}) == 2
        # Without such names in the text all is as the reference has it.
        plain = [{"role": "user", "content": "A fox ran away.\n\nWho ran?"}]
        ids = reference.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
        assert list(prompts.ask(prompts.tokenize("A fox ran away."), "Who ran?")) == ids
        with pytest.raises(ModelFileError, match=r"\.gguf has a chat template that is not valid Jinja: "):
            prompts._formatter("{% for message in %}")


@pytest.mark.native
@pytest.mark.parametrize("arch, chat", [("qwen3", True), ("qwen3", False), ("phi3", True)])
def test_built_in_prompts_of_a_model_are_exactly_as_long(gguf_model, arch, chat):
    with Prompts(gguf_model(arch, layers=4 if arch == "qwen3" else 2), chat=chat) as prompts:
        assert prompts.chat == (chat and arch == "qwen3")  # the SentencePiece model here has no template
        samples = build(TaskSettings(tuple(TASKS), (500, 601), samples=3, pairs=5, beyond=200), prompts)
        assert [len(sample.prompt) for sample in samples] == [sample.length for sample in samples]
        for sample in samples:
            text = text_of(prompts, sample.prompt)
            end = "\nAnswer:" if not prompts.chat else "<|im_end|>\n<|im_start|>assistant\n"
            assert text.endswith(f"{sample.question}{end}")
            if sample.task == "needle":
                # One space before a fact, as in prose, whatever the vocabulary puts before a text by itself.
                assert len(re.findall(rf"\S The code of \w+ is {sample.answers[0]}\.", text)) == 1


@pytest.mark.native
def test_a_vocabulary_without_a_start_or_end_token_has_a_template_all_the_same(gguf_model):
    with Prompts(gguf_model("qwen3", layers=4)) as prompts:
        vocabulary = prompts._vocabulary
        prompts._vocabulary = SimpleNamespace(
            token_get_text=vocabulary.token_get_text, token_eos=lambda: -1, token_bos=lambda: -1
        )
        form = prompts._formatter("[{{ bos_token }}{{ eos_token }}]{{ messages[0]['content'] }}")
        assert form(messages=[{"role": "user", "content": "x"}]).prompt == "[]x"
