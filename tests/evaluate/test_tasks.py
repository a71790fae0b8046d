"""The built-in tasks: lengths, places, contents and seeds of their prompts, by vocabularies that are made up."""

import itertools
import json
import random
import re

import pytest

from support.fakes.evaluate import CHARACTERS, PIECES, TEMPLATES, WORDS, fake_prompts
from swaa_edge.errors import ConfigError
from swaa_edge.evaluate import facts, haystack
from swaa_edge.evaluate.haystack import Haystack
from swaa_edge.evaluate.scoring import in_order
from swaa_edge.evaluate.tasks import TASKS, TaskSettings, build

VOCABULARIES = {"words": WORDS, "pieces": PIECES, "characters": CHARACTERS}
# Long enough for the small documents here, in each vocabulary.
LENGTH = {WORDS: 300, PIECES: 700, CHARACTERS: 1500}


def made_up_prose(sentences=400):
    """Numbered sentences of 4 to 12 words, none of them alike."""
    generator = random.Random(3)
    words = ["stone", "water", "grows", "never", "under", "a", "tall", "of", "turns", "slowly"]
    return " ".join(
        f"Line {number} {' '.join(generator.choices(words, k=generator.randint(2, 9)))} ends."
        for number in range(sentences)
    )


# A space first, as before each sentence, so that a text that wraps around has the same words.
PROSE = f" {made_up_prose()}"
SENTENCES = [f" {part}." for part in PROSE.strip().rstrip(".").split(". ")]
FACT = re.compile(r" The code of (\w+) is (\w+)\.")
OBJECT = re.compile(r"\n(\{.*?\})\n", re.DOTALL)


def settings(tasks=tuple(TASKS), **changed):
    return TaskSettings(**{"tasks": tasks, "samples": 10, "pairs": 5, "haystack": PROSE} | changed)


def parts(prompts, sample, template):
    """The text of a prompt: what stands before the document, the document, and what follows it."""
    text = prompts.read(sample.prompt)
    before, behind = (TEMPLATES[template] or "<|begin|>{}\nAnswer:").split("{}")
    behind = f"\n\n{sample.question}{behind}"
    assert text.startswith(before) and text.endswith(behind)
    return before, text[len(before) : len(text) - len(behind)], behind


def all_of(pattern, template, **changed):
    prompts = fake_prompts(pattern, template)
    return prompts, build(settings(**{"lengths": (LENGTH[pattern],)} | changed), prompts)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("pattern", VOCABULARIES.values(), ids=VOCABULARIES)
def test_prompts_have_exactly_the_requested_length(pattern, template):
    lengths = tuple(LENGTH[pattern] + more for more in (0, 1, 97))
    prompts, samples = all_of(pattern, template, lengths=lengths, samples=5)
    assert [(s.task, s.length) for s in samples] == [(t, n) for t in TASKS for n in lengths for _ in range(5)]
    assert [len(sample.prompt) for sample in samples] == [sample.length for sample in samples]
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        parts(prompts, sample, template)


@pytest.mark.parametrize("pattern", VOCABULARIES.values(), ids=VOCABULARIES)
def test_what_is_hidden_stands_between_sentences_of_the_prose(pattern):
    prompts, samples = all_of(pattern, "chat", samples=30)
    endless = "".join(SENTENCES) * 2
    for sample in samples:
        document = parts(prompts, sample, "chat")[1]
        hidden = OBJECT if sample.task == "kv" else FACT
        prose = hidden.sub("", document)
        # One run of the text, which starts with a sentence.
        assert prose in endless and re.match(r" Line \d", prose)
        for found in hidden.finditer(document):
            before, behind = document[: found.start()], document[found.end() :]
            assert before == "" or before.endswith((".", "\n")) or hidden.sub("", behind) == "", sample.id


def test_the_prose_starts_over_and_more_of_it_starts_alike():
    hay = Haystack(PROSE, fake_prompts(WORDS).tokenize)
    count = sum(map(len, hay.sentences))
    short, long = (hay.prose(random.Random(5), n) for n in (50, 2 * count + 7))
    assert sum(map(len, short)) == 50 and sum(map(len, long)) == 2 * count + 7
    assert long[: len(short) - 1] == short[:-1] and long[len(short) - 1][: len(short[-1])] == short[-1]
    assert long[len(hay.sentences)] == long[0]
    assert hay.prose(random.Random(6), 50) != short


def test_pieces_are_buried_in_the_order_of_their_places():
    hay = Haystack("a b. c d. e f. g h.", str.split)
    rng = random.Random(0)
    rng.randrange = lambda count: 0
    pieces = [(8, ["END"]), (3, ["X"]), (4, ["Y"]), (4, ["Y2"]), (3.9, ["Z"]), (0.5, ["TOO"]), (0, ["START"])]
    text = "START TOO a b. X Z c d. Y Y2 e f. g h. END"
    assert " ".join(hay.bury(rng, 15, pieces)) == text
    assert " ".join(hay.bury(rng, 14, pieces)) == text.replace("h. ", "")
    with pytest.raises(ValueError, match=r"^7 tokens of hidden text don't fit into a document of 5$"):
        hay.bury(rng, 5, pieces)
    with pytest.raises(ValueError, match="no sentence"):
        Haystack(" \n", str.split)


def test_seams_of_real_text():
    split = haystack._SEAM.split("One. Two: three\nfour; five? 3.14 e.g.\n\nEnd")
    assert split == ["One.", " Two:", " three", "\nfour;", " five?", " 3.14 e.g.", "\n\nEnd"]


def answers_end(prompts, sample):
    """Where in the prompt, in tokens, the last token of the asked facts stands."""
    text = prompts.read(sample.prompt)
    document = text[: text.rindex("\n\n")]
    if sample.task == "kv":
        key = re.search(r'"(\w+)"', sample.question)[1]
        ends = [re.search(rf'"{key}": (\d+)', document).end(1)]
    else:
        asked = re.search(r"of (\w+)(?: and (\w+))?\?$", sample.question)
        codes = {found[1]: found for found in FACT.finditer(document)}
        names = [name for name in asked.groups() if name]
        for name in names:
            if codes[name][2] in codes:
                names.append(codes[name][2])
        ends = [codes[name].end(2) for name in names]
    return prompts.token_at(sample.prompt, max(ends) - 1)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("pattern", [WORDS, PIECES], ids=["words", "pieces"])
@pytest.mark.parametrize("depths", [None, (0.0, 0.5, 1.0)], ids=["anywhere", "depths"])
def test_beyond_holds_for_every_sample(pattern, template, depths):
    beyond = LENGTH[pattern] // 3
    prompts, samples = all_of(pattern, template, samples=120, beyond=beyond, depths=depths, needles=3)
    behind = [len(sample.prompt) - 1 - answers_end(prompts, sample) for sample in samples]
    assert min(behind) >= beyond
    # The prompt is not shifted to the front as a whole: the asked facts come close to the limit.
    assert min(behind) < beyond + 25
    _, free = all_of(pattern, template, samples=120)
    assert min(len(sample.prompt) - 1 - answers_end(_, sample) for sample in free) < beyond


def test_without_sentences_to_stop_at_the_limit_is_met_to_the_token():
    # Every word is a sentence, and the head is long: the place itself decides, and must not count the head.
    prompts = fake_prompts(WORDS, "system")
    words = " ".join(f"w{n}." for n in range(99))
    samples = build(settings(("needle",), lengths=(200,), samples=400, beyond=60, haystack=words), prompts)
    behind = {len(sample.prompt) - 1 - answers_end(prompts, sample) for sample in samples}
    assert min(behind) == 60


def prose_before(prompts, sample):
    """Tokens of prose before the needle, and of prose in all."""
    _, document, _ = parts(prompts, sample, "chat")
    before = document[: FACT.search(document).start()]
    return tuple(len(prompts.tokenize(text)) for text in (before, FACT.sub("", document)))


@pytest.mark.parametrize("pattern", [WORDS, PIECES], ids=["words", "pieces"])
def test_a_needle_stands_at_the_last_seam_up_to_the_requested_depth(pattern):
    depths = (0.0, 0.25, 0.5, 0.9, 1.0)
    prompts, samples = all_of(pattern, "chat", tasks=("needle",), depths=depths, samples=40)
    assert [s.depth for s in samples] == [depth for _ in range(4) for depth in depths for _ in range(2)]
    reach = max(len(prompts.tokenize(sentence)) for sentence in SENTENCES)
    for pair in zip(samples[::2], samples[1::2], strict=True):
        places = [prose_before(prompts, sample) for sample in pair]
        requested = pair[0].depth * min(whole for _, whole in places)
        for before, _ in places:
            assert requested - reach < before <= requested
        # Each style of a question finds it in the same place; at the very end that is where the shorter prose is cut.
        assert len({before for before, _ in places}) == 1 or pair[0].depth == 1
    assert all(s.depth is None for s in all_of(pattern, "chat", depths=None)[1])
    assert all((s.depth is None) == (s.task != "needle") for s in all_of(pattern, "chat", depths=(0.5,))[1])


def test_a_needle_moved_up_by_beyond_reports_its_actual_depth():
    depths = (0.0, 0.3, 0.8, 1.0)
    arguments = {"tasks": ("needle",), "depths": depths, "samples": 80}
    prompts, samples = all_of(WORDS, "chat", beyond=150, **arguments)
    reach = max(len(prompts.tokenize(sentence)) for sentence in SENTENCES)
    for at, sample in enumerate(samples):
        before, whole = prose_before(prompts, sample)
        assert sample.depth == round(sample.depth, 2)
        assert (sample.depth - 0.006) * whole - reach < before <= (sample.depth + 0.006) * whole
        requested = depths[at // 2 % 4]
        assert sample.depth == requested if requested < 0.4 else 0.4 < sample.depth < 0.6
    # Two requested depths share one place, a single row of the heat map per length: all facts have equally many words.
    assert len({sample.depth for sample in samples}) == 3


def test_equal_seeds_make_equal_prompts_and_others_others():
    first, again, other = (
        [(s.id, s.prompt, s.answers, s.question) for s in all_of(PIECES, "chat", seed=seed)[1]] for seed in (1, 1, 2)
    )
    # The made-up vocabularies number tokens as they come, which equal prompts do alike.
    assert first == again
    assert [s[0] for s in first] == [s[0] for s in other]
    assert not {s[2:] for s in first if "needle" in s[0]} & {s[2:] for s in other if "needle" in s[0]}
    # More samples are those and more, so a small run tells what a large one will ask.
    more = [(s.id, s.answers, s.question) for s in all_of(PIECES, "chat", seed=1, samples=14)[1]]
    assert {(s[0], *s[2:]) for s in first} < set(more)


@pytest.mark.parametrize("template", TEMPLATES)
def test_both_styles_ask_about_one_document_so_that_its_prefix_is_reused(template):
    prompts, samples = all_of(WORDS, template, beyond=100, needles=2)
    assert [s.style for s in samples] == ["direct", "spoken"] * (len(samples) // 2)
    for direct, spoken in zip(samples[::2], samples[1::2], strict=True):
        assert direct.id.removesuffix("direct") == spoken.id.removesuffix("spoken")
        both = zip(direct.prompt, spoken.prompt, strict=True)
        alike = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], both))
        assert alike >= LENGTH[WORDS] - max(sum(prompts.around(s.question)) for s in (direct, spoken))
        assert direct.question != spoken.question and direct.answers == spoken.answers


def test_samples_of_one_style_and_an_odd_number():
    both = all_of(WORDS, "chat", tasks=("kv",), samples=5)[1]
    assert [s.style for s in both] == ["direct", "spoken"] * 2 + ["direct"]
    spoken = all_of(WORDS, "chat", tasks=("kv",), samples=5, styles=("spoken",))[1]
    assert [s.style for s in spoken] == ["spoken"] * 5 and len({s.id for s in spoken}) == 5


# What the tasks hide and ask


def test_needle_and_multi_needle():
    prompts, samples = all_of(WORDS, "chat", tasks=("needle", "multi-needle"), needles=4, samples=20)
    for sample in samples:
        codes = FACT.findall(prompts.read(sample.prompt))
        assert len(codes) == len(dict(codes)) == (1 if sample.task == "needle" else 4)
        asked = re.search(r"of (\w+)(?: and (\w+))?\?$", sample.question)
        names = [name for name in asked.groups() if name]
        assert len(names) == (1 if sample.task == "needle" else 2)
        assert sample.answers == tuple(dict(codes)[name] for name in names)
        assert re.fullmatch("[1-9][0-9]", sample.answers[0])


def test_the_two_needles_to_retrieve_stand_in_any_order_among_the_others():
    prompts, samples = all_of(WORDS, "chat", tasks=("multi-needle",), needles=3, samples=120)
    orders = set()
    for sample in samples:
        asked = re.search(r"of (\w+) and (\w+)\?$", sample.question).groups()
        names = [name for name, _ in FACT.findall(prompts.read(sample.prompt))]
        orders.add(tuple(asked.index(name) if name in asked else "other" for name in names))
    assert orders == set(itertools.permutations([0, 1, "other"]))


def test_kv():
    prompts, samples = all_of(WORDS, "chat", tasks=("kv",), pairs=7, samples=60)
    places = set()
    for sample in samples:
        pairs = json.loads(OBJECT.search(prompts.read(sample.prompt))[1])
        key = re.search(r'of "(\w+)"\?$', sample.question)[1]
        assert len(pairs) == 7 and sample.answers == (str(pairs[key]),)
        places.add(list(pairs).index(key))
    assert places == set(range(7))


@pytest.mark.parametrize("hops", [1, 2, 5])
def test_chain(hops):
    prompts, samples = all_of(WORDS, "chat", tasks=("chain",), hops=hops, samples=20)
    for sample in samples:
        links = dict(FACT.findall(prompts.read(sample.prompt)))
        assert len(links) == 2 * hops
        name = re.search(r"of (\w+)\?$", sample.question)[1]
        for _ in range(hops):
            name = links.pop(name)
        assert sample.answers == (name,) and name.isdigit()
        # What is left is another chain as long, so that the answer isn't the only number.
        (first,) = links.keys() - links.values()
        for _ in range(hops):
            first = links.pop(first)
        assert first.isdigit() and not links


def test_the_ideal_response_is_correct_and_in_the_form_of_its_style():
    _, samples = all_of(WORDS, "chat", hops=3, samples=20)
    for sample in samples:
        assert in_order(sample, sample.response) and sample.response.startswith(" ")
        first = re.match(r" (\w+)", sample.response)
        if sample.style == "direct":
            assert first[1] == sample.answers[0]
        elif sample.task == "chain":
            # The steps, each a sentence on its own.
            assert sample.response.count("the code of") + sample.response.count("The code of") == 3


def test_the_words_differ():
    assert len(set(facts.WORDS)) == len(facts.WORDS) >= 256
    assert all(re.fullmatch("[a-z]{3,}", word) for word in facts.WORDS)


def test_literal_questions():
    assert facts.code_fact("fox", "47") == " The code of fox is 47."
    assert facts.ask_codes({"fox": "47"}, "direct") == facts.Question(
        "Answer with the code only: what is the code of fox?", " 47.", ("47",)
    )
    assert facts.ask_codes({"fox": "47", "owl": "31"}, "spoken") == facts.Question(
        "Answer in a sentence: what are the codes of fox and owl?",
        " The code of fox is 47 and the code of owl is 31.",
        ("47", "31"),
    )
    assert facts.ask_chain(["fox", "owl", "31"], "direct") == facts.Question(
        "Answer with the number only, a code that is a word names another code; "
        "what is the number behind the code of fox?",
        " 31.",
        ("31",),
    )
    assert "".join(facts.json_pairs({"fox": "47", "owl": "31"})) == '\n{"fox": 47, "owl": 31}\n'
    assert facts.json_pairs({"fox": "47"}) == ['\n{"fox": 47}\n']
    assert facts.ask_value("fox", "47", "spoken") == facts.Question(
        'Answer with key and value: what is the value of "fox"?', ' "fox": 47', ("47",)
    )


# Mistakes


@pytest.mark.parametrize("task", TASKS)
def test_a_too_short_prompt_is_refused_with_the_least_length(task):
    prompts = fake_prompts(WORDS, "system")
    text = rf"^{task} doesn't fit into a prompt of 20 tokens; give at least (\d+)$"
    with pytest.raises(ConfigError, match=text) as caught:
        build(settings((task,), lengths=(20,), samples=1, styles=("spoken",)), prompts)
    least = int(re.match(text, str(caught.value))[1])
    # In words all facts of a task are equally long, so that the least length holds for all.
    samples = build(settings((task,), lengths=(least,), styles=("spoken",)), prompts)
    assert [len(sample.prompt) for sample in samples] == [least] * 10
    with pytest.raises(ConfigError, match=f"prompt of {least - 1} tokens; give at least {least}$"):
        build(settings((task,), lengths=(least - 1,), styles=("spoken",)), prompts)


def test_a_too_large_beyond_is_refused_with_the_largest_possible():
    prompts = fake_prompts(WORDS, "system")
    text = r"^beyond = 250 must be at most (\d+) in needle prompts of 200 tokens; lower it, or use longer prompts$"
    with pytest.raises(ConfigError, match=text) as caught:
        build(settings(("needle",), lengths=(200,), beyond=250), prompts)
    most = int(re.match(text, str(caught.value))[1])
    samples = build(settings(("needle",), lengths=(200,), beyond=most), prompts)
    assert {len(s.prompt) - 1 - answers_end(prompts, s) for s in samples} == {most}
    with pytest.raises(ConfigError):
        build(settings(("needle",), lengths=(200,), beyond=most + 1), prompts)


@pytest.mark.parametrize(
    "changed, text",
    [
        ({"tasks": ("needl",)}, "there is no task needl; there are needle, multi-needle, kv, chain, or give a .jsonl"),
        ({"tasks": ()}, "tasks is empty; give at least one"),
        ({"lengths": ()}, "lengths is empty; give at least one"),
        ({"styles": ()}, "styles is empty; give at least one"),
        ({"styles": ("sung",)}, "there is no style sung; there are direct, spoken"),
        ({"samples": 0}, "samples = 0 must be from 1 to 1000000"),
        ({"needles": 1}, f"needles = 1 must be from 2 to {len(facts.WORDS)}"),
        ({"pairs": len(facts.WORDS) + 1}, f"pairs = {len(facts.WORDS) + 1} must be from 1 to {len(facts.WORDS)}"),
        ({"hops": 0}, "hops = 0 must be from 1 to 32"),
        ({"hops": 33}, "hops = 33 must be from 1 to 32"),
        ({"beyond": -1}, "beyond = -1 must be at least 0"),
        ({"depths": (0.5, 1.1)}, "depth 1.1 must be from 0 (the document's start) to 1 (its end)"),
        ({"depths": (-0.1,)}, "depth -0.1 must be from 0 (the document's start) to 1 (its end)"),
    ],
)
def test_wrong_settings_are_refused(changed, text):
    with pytest.raises(ConfigError) as caught:
        settings(**{"lengths": (100,)} | changed)
    assert str(caught.value).startswith(text)
