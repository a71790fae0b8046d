"""The command distill: what it keeps and prints, and that it resumes after Ctrl-C or an error."""

import json
import random
from pathlib import Path

import pytest

from support.fakes.distill_files import lines, read, run
from support.fakes.evaluate import WORDS, fake_prompts
from support.fakes.gguf_bytes import kv, model
from swaa_edge.engine.phases import Timings
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import GenerationError
from swaa_edge.evaluate.datafile import read_samples


class Talker:
    """Stands in for SwaaLlama: its responses depend on the prompt and the seed, and some are truncated.

    A completion requires that all but the last token of its prompt are prefilled.
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
        text, reason = rng.choice([(" It is 47.", "stop"), (" It is 46.", "stop"), (" It is 47, and", "length")])
        self._cache = [*prompt, *range(3)]
        self.n_tokens = len(self._cache)
        return {"choices": [{"text": text, "finish_reason": reason}]}

    def cancel(self):
        pass

    def reset(self):
        raise AssertionError("the cache can go back anywhere")

    def close(self):
        Talker.open -= 1


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A fake model.gguf in the current folder, for 4096 tokens; returns the folder of journals."""
    for name, value in {"open": 0, "asked": (), "fail_at": None}.items():
        monkeypatch.setattr(Talker, name, value)
    made = []

    def prompts(path, *, chat=True):
        made.append(fake_prompts(WORDS, "chat" if chat else "plain"))
        return made[-1]

    def load(engine, model, *, swaa, n_ctx):
        assert swaa is False and str(model) == "model.gguf"
        return Talker(made[-1], n_ctx)

    monkeypatch.setattr("swaa_edge.finetune.distillation.Prompts", prompts)
    monkeypatch.setattr(EngineSettings, "load", load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(model(extra=[kv("tokenizer.ggml.model", "str", "none")]))
    lines("own.jsonl", *({"prompt": f"Text {n}.", "question": f"Which {n}?", "answer": 47} for n in range(8)))
    return tmp_path / "cache" / "swaa-edge"


SMALL = ("model.gguf", "--data", "own.jsonl", "-o", "out.jsonl", "--max-tokens", 20)


def test_the_command(fake, tmp_path):
    result = run(*SMALL, "--samples", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "12 responses to 8 records: 6 kept, 2 incorrect, 4 truncated at 20 tokens, 0 duplicates\n"
        "2 records without a correct response\n"
        "wrote out.jsonl\n"
    )
    kept = read("out.jsonl")
    assert len(kept) == 6 and kept[0] == {
        "id": "1",
        "sample": 1,
        "prompt": "Text 0.",
        "question": "Which 0?",
        "answer": " It is 47.",
        "reference": ["47"],
    }
    assert {line["answer"] for line in kept} == {" It is 47."}
    assert Talker.open == 0 and list(fake.iterdir()) == [], "a complete run leaves no journal"
    # The output is a valid input.
    assert len(read_samples("out.jsonl", fake_prompts())) == 6


def test_json(fake):
    result = run(*SMALL, "--json", "--seed", 3, "--samples", 9, "--keep", 2, "--top-k", 5)
    counts = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    kept = read("out.jsonl")
    assert counts["kept"] == len(kept) and counts["of"] == counts["records"] == 8 and counts["output"] == "out.jsonl"
    assert counts["responses"] == len(Talker.asked)
    assert counts["responses"] == sum(counts[n] for n in ("kept", "incorrect", "truncated", "duplicates"))
    assert (
        counts["settings"]["seed"] == 3
        and counts["settings"]["top_k"] == 5
        and counts["settings"]["temperature"] == 0.7
    )
    assert counts["settings"]["scorer"] == "contains" and counts["skipped"] == 0


def test_ctrl_c_and_the_same_command_again(fake):
    assert run(*SMALL).exit_code == 0
    whole, asked = Path("out.jsonl").read_bytes(), len(Talker.asked)
    for at in (4, 9):
        Talker.fail_at = (asked + at, KeyboardInterrupt())
        result = run(*SMALL, "--force")
        resuming = "" if at == 4 else "resuming after 4 responses\n"
        assert (result.exit_code, result.stderr) == (130, f"{resuming}Interrupted\n")
        assert "\nStopped early (interrupted) after " in result.stdout
        assert result.stdout.endswith(
            " of 8 records; the same command resumes, and writes the file when it is complete.\n"
        )
        assert Path("out.jsonl").read_bytes() == whole and len(list(fake.iterdir())) == 1 and Talker.open == 0
    Talker.fail_at = None
    result = run(*SMALL, "--force")
    assert (result.exit_code, result.stderr) == (0, "resuming after 9 responses\n")
    assert Path("out.jsonl").read_bytes() == whole and len(Talker.asked) == 2 * asked
    assert list(fake.iterdir()) == []


def test_an_error_in_the_middle(fake):
    Talker.fail_at = (5, GenerationError("out of memory"))
    result = run(*SMALL, "--json")
    assert (result.exit_code, result.stderr) == (1, "Error: out of memory\n")
    counts = json.loads(result.stdout)
    assert counts["stopped"] == "out of memory" and counts["responses"] == 5 and counts["output"] is None
    Talker.fail_at = None
    assert run(*SMALL, "--limit", 3).stderr == "resuming after 5 responses\n"


def test_other_settings_are_another_run(fake):
    Talker.fail_at = (5, KeyboardInterrupt())
    run(*SMALL)
    Talker.fail_at = None
    for more in (("--seed", 1), ("--temp", 0.5), ("--no-chat",), ("--max-tokens", 21), ("--threads", 3)):
        assert run(*SMALL, *more, "--force").stderr == "", more
    for more in (("--samples", 5), ("--limit", 2), ("--keep", 2), ("--scorer", "in-order")):
        journal = next(iter(fake.iterdir()))
        before = journal.read_bytes()
        assert run(*SMALL, *more, "--force").stderr == "resuming after 5 responses\n", more
        journal.write_bytes(before)
    assert run(*SMALL, "--fresh", "--force").stderr == ""


def test_a_journal_that_the_user_names_stays(fake):
    assert run(*SMALL, "--journal", "kept").exit_code == 0 and not fake.exists()
    asked = len(Talker.asked)
    assert run(*SMALL[:3], "-o", "other.jsonl", *SMALL[5:], "--journal", "kept").exit_code == 0
    assert len(Talker.asked) == asked and read("other.jsonl") == read("out.jsonl")
    result = run(*SMALL, "--force", "--journal", "kept", "--seed", 5)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("Error: kept is the journal of another run")
    assert run(*SMALL, "--force", "--journal", "kept", "--seed", 5, "--fresh").exit_code == 0


def test_no_correct_response_is_an_error_and_writes_nothing(fake, tmp_path):
    lines("own.jsonl", {"prompt": "Text.", "question": "Which?", "answer": "48"})
    result = run(*SMALL, "--seed", 1)
    assert (
        result.exit_code == 1 and "0 kept" in result.stdout and "1 records without a correct response" in result.stdout
    )
    assert result.stderr == (
        "Error: no response was correct, so nothing was written; try another --scorer, or resume with more --samples "
        "than 4\n"
    )
    assert not (tmp_path / "out.jsonl").exists()
    again = run(*SMALL, "--seed", 1, "--samples", 5, "--json")
    assert json.loads(again.stdout)["responses"] == 5 and len(Talker.asked) == 5
    assert again.stderr.startswith("resuming after 4 responses\nError: no response was correct")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "model.gguf", "own.jsonl"]


def test_truncated_responses_only(fake, monkeypatch):
    cut = {"choices": [{"text": " 47", "finish_reason": "length"}]}
    monkeypatch.setattr(Talker, "create_completion", lambda *_, **__: cut)
    monkeypatch.setattr(Talker, "reset", lambda self: None)
    result = run(*SMALL)
    assert result.exit_code == 1 and "32 truncated at 20 tokens" in result.stdout
    assert result.stderr == "Error: no response ended within --max-tokens, so none was kept; raise it\n"


def test_prompts_that_are_too_long(fake):
    long = {"prompt": "word " * 80, "question": "Which?", "answer": "47"}
    lines("own.jsonl", *({"prompt": "a b", "question": f"Which {n}?", "answer": "47"} for n in range(4)), long)
    result = run(*SMALL, "--ctx", 100)
    tokens = 80 + 1 + 3  # the prompt, the question and the template
    assert (result.exit_code, result.stdout, Talker.asked) == (1, "", ())
    assert result.stderr.startswith(f"Error: own.jsonl:5: a prompt of {tokens} tokens and 20 for the answer don't fit")
    result = run(*SMALL, "--ctx", 100, "--skip-long")
    assert result.exit_code == 0 and "\n1 records exceed the context and were left out\n" in result.stdout


def test_greedy_responses_are_asked_for_once(fake):
    result = run(*SMALL, "--temp", 0, "--json")
    assert json.loads(result.stdout)["settings"]["samples"] == 1 and len(Talker.asked) == 8
    result = run(*SMALL, "--temp", 0, "--samples", 2)
    assert result.exit_code == 1 and result.stderr.startswith(
        "Error: samples = 2 at temperature 0 would give equal responses"
    )


@pytest.mark.parametrize(
    "records, message",
    [
        (['{"prompt": "a", "answer": "b"}', '{"prompt": "a", "answer" "b"}'], ":2: malformed JSON at column 26"),
        (['{"prompt": "a", "answer": "b"}', "", '{"prompt": "a"}'], ":3: the field answer is missing; the record has"),
        (['{"prompt": "a", "answer": "(47"}'], ":1: answer '(47' is not a regular expression"),
    ],
)
def test_invalid_lines(fake, tmp_path, records, message):
    lines("own.jsonl", *records)
    result = run(*SMALL, "--scorer", "regex")
    assert (result.exit_code, result.stdout, Talker.asked) == (1, "", ())
    assert result.stderr.startswith(f"Error: own.jsonl{message}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--keep", "5"], 1, "keep = 5 must be from 1 to samples = 4"),
        (["--keep", "2", "--temp", "0"], 1, "keep = 2 must be from 1 to samples = 1"),
        (["--judge", "http://x/v1"], 1, "a judge needs both --judge URL and --judge-model NAME"),
        (["--scorer", "judge"], 1, "--scorer judge requires --judge URL and --judge-model NAME"),
        (["--judge", "x", "--judge-model", "m"], 1, "'x' must be an address such as http://localhost:8000/v1"),
        (["--data", "none.jsonl"], 1, "cannot read none.jsonl: No such file or directory"),
        (["-o", "none/out.jsonl"], 1, "the folder none does not exist"),
        (["-o", "out.txt"], 1, "out.txt must end in .jsonl"),
        (["-o", "own.jsonl", "--force"], 1, "own.jsonl is used for an output and for another file of this command"),
        (["-o", "there.jsonl"], 1, "there.jsonl exists already; pass --force"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_asked(fake, tmp_path, args, code, message):
    (tmp_path / "there.jsonl").write_text("mine")
    before = sorted(tmp_path.iterdir())
    result = run(*SMALL, *args)
    assert (result.exit_code, result.stdout, Talker.asked) == (code, "", ())
    assert result.stderr.startswith(f"Error: {message}") and result.stderr.count("\n") == 1, result.stderr
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.jsonl").read_text() == "mine"


def test_models_that_do_not_exist(fake, tmp_path):
    for args, code, message in (
        (["none.gguf"], 1, "none.gguf does not exist"),
        (["empty"], 1, "empty has no config.json; give the folder of a Hugging Face model"),
        (["empty", "--ubatch", "64"], 1, "empty is a Hugging Face model; the only engine options for it are"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        result = run(*args, *SMALL[1:])
        assert result.exit_code == code and result.stderr.startswith(f"Error: {message}"), result.stderr
        assert result.stderr.count("\n") == 1 and not (tmp_path / "out.jsonl").exists()
