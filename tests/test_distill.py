"""distill: which replies are kept, that a run goes on as if it had not stopped, and the real models behind it."""

import json
import random
import shutil
from array import array
from pathlib import Path

import pytest
from click.testing import CliRunner
from evaluate_fakes import WORDS, fake_prompts
from gguf_bytes import kv, model

from swaa_edge.cli import cli
from swaa_edge.cli.engine_options import Engine
from swaa_edge.errors import ConfigError, GenerationError, ModelFileError
from swaa_edge.evaluate.datafile import FileSample, read_samples
from swaa_edge.evaluate.facts import ask_codes, code_fact
from swaa_edge.evaluate.journal import Journal
from swaa_edge.evaluate.scoring import SCORERS, contains
from swaa_edge.finetune.answerers import Answer, LlamaAnswerer, reusable
from swaa_edge.finetune.distill import distill, seed_of
from swaa_edge.timings import Timings

SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 40}


def record(name, answer="47", question="Which?"):
    prompt = array("i", list(name.encode()))
    return FileSample(f"own/{name}", "own", prompt, (answer,), question, document=f"The text of {name}.", name=name)


class Script:
    """An `Answerer` that says what is written for a record, one reply after the other; None is one that is cut off.

    stop: (number of the answer, exception) to raise instead of it.
    """

    def __init__(self, said, stop=None):
        self._said, self._stop = said, stop
        self.asked, self.open = [], 0

    def load(self, n_ctx):
        self.n_ctx = n_ctx
        self.open += 1
        return self

    def answer(self, prompt, seed):
        if self._stop and self._stop[0] == len(self.asked):
            raise self._stop[1]
        name = bytes(list(prompt)).decode()
        # Which reply this is must be known by the seed, as a model knows nothing else.
        number = next(number for number in range(99) if seed == seed_of(0, name, number))
        self.asked.append((name, number))
        text = self._said[name][number]
        return Answer("It is 47 but" if text is None else text, text is not None, 3)

    def close(self):
        self.open -= 1


SAID = {"a": ["no", " It is 47. ", "47"], "b": ["47", "x", "y"], "c": ["46", None, "no"]}
RECORDS = [record("a"), record("b", question=""), record("c")]


def ask(script, records=RECORDS, scorer=contains, **more):
    result = distill(script.load, records, scorer, n_ctx=100, **{"samples": 3} | more)
    assert script.open == 0
    return result


def test_the_first_right_reply_of_a_record_is_kept():
    script = Script(SAID)
    result = ask(script)
    assert result.lines == [
        {"id": "a", "sample": 1, "prompt": "The text of a.", "question": "Which?", "answer": " It is 47. ",
         "reference": ["47"]},
        {"id": "b", "sample": 0, "prompt": "The text of b.", "answer": "47", "reference": ["47"]},
    ]  # fmt: skip
    assert result.to_dict() == {
        "records": 3, "kept": 2, "without": 1, "replies": 6, "wrong": 3, "cut_off": 1, "duplicates": 0, "stopped": None,
    }  # fmt: skip
    assert script.asked == [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1), ("c", 2)] and script.n_ctx == 100


def test_more_replies_than_one_and_no_reply_twice():
    said = {"a": ["47", " 47\n", "It is 47.", "So 47."], "b": ["47", "46", "46", "46"]}
    script = Script(said)
    # The second of these asks the same as the first, and gets the same reply.
    result = ask(script, [record("a"), record("a"), record("b")], samples=4, keep=2)
    assert [(line["id"], line["sample"], line["answer"]) for line in result.lines] == [
        ("a", 0, "47"), ("a", 2, "It is 47."), ("a", 3, "So 47."), ("b", 0, "47"),
    ]  # fmt: skip
    assert (result.duplicates, result.without, result.asked, result.wrong) == (4, 0, 11, 3)
    # All of a record's replies are another's already: it is not one without a right reply.
    assert ask(Script(said), [record("a"), record("a")], samples=1).to_dict()["without"] == 0


def test_a_reply_without_an_end_or_without_an_answer_is_never_kept():
    said = {"a": [None, "", " \n", "<think>47, surely.</think>\n", "<think>No?</think> Yes."]}
    result = ask(Script(said), [record("a", ".*")], SCORERS["regex"], samples=5)
    assert [line["answer"] for line in result.lines] == ["<think>No?</think> Yes."], "the thinking stays"
    assert (result.cut_off, result.wrong) == (1, 3)


def test_each_reply_has_a_seed_of_its_own():
    seeds = [seed_of(seed, name, number) for seed in (0, 1) for name in ("a", "b", "1") for number in range(50)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 - 1 for seed in seeds)
    # What was written once must come out again.
    assert [seed_of(0, "a", 0), seed_of(7, "q-1", 3)] == [2560330932, 3638274624]


@pytest.mark.parametrize("at", range(6))
def test_a_run_that_was_interrupted_goes_on(tmp_path, at):
    whole = ask(Script(SAID))
    first = Script(SAID, (at, KeyboardInterrupt()))
    with Journal(tmp_path / "journal", {}) as journal:
        result = ask(first, journal=journal)
    assert result.stopped == "interrupted" and result.asked == at
    second = Script(SAID)
    with Journal(tmp_path / "journal", {}) as journal:
        again = ask(second, journal=journal)
    assert again == whole and len(first.asked) == at and len(second.asked) == 6 - at
    third = Script(SAID)
    with Journal(tmp_path / "journal", {}) as journal:
        assert ask(third, journal=journal) == whole
    assert third.asked == [] and not hasattr(third, "n_ctx"), "nothing is left, so nothing is loaded"


def test_a_run_goes_on_with_other_numbers_and_another_scorer():
    journal = Journal(None, {})
    ask(Script(SAID), RECORDS[:1], journal=journal, scored_by="contains")
    script, calls = Script(SAID), []

    def judge(sample, reply):
        calls.append((sample.name, reply))
        return "47" in reply

    result = ask(script, scorer=judge, journal=journal, scored_by="judge", keep=2)
    assert script.asked == [("a", 2), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("c", 2)]
    assert [line["sample"] for line in result.lines] == [1, 2, 0]
    # The new judge says what it thinks of the old replies, once.
    assert len(calls) == len(set(calls)) == 8
    again = Script(SAID)
    assert ask(again, scorer=judge, journal=journal, scored_by="judge", keep=2) == result
    assert again.asked == [] and len(calls) == 8


def test_a_record_that_was_changed_is_asked_again():
    journal = Journal(None, {})
    ask(Script(SAID), journal=journal)
    script = Script(SAID)
    ask(script, [record("a"), record("b", "46", question="")], journal=journal)
    assert script.asked == [("b", 0), ("b", 1), ("b", 2)]


def test_an_error_keeps_what_is_in():
    result = ask(Script(SAID, (3, GenerationError("no memory"))))
    assert str(result.stopped) == "no memory" and len(result.lines) == 2
    assert result.to_dict()["stopped"] == "no memory"
    with pytest.raises(GenerationError, match="no memory"):
        ask(Script(SAID, (0, GenerationError("no memory"))))


def test_progress():
    told = []
    ask(Script(SAID), on_progress=told.append)
    assert [(at.done, at.kept, at.sample) for at in told] == [
        (0, 0, 0), (0, 0, 1), (1, 1, 0), (2, 2, 0), (2, 2, 1), (2, 2, 2),
    ]  # fmt: skip
    assert {at.total for at in told} == {3}
    assert [at.seconds_left is None for at in told] == [True, True, False, False, False, False]


def test_numbers_that_make_no_sense():
    for more in ({"keep": 0}, {"keep": 4}, {"samples": 0}):
        with pytest.raises(ConfigError, match="keep = "):
            ask(Script(SAID), **more)
    with pytest.raises(ConfigError, match="nothing to ask"):
        ask(Script(SAID), [])


def test_what_of_a_prompt_is_not_read_again():
    before = list(range(100))
    assert reusable(None, before, 8) == 0
    assert reusable(before, before, 8) == 96
    assert reusable(before, before[:97], 8) == 96
    assert reusable(before, before[:96], 8) == 88, "its last token is computed by itself"
    assert reusable(before[:96], before, 8) == 88, "so was the last of those before"
    assert reusable(before, [*before[:41], -1, *before[42:]], 8) == 40
    assert reusable(before, [-1, *before[1:]], 8) == 0


# The command


class Talker:
    """Stands for SwaaLlama: its replies depend on the prompt and the seed, and some don't end.

    It knows what it has read: what is asked for must have been read all but for its last token.
    """

    open, asked, fail_at = 0, (), None
    n_batch = 8

    def __init__(self, prompts, n_ctx):
        self._prompts, self._n_ctx, self._cache = prompts, n_ctx, []
        self.n_tokens, self.last_timings = 0, Timings()
        Talker.open += 1

    def eval(self, tokens):
        assert self.n_tokens <= len(self._cache)
        self._cache = [*self._cache[: self.n_tokens], *tokens]
        self.n_tokens = len(self._cache)

    def create_completion(self, prompt, *, max_tokens, seed, temperature, top_p, top_k):
        if Talker.fail_at and Talker.fail_at[0] == len(Talker.asked):
            raise Talker.fail_at[1]
        assert len(prompt) + max_tokens <= self._n_ctx and self._cache == prompt[:-1]
        question = self._prompts.read(prompt).rpartition("\n\n")[2]
        Talker.asked = (*Talker.asked, seed)
        rng = random.Random(f"{seed}/{question}/{temperature}")
        said, reason = rng.choice([(" It is 47.", "stop"), (" It is 46.", "stop"), (" It is 47, and", "length")])
        self._cache = [*prompt, *range(3)]
        self.n_tokens = len(self._cache)
        return {"choices": [{"text": said, "finish_reason": reason}]}

    def cancel(self):
        pass

    def reset(self):
        raise AssertionError("it can go back anywhere")

    def close(self):
        Talker.open -= 1


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A made-up model.gguf in the current folder, for 4096 tokens; the folder of journals is returned."""
    for name, value in {"open": 0, "asked": (), "fail_at": None}.items():
        monkeypatch.setattr(Talker, name, value)
    made = []

    def prompts(path, *, chat=True):
        made.append(fake_prompts(WORDS, "chat" if chat else "plain"))
        return made[-1]

    def load(engine, path, *, swaa, n_ctx):
        assert swaa is False and path == "model.gguf"
        return Talker(made[-1], n_ctx)

    monkeypatch.setattr("swaa_edge.evaluate.prompts.Prompts", prompts)
    monkeypatch.setattr(Engine, "load", load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(model(extra=[kv("tokenizer.ggml.model", "str", "none")]))
    lines("own.jsonl", *({"prompt": f"Text {n}.", "question": f"Which {n}?", "answer": 47} for n in range(8)))
    return tmp_path / "cache" / "swaa-edge"


def run(*args):
    return CliRunner().invoke(cli, ["distill", *map(str, args)], prog_name="swaa-edge")


def lines(path, *records):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    return path


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


SMALL = ("model.gguf", "--data", "own.jsonl", "-o", "out.jsonl", "--max-tokens", 20)


def test_the_command(fake, tmp_path):
    result = run(*SMALL, "--samples", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "12 replies to 8 records: 6 kept, 2 wrong, 4 cut off at 20 tokens, 0 duplicates\n"
        "2 records without a right reply\n"
        "wrote out.jsonl\n"
    )
    kept = read("out.jsonl")
    assert len(kept) == 6 and kept[0] == {
        "id": "1", "sample": 1, "prompt": "Text 0.", "question": "Which 0?", "answer": " It is 47.",
        "reference": ["47"],
    }  # fmt: skip
    assert {line["answer"] for line in kept} == {" It is 47."}
    assert Talker.open == 0 and list(fake.iterdir()) == [], "a complete run leaves no journal"
    # What is written is a file of samples itself.
    assert len(read_samples("out.jsonl", fake_prompts())) == 6


def test_json(fake):
    result = run(*SMALL, "--json", "--seed", 3, "--samples", 9, "--keep", 2, "--top-k", 5)
    told = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    kept = read("out.jsonl")
    assert told["kept"] == len(kept) and told["of"] == told["records"] == 8 and told["output"] == "out.jsonl"
    assert told["replies"] == len(Talker.asked) == sum(told[n] for n in ("kept", "wrong", "cut_off", "duplicates"))
    assert told["settings"]["seed"] == 3 and told["settings"]["top_k"] == 5 and told["settings"]["temperature"] == 0.7
    assert told["settings"]["scorer"] == "contains" and told["skipped"] == 0


def test_ctrl_c_and_the_same_command_again(fake):
    assert run(*SMALL).exit_code == 0
    whole, asked = Path("out.jsonl").read_bytes(), len(Talker.asked)
    for at in (4, 9):
        Talker.fail_at = (asked + at, KeyboardInterrupt())
        result = run(*SMALL, "--force")
        resuming = "" if at == 4 else "resuming: 4 replies are in\n"
        assert (result.exit_code, result.stderr) == (130, f"{resuming}Interrupted\n")
        assert "\nStopped early (interrupted): " in result.stdout
        assert result.stdout.endswith(
            " of 8 records are through; the same command goes on from there, and writes the file when it is complete.\n"
        )
        assert Path("out.jsonl").read_bytes() == whole and len(list(fake.iterdir())) == 1 and Talker.open == 0
    Talker.fail_at = None
    result = run(*SMALL, "--force")
    assert (result.exit_code, result.stderr) == (0, "resuming: 9 replies are in\n")
    assert Path("out.jsonl").read_bytes() == whole and len(Talker.asked) == 2 * asked
    assert list(fake.iterdir()) == []


def test_an_error_in_the_middle(fake):
    Talker.fail_at = (5, GenerationError("out of memory"))
    result = run(*SMALL, "--json")
    assert (result.exit_code, result.stderr) == (1, "Error: out of memory\n")
    told = json.loads(result.stdout)
    assert told["stopped"] == "out of memory" and told["replies"] == 5 and told["output"] is None
    Talker.fail_at = None
    assert run(*SMALL, "--limit", 3).stderr == "resuming: 5 replies are in\n"


def test_other_settings_are_another_run(fake):
    Talker.fail_at = (5, KeyboardInterrupt())
    run(*SMALL)
    Talker.fail_at = None
    for more in (("--seed", 1), ("--temp", 0.5), ("--no-chat",), ("--max-tokens", 21), ("--threads", 3)):
        assert run(*SMALL, *more, "--force").stderr == "", more
    for more in (("--samples", 5), ("--limit", 2), ("--keep", 2), ("--scorer", "in-order")):
        journal = next(iter(fake.iterdir()))
        before = journal.read_bytes()
        assert run(*SMALL, *more, "--force").stderr == "resuming: 5 replies are in\n", more
        journal.write_bytes(before)
    assert run(*SMALL, "--fresh", "--force").stderr == ""


def test_a_journal_of_one_s_own_stays(fake):
    assert run(*SMALL, "--journal", "kept").exit_code == 0 and not fake.exists()
    asked = len(Talker.asked)
    assert run(*SMALL[:3], "-o", "other.jsonl", *SMALL[5:], "--journal", "kept").exit_code == 0
    assert len(Talker.asked) == asked and read("other.jsonl") == read("out.jsonl")
    result = run(*SMALL, "--force", "--journal", "kept", "--seed", 5)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("Error: kept holds the answers of another run")
    assert run(*SMALL, "--force", "--journal", "kept", "--seed", 5, "--fresh").exit_code == 0


def test_nothing_right_is_an_error_and_writes_nothing(fake, tmp_path):
    lines("own.jsonl", {"prompt": "Text.", "question": "Which?", "answer": "48"})
    result = run(*SMALL, "--seed", 1)
    assert result.exit_code == 1 and "0 kept" in result.stdout and "1 records without a right reply" in result.stdout
    assert result.stderr == (
        "Error: no reply was right, so nothing is written; try another --scorer, or more than 4 --samples: it goes on\n"
    )
    assert not (tmp_path / "out.jsonl").exists()
    again = run(*SMALL, "--seed", 1, "--samples", 5, "--json")
    assert json.loads(again.stdout)["replies"] == 5 and len(Talker.asked) == 5
    assert again.stderr.startswith("resuming: 4 replies are in\nError: no reply was right")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "model.gguf", "own.jsonl"]


def test_replies_that_all_are_cut_off_say_so(fake, monkeypatch):
    cut = {"choices": [{"text": " 47", "finish_reason": "length"}]}
    monkeypatch.setattr(Talker, "create_completion", lambda *_, **__: cut)
    monkeypatch.setattr(Talker, "reset", lambda self: None)
    result = run(*SMALL)
    assert result.exit_code == 1 and "32 cut off at 20 tokens" in result.stdout
    assert result.stderr == "Error: no reply ended within --max-tokens, so none is kept; raise it\n"


def test_prompts_that_are_too_long(fake):
    long = {"prompt": "word " * 80, "question": "Which?", "answer": "47"}
    lines("own.jsonl", *({"prompt": "a b", "question": f"Which {n}?", "answer": "47"} for n in range(4)), long)
    result = run(*SMALL, "--ctx", 100)
    tokens = 80 + 1 + 3  # with the question, and what the template puts around them
    assert (result.exit_code, result.stdout, Talker.asked) == (1, "", ())
    assert result.stderr.startswith(f"Error: own.jsonl:5: a prompt of {tokens} tokens and 20 for the answer don't fit")
    result = run(*SMALL, "--ctx", 100, "--skip-long")
    assert result.exit_code == 0 and "\n1 records exceed the context and were left out\n" in result.stdout


def test_greedy_replies_are_asked_for_once(fake):
    result = run(*SMALL, "--temp", 0, "--json")
    assert json.loads(result.stdout)["settings"]["samples"] == 1 and len(Talker.asked) == 8
    result = run(*SMALL, "--temp", 0, "--samples", 2)
    assert result.exit_code == 2 and result.stderr.startswith("Error: replies at --temp 0 are all the same; give --sam")


@pytest.mark.parametrize(
    "records, told",
    [
        (['{"prompt": "a", "answer": "b"}', '{"prompt": "a", "answer" "b"}'], ":2: malformed JSON at column 26"),
        (['{"prompt": "a", "answer": "b"}', "", '{"prompt": "a"}'], ":3: the field answer is missing; there is prompt"),
        (['{"prompt": "a", "answer": "(47"}'], ":1: answer '(47' is no regular expression"),
    ],
)
def test_wrong_lines(fake, tmp_path, records, told):
    lines("own.jsonl", *records)
    result = run(*SMALL, "--scorer", "regex")
    assert (result.exit_code, result.stdout, Talker.asked) == (1, "", ())
    assert result.stderr.startswith(f"Error: own.jsonl{told}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "args, code, told",
    [
        (["--keep", "5"], 2, "--keep 5 needs as many --samples; there are 4"),
        (["--keep", "2", "--temp", "0"], 2, "--keep 2 needs as many --samples; there are 1"),
        (["--judge", "http://x/v1"], 2, "a judge needs both --judge URL and --judge-model NAME"),
        (["--scorer", "judge"], 2, "--scorer judge and --judge URL --judge-model NAME belong together"),
        (["--judge", "x", "--judge-model", "m"], 1, "'x' must be an address such as http://localhost:8000/v1"),
        (["--data", "none.jsonl"], 1, "cannot read none.jsonl: No such file or directory"),
        (["-o", "none/out.jsonl"], 1, "the folder none does not exist"),
        (["-o", "out.txt"], 1, "out.txt must end in .jsonl"),
        (["-o", "own.jsonl", "--force"], 1, "own.jsonl is what --data reads; choose another name"),
        (["-o", "there.jsonl"], 1, "there.jsonl exists already; pass --force"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_asked(fake, tmp_path, args, code, told):
    (tmp_path / "there.jsonl").write_text("mine")
    before = sorted(tmp_path.iterdir())
    result = run(*SMALL, *args)
    assert (result.exit_code, result.stdout, Talker.asked) == (code, "", ())
    assert result.stderr.startswith(f"Error: {told}") and result.stderr.count("\n") == 1, result.stderr
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.jsonl").read_text() == "mine"


def test_models_that_are_none(fake, tmp_path):
    for args, code, told in (
        (["none.gguf"], 1, "none.gguf does not exist"),
        (["empty"], 1, "empty has no config.json; give the folder of a Hugging Face model"),
        (["empty", "--ubatch", "64"], 2, "empty is a folder; of the engine's options only --ctx and --threads"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        result = run(*args, *SMALL[1:])
        assert result.exit_code == code and result.stderr.startswith(f"Error: {told}"), result.stderr
        assert result.stderr.count("\n") == 1 and not (tmp_path / "out.jsonl").exists()


# The engine


@pytest.fixture(scope="module")
def demo():
    from swaa_edge.demo import MODEL

    return str(MODEL)


def needles(path, count, words=150):
    """A file of questions on short documents; two follow one another on each."""
    from swaa_edge.prose import real_text

    rng, prose = random.Random(3), real_text().split()
    records = []
    for number in range(count // 2):
        codes = {"otter": str(rng.randrange(10, 100)), "violin": str(rng.randrange(10, 100))}
        start = rng.randrange(len(prose) - words)
        text = prose[start : start + words]
        for name, code in codes.items():
            text.insert(rng.randrange(words), code_fact(name, code).strip())
        for name, code in codes.items():
            question = ask_codes({name: code}, ("direct", "spoken")[number % 2]).text
            records.append({"prompt": " ".join(text), "question": question, "answer": code})
    return lines(path, *records)


@pytest.mark.native
def test_the_demo_model_writes_data(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = needles(tmp_path / "needles.jsonl", 8)
    out = tmp_path / "out.jsonl"
    arguments = [
        demo, "--data", data, "-o", out, "--max-tokens", 24, "--samples", 3, "--keep", 2, "--threads", 1, "--temp", 1.5,
        "--ubatch", 64, "--batch", 64,
    ]  # fmt: skip
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told, kept, asked = json.loads(result.stdout), read(out), read(data)
    assert len(kept) == told["kept"] >= 4 and told["records"] == 8
    for line in kept:
        source = asked[int(line["id"]) - 1]
        assert line["prompt"] == source["prompt"] and line["question"] == source["question"]
        assert source["answer"] in line["answer"] and line["reference"] == [source["answer"]]
    whole = out.read_bytes()
    # Interrupted after each few replies; what is left is then asked of a model that has read something else before.
    add, count = Journal.add, 0

    def adds(self, reply):
        nonlocal count
        add(self, reply)
        count += 1
        if count in (2, 6, 9):
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", adds)
    for _ in range(3):
        result = run(*arguments, "--force")
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "Interrupted")
    result = run(*arguments, "--force")
    assert (result.exit_code, result.stderr) == (0, "resuming: 9 replies are in\n")
    assert count == told["replies"] > 9 and out.read_bytes() == whole


@pytest.mark.native
def test_a_reply_does_not_depend_on_what_was_read_before(demo):
    from swaa_edge import SwaaLlama
    from swaa_edge.evaluate.prompts import Prompts
    from swaa_edge.prose import real_text

    with Prompts(demo) as prompts:
        text = real_text()
        asked = [prompts.ask(text[: 1500 + more], "what is the code of otter?") for more in (0, 400, 37)]
        asked.append(prompts.ask(text[700:1800], "what is the code of otter?"))

    def answerer():
        threads = {"n_threads": 1, "n_threads_batch": 1}
        llm = SwaaLlama(demo, swaa=False, n_ctx=1024, n_batch=64, n_ubatch=64, verbose=False, **threads)
        return LlamaAnswerer(llm, max_tokens=12, sampling=SAMPLING | {"temperature": 3.0})

    def alone(prompt, seed):
        fresh = answerer()
        try:
            return fresh.answer(prompt, seed)
        finally:
            fresh.close()

    shared = answerer()
    order = [(0, 1), (0, 2), (1, 1), (2, 7), (3, 1), (3, 2), (1, 2), (0, 1)]
    found = [shared.answer(asked[at], seed) for at, seed in order]
    reused = shared._llm.last_timings.reused_tokens
    shared.close()
    assert reused == len(asked[0]) - 1
    assert found == [alone(asked[at], seed) for at, seed in order]
    assert len({reply.text for reply in found}) > 3 and found[0] == found[-1]
    assert all(reply.tokens <= 12 for reply in found)


# Transformers


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen3", layers=2)


def questions(count):
    return [(f"The fox number {n} lives in house {n * 7}. " * 9, f"Where does number {n} live?") for n in range(count)]


@pytest.mark.native
@pytest.mark.parametrize("chat", [True, False])
def test_both_kinds_of_model_read_the_same_prompt(folder, gguf_model, chat):
    from swaa_edge.evaluate.prompts import Prompts
    from swaa_edge.finetune.hfanswerer import HfPrompts

    with Prompts(gguf_model("qwen3"), chat=chat) as ours, HfPrompts(folder, chat=chat) as theirs:
        assert ours.chat == theirs.chat == chat
        for document, question in (*questions(2), ("Text.\n", "Who?"), ("Ann\u00e9 \U0001f98a<|im_end|> here", "")):
            assert theirs.ask(document, question) == ours.ask(document, question), (document, question)


@pytest.mark.native
def test_transformers_replies_as_the_engine(folder, gguf_model):
    from swaa_edge import SwaaLlama
    from swaa_edge.finetune.hfanswerer import HfAnswerer, HfPrompts

    sampling = SAMPLING | {"temperature": 0.0}
    with HfPrompts(folder) as prompts:
        asked = [prompts.ask(*question) for question in questions(3)]
    settings = {"n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "verbose": False}
    llm = SwaaLlama(str(gguf_model("qwen3")), swaa=False, n_ctx=1024, **settings)
    ours, theirs = (
        LlamaAnswerer(llm, max_tokens=10, sampling=sampling),
        HfAnswerer(folder, max_tokens=10, sampling=sampling, threads=1),
    )
    found = [theirs.answer(prompt, 0) for prompt in asked]
    # Half a character, which a random model often writes, is left out by the one and a mark in the other.
    told = [(reply.text.replace("\ufffd", ""), reply.ended, reply.tokens) for reply in found]
    expected = [ours.answer(prompt, 0) for prompt in asked]
    assert told == [(reply.text, reply.ended, reply.tokens) for reply in expected]
    assert len(set(told)) == 3 and all(reply.tokens == 10 for reply in found)
    ours.close()
    theirs.close()


def test_transformers_replies_by_the_seed_alone(folder, monkeypatch):
    import torch

    from swaa_edge.finetune import hfanswerer

    monkeypatch.setattr(hfanswerer, "_STEP", 16)
    with hfanswerer.HfPrompts(folder) as prompts:
        asked = [prompts.ask(*question) for question in questions(2)]
    asked.append(asked[0][:-20] + asked[1][-20:])

    def answerer():
        return hfanswerer.HfAnswerer(folder, max_tokens=8, sampling=SAMPLING | {"temperature": 2.0}, threads=1)

    shared = answerer()
    order = [(0, 1), (0, 2), (1, 1), (2, 1), (0, 1)]
    found = [shared.answer(asked[at], seed) for at, seed in order]
    assert found == [answerer().answer(asked[at], seed) for at, seed in order]
    assert len({reply.text for reply in found}) > 2 and found[0] != found[1] and found[0] == found[-1]
    # A random model hardly heeds what is far back; K and V do.
    counts, tensor = [], shared._tensor
    monkeypatch.setattr(shared, "_tensor", lambda tokens: counts.append(len(tokens)) or tensor(tokens))
    read = []
    for prompt in (asked[2], asked[1], asked[2]):
        fresh = answerer()
        counts.clear()
        for one in (shared, fresh):
            one._read_all_but_last(prompt)
        for ours, theirs in zip(shared._cache.layers, fresh._cache.layers, strict=True):
            assert ours.keys.shape[2] == len(prompt) - 1
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        read.append(sum(counts))
    assert read[0] < 16 + 20 < read[1], "the beginning was there: asked[0] has it, too"


@pytest.fixture
def ending(folder, tmp_path):
    """The folder of a model whose greedy reply to the first question ends, by a token that it generates early."""
    from swaa_edge.finetune.hfanswerer import HfAnswerer, HfPrompts

    with HfPrompts(folder) as prompts:
        prompt = prompts.ask(*questions(1)[0])
    answerer = HfAnswerer(folder, max_tokens=10, sampling=SAMPLING | {"temperature": 0.0}, threads=1)
    answerer._read_all_but_last(prompt)
    tokens = answerer._generate(prompt, 0)
    end = max(at for at, token in enumerate(tokens) if token not in tokens[:at])
    assert end > 0
    copied = shutil.copytree(folder, tmp_path / "ending")
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[end]], "temperature": 0.1}))
    return copied, answerer._text(tokens[:end])


def test_a_folder_from_end_to_end(ending, tmp_path, monkeypatch):
    import transformers

    from swaa_edge.finetune.data import read_examples
    from swaa_edge.finetune.hfanswerer import HfPrompts

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, text = ending
    document, question = questions(1)[0]
    data = lines(tmp_path / "own.jsonl", {"prompt": document, "question": question, "answer": ".", "id": "fox"})
    out = tmp_path / "out.jsonl"
    more = ["--temp", 0, "--max-tokens", 12, "--scorer", "regex", "--threads", 1]
    result = run(folder, "--data", data, "-o", out, *more)
    assert (result.exit_code, result.stderr) == (0, "")
    assert read(out) == [
        {"id": "fox", "sample": 0, "prompt": document, "question": question, "answer": text, "reference": ["."]}
    ]
    # finetune learns it behind the very prompt that it was a reply to.
    (example,) = read_examples(out, transformers.AutoTokenizer.from_pretrained(folder), max_length=10_000).kept
    prompt = HfPrompts(folder).ask(document, question).tolist()
    assert example.tokens[: len(prompt)] == prompt and example.generated.index(True) == len(prompt)
    result = run(folder, "--data", data, "-o", out, "--force", "--ctx", 50)
    assert result.exit_code == 1 and f"Error: {data}:1: a prompt of" in result.stderr


def test_a_folder_that_transformers_can_t_load(folder, tmp_path):
    from swaa_edge.finetune.hfanswerer import HfAnswerer, HfPrompts

    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    with pytest.raises(ModelFileError, match=r"transformers can't load .*broken"):
        HfAnswerer(broken, max_tokens=4, sampling=SAMPLING)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(ModelFileError, match=r"chat template fails \(.*no such role.*--no-chat"):
        HfPrompts(broken).ask("a", "b")
