"""Training the demo model: answers are in its data, the first layer looks back, an interrupted run ends the same."""

import itertools
import json
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
NOUNS = ("house", "river", "king", "queen", "road", "tower")
TEXT = "\n".join(f"The {a} of the {b} was seen, they said. It went on." for a, b in itertools.permutations(NOUNS, 2))


@pytest.fixture(scope="module")
def scripts():
    from demo import data, tokenizer, train

    return train, data, tokenizer


@pytest.fixture(scope="module")
def tokenizer(scripts):
    return scripts[2].make_tokenizer(TEXT)


def test_names_and_numbers_are_one_token_and_the_template_is_that_of_training(scripts, tokenizer):
    from swaa_edge.evaluate.facts import WORDS

    for piece in [f" {word}" for word in WORDS] + [f" {number}" for number in range(10, 100)]:
        assert len(tokenizer.encode(piece, add_special_tokens=False)) == 1, piece
    asked = [{"role": "user", "content": "Hm?"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == "<|begin|><|user|>Hm?<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("length", "mix"),
    [(64, (1, 0, 0)), (64, (0, 1, 0)), (384, (0.3, 0.2, 0.6)), (384, (0, 0, 0)), (1024, (0, 0, 0.1))],
)
def test_sequences_have_their_length_and_every_answer_occurs_before(scripts, tokenizer, length, mix):
    _, data, _ = scripts
    made = data.Data(tokenizer, TEXT, seed=5)
    answers = 0
    for _ in range(20):
        row = made.sequence(length, data.Mix(*mix))
        assert len(row.tokens) == len(row.weights) == len(row.tags) == length
        for place, (token, weight) in enumerate(zip(row.tokens, row.weights, strict=True)):
            if weight >= 1 and (token in made.numbers or token in made.names):
                answers += 1
                assert token in row.tokens[:place], tokenizer.decode(row.tokens)
    assert answers > 20


@pytest.mark.parametrize(("length", "mix"), [(64, (0, 1, 0)), (384, (0, 0, 1.0))])
def test_what_is_derived_follows_from_two_facts_before_it(scripts, tokenizer, length, mix):
    _, data, _ = scripts
    made = data.Data(tokenizer, TEXT, seed=6)
    tag, derived = data.TAGS.index("derived"), 0
    for _ in range(30):
        row = made.sequence(length, data.Mix(*mix))
        facts: dict[int, int] = {}
        for place in range(3, len(row.tokens)):
            name, before, token = row.tokens[place - 2 : place + 1]
            if before not in made._before:
                continue
            if row.weights[place] >= 1 and row.tags[place] == tag:
                derived += 1
                hops = 0
                while name in facts:
                    name, hops = facts[name], hops + 1
                assert name == token and hops >= 2, tokenizer.decode(row.tokens[: place + 1])
            else:
                facts.setdefault(name, token)
    assert derived > 30


def test_a_seed_gives_the_same_data_and_another_seed_others(scripts, tokenizer):
    _, data, _ = scripts
    mix = data.Mix(0.3, 0.1, 0.5)
    first, again, other = (data.Data(tokenizer, TEXT, seed).batch(128, 4, mix) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_the_first_layer_looks_back(scripts):
    train, _, _ = scripts
    torch.manual_seed(0)
    model = train.Qwen3ForCausalLM(train.Qwen3Config(vocab_size=512, **train.MODEL, attn_implementation="eager"))
    train.look_back(model)
    with torch.no_grad():
        attention = model(torch.randint(0, 512, (1, 64)), output_attentions=True).attentions[0][0]
    for head, back in enumerate(train.LOOK_BACK):
        for place in (20, 63):
            assert attention[head, place].argmax() == place - back
            assert attention[head, place, place - back] > 0.8


def test_an_interrupted_run_ends_with_the_same_weights(scripts, tmp_path, monkeypatch):
    train, data, _ = scripts
    monkeypatch.setattr(train, "training_text", lambda: TEXT)
    monkeypatch.setattr(train, "CURRICULUM", ((4, 384, 768), (4, 512, 512)))
    monkeypatch.setattr(train, "MODEL", train.MODEL | {"num_hidden_layers": 2})
    monkeypatch.setattr(train, "SAVED_EVERY", 3)
    monkeypatch.setattr(train, "lessons", lambda step: data.Mix(0.3, 0.1, 0.5))
    straight = train.Training(tmp_path / "straight", seed=3)
    straight.run()

    broken = train.Training(tmp_path / "broken", seed=3)
    makes = broken.data.batch
    calls = iter(range(100))
    monkeypatch.setattr(broken.data, "batch", lambda *a: makes(*a) if next(calls) < 5 else pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        broken.run()
    random.seed(99)
    resumed = train.Training(tmp_path / "broken", seed=3)
    assert resumed.step == 3
    resumed.run()
    for (name, a), b in zip(straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert steps == [7] and (tmp_path / "broken" / train.NAME / "model.safetensors").is_file()
