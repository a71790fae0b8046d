"""The eval command: exact output, files, resumed runs, errors in one line; and once on the real engine."""

import json
import re

import pytest
from click.testing import CliRunner

from support.fakes.evaluate import Reader, fake_engine, write_model
from support.fakes.gguf_bytes import swaa_keys
from swaa_edge import SwaaConfig
from swaa_edge.cli import cli
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import GenerationError
from swaa_edge.support.journal import Journal


def run(*args):
    return CliRunner().invoke(cli, ["eval", *map(str, args)], prog_name="swaa-edge")


@pytest.fixture
def file(tmp_path):
    return write_model(tmp_path / "model.gguf")


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return fake_engine(monkeypatch, tmp_path / "cache")


@pytest.fixture
def small(file, tmp_path):
    """The arguments of a small run."""
    prose = tmp_path / "prose.txt"
    prose.write_text(" ".join(f"Line {n} says {'nothing ' * (n % 7)}here." for n in range(200)))
    return [
        file,
        "--task",
        "needle,kv",
        "--prompt-tokens",
        "200",
        "--samples",
        "4",
        "--pairs",
        "5",
        "--beyond",
        "80",
        "--haystack",
        prose,
        "--configs",
        "full,naive,fast",
        "--window",
        "60",
        "--sinks",
        "4",
    ]


def lines(tmp_path, *records, name="own.jsonl"):
    path = tmp_path / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


HEAD = """\
tiny (llama, 4 layers, F32, 0.00 GB)
tasks: needle, kv; prompts of 200 tokens, the model's chat template; seed 0

"""
NOTES = """\

accuracy: correct answers of 8 per configuration, with Wilson's 95% interval.
prefill: median time; ratio: speed-up over full attention. *: Pareto front of accuracy and ratio.

"""
# 198 tokens at 1 and at 1/2 ms each: two of a prompt, the template's and a word, are those of the prompt before.
TABLE = """\
config  accuracy  95% interval  needle      kv  prefill  ratio  decode tok/s
full *    100.0%  67.6%-100.0%  100.0%  100.0%   198 ms  1.00x           5.0
naive       0.0%    0.0%-32.4%    0.0%    0.0%    99 ms  2.00x          10.0
fast *     50.0%   21.5%-78.5%   50.0%   50.0%    99 ms  2.00x          10.0
"""
SAYS = "fast keeps 50% of full attention's accuracy (50.0% of 100.0%) at a prefill speed-up of 2.00x.\n"


def test_the_output(fake, small, file):
    result = run(*small)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == HEAD + TABLE + NOTES + SAYS
    assert Reader.open == 0 and list(fake.cache.iterdir()) == [], "a complete run leaves no journal"
    # One model per configuration, asked in turns.
    configs = [False, SwaaConfig(60), SwaaConfig(60, 4, fa_decode=True, tail_count=128, recipe="custom")]
    assert [config for config, _ in Reader.loaded] == configs
    assert [config for config, _ in Reader.asked] == configs * 8
    assert fake.engines[0] == (EngineSettings(), str(file)) and Reader.loaded[0][1] == 200 + 64


def test_a_large_model_is_held_once_at_a_time(fake, small, monkeypatch):
    monkeypatch.setattr("swaa_edge.evaluate.comparison.TOGETHER", 10)
    assert run(*small).stdout == HEAD + TABLE + NOTES + SAYS
    assert [bool(config) for config, _ in Reader.asked] == [False] * 8 + [True] * 16


def test_the_help():
    result = run("--help")
    assert result.exit_code == 0
    example = (
        "  swaa-edge eval model.gguf --task needle,kv --prompt-tokens 4096,8192 --json eval.json --plot eval.png\n"
    )
    assert example in result.stdout
    sections = re.findall(r"^(\w[\w ]*):$", result.stdout, re.MULTILINE)
    assert sections == ["Questions", "Own files and text", "Configurations", "Results", "Engine"]
    options = re.findall(r"^  (--[\w-]+)", result.stdout, re.MULTILINE)
    assert len(options) == len(set(options)) and {"--task", "--judge", "--configs", "--json", "--ctx"} <= set(options)


def test_json_is_alone_on_stdout(fake, small):
    result = run(*small, "--json", "-", "--seed", 3)
    document = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert set(document) == {
        "table",
        "cells",
        "answers",
        "stopped",
        "perplexity",
        "front",
        "conclusion",
        "model",
        "machine",
        "settings",
        "samples",
        "progress",
    }
    assert [row["config"] for row in document["table"]] == ["full", "naive", "fast"]
    assert document["front"] == ["full", "fast"] and document["conclusion"] == SAYS.strip()
    assert document["stopped"] is None and document["perplexity"] is None and len(document["answers"]) == 24
    assert document["progress"] == {"answers": 24, "of": 24, "windows": 0, "of_windows": 0, "kept": True}
    assert document["model"]["name"] == "tiny" and document["model"]["layers"] == 4
    assert document["settings"]["lengths"] == [200] and document["settings"]["beyond"] == 80
    assert document["samples"]["seed"] == 3
    # Needles at depths up to 1.0 were requested, which --beyond does not allow.
    depths = {cell["depth"] for cell in document["cells"] if cell["task"] == "needle"}
    assert depths == {0.0, 0.25}


def test_files(fake, small, tmp_path):
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("eval.json", "eval.png", "map.png")]
    result = run(*small, "--json", files[0], "--plot", files[1], "--heatmap", files[2])
    assert result.stdout == HEAD + TABLE + NOTES + SAYS and result.exit_code == 0
    assert len(json.loads(files[0].read_text())["answers"]) == 24
    assert [file.read_bytes()[:8] for file in files[1:]] == [b"\x89PNG\r\n\x1a\n"] * 2
    both = tmp_path / "both.svg"
    assert run(*small, "--plot", both, "--heatmap", both).exit_code == 0 and b"<svg" in both.read_bytes()


def test_a_file_that_exists_is_refused_before_the_run(fake, small, tmp_path):
    pytest.importorskip("matplotlib")
    there, other = tmp_path / "eval.png", tmp_path / "eval.json"
    there.write_text("mine")
    result = run(*small, "--plot", there, "--json", other)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {there} exists already; pass --force to replace it, or choose another name\n"
    assert there.read_text() == "mine" and not other.exists() and Reader.loaded == ()
    assert run(*small, "--json", there, "--force").exit_code == 0 and json.loads(there.read_text())["table"]


# Resuming

STOPPED = "Stopped early (interrupted) after 10 of 24 answers"


def test_ctrl_c_shows_the_results_so_far_and_the_same_command_resumes(fake, small, tmp_path):
    whole = json.loads(run(*small, "--json", "-").stdout)
    target = tmp_path / "eval.json"
    forget = len(Reader.asked)
    Reader.fail_at = (forget + 10, KeyboardInterrupt())
    result = run(*small, "--json", target)
    assert (result.exit_code, result.stderr) == (130, "Interrupted\n")
    assert result.stdout.startswith(HEAD + "config  accuracy") and result.stdout.endswith(
        f"\n\n{STOPPED}; the same command resumes there, and writes its files when it is complete.\n"
    )
    assert "correct answers of 3 to 4 per configuration" in result.stdout
    assert not target.exists() and len(list(fake.cache.iterdir())) == 1 and Reader.open == 0
    Reader.fail_at = (forget + 13, KeyboardInterrupt())
    again = run(*small, "--json", "-")
    assert (again.exit_code, again.stderr) == (130, "resuming after 10 of 24 answers\nInterrupted\n")
    assert json.loads(again.stdout)["stopped"] == "interrupted"
    assert json.loads(again.stdout)["progress"]["answers"] == 13
    Reader.fail_at = None
    last = run(*small, "--json", target)
    assert (last.exit_code, last.stderr) == (0, "resuming after 13 of 24 answers\n")
    assert len(Reader.asked) - forget == 24 and list(fake.cache.iterdir()) == []
    found = json.loads(target.read_text())
    answers = [(r["config"], r["sample"], r["reply"], r["correct"]) for r in found["answers"]]
    assert answers == [(r["config"], r["sample"], r["reply"], r["correct"]) for r in whole["answers"]]


def test_without_an_answer_there_is_nothing_to_show(fake, small):
    Reader.fail_at = (0, KeyboardInterrupt())
    result = run(*small)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted\n")


def test_an_error_in_the_middle_shows_the_results_so_far(fake, small):
    Reader.fail_at = (10, GenerationError("out of memory"))
    result = run(*small)
    assert (result.exit_code, result.stderr) == (1, "Error: out of memory\n")
    assert "\nStopped early (out of memory) after 10 of 24 answers; the same command resumes" in result.stdout
    Reader.fail_at = None
    other = run(*small, "--seed", 1)
    assert (other.exit_code, other.stderr) == (0, ""), "other questions, another journal"
    assert run(*small).stderr == "resuming after 10 of 24 answers\n"


def test_an_error_of_the_perplexity_still_shows_the_answers(fake, small, monkeypatch):
    def measure(*_, windows, **__):
        raise GenerationError(f"no memory for {windows} windows")

    monkeypatch.setattr("swaa_edge.evaluate.perplexity.measure", measure)
    result = run(*small, "--task", "ppl")
    assert (result.exit_code, result.stderr) == (1, "Error: no memory for 4 windows\n")
    assert TABLE in result.stdout
    assert "(no memory for 4 windows) after 24 of 24 answers and 0 of 12 windows;" in result.stdout
    result = run(*small[:2], "ppl", *small[3:])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "Error: no memory for 4 windows\n")


def test_without_a_cache_folder_the_answers_are_reported_lost(fake, small, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    Reader.fail_at = (10, KeyboardInterrupt())
    result = run(*small)
    assert (result.exit_code, result.stderr) == (130, "Interrupted\n")
    assert result.stdout.endswith(
        f"\n{STOPPED}, which are lost, since the cache folder is not writable; give --journal FILE.\n"
    )


def test_a_journal_of_one_s_own_stays_and_fresh_forgets_it(fake, small, tmp_path):
    file = tmp_path / "answers"
    assert run(*small, "--journal", file).exit_code == 0 and len(file.read_text().splitlines()) == 25
    assert run(*small, "--journal", file).stderr == "resuming after 24 of 24 answers\n"
    assert len(Reader.asked) == 24 and not fake.cache.exists()
    other = run(*small, "--journal", file, "--seed", 5)
    message = "is the journal of another run (the model, samples or settings differ); choose another file"
    assert (other.exit_code, other.stderr) == (1, f"Error: {file} {message}\n")
    assert run(*small, "--journal", file, "--seed", 5, "--fresh").stderr == ""
    notes = tmp_path / "notes"
    notes.write_text("mine")
    for more, left in (((), ""), (("--fresh",), ", so --fresh keeps it")):
        result = run(*small, "--journal", notes, *more)
        assert result.stderr == f"Error: {notes} is not a journal of swaa-edge eval{left}; choose another file\n"
        assert result.exit_code == 1 and notes.read_text() == "mine"


# Configurations


def names(result):
    assert result.exit_code == 0, result.stderr
    return [row["config"] for row in json.loads(result.stdout)["table"]]


def test_the_configurations(fake, small, tmp_path):
    small = small[: small.index("--configs")]
    assert names(run(*small, "--json", "-")) == ["full", "naive", "quality", "balanced", "fast"]
    assert names(run(*small, "--window", 60, "--json", "-")) == ["full", "custom"]
    assert names(run(*small, "--recipe", "memory", "--json", "-")) == ["full", "memory"]
    own = tmp_path / "mine.json"
    own.write_text('{"sliding_window_size": 50, "keep_first": 3}')
    assert names(run(*small, "--configs", f"naive,{own}", "--json", "-")) == ["full", "naive", "mine"]
    assert Reader.loaded[-1][0] == SwaaConfig(50, 3)
    keyed = write_model(tmp_path / "keyed.gguf", *swaa_keys())
    small[0] = keyed
    assert names(run(*small, "--json", "-")) == ["full", "file"]
    assert Reader.loaded[-1][0] == SwaaConfig(2048, 64, [1, 3], [0], recipe="quality")
    assert names(run(*small, "--configs", "file,fast", "--json", "-")) == ["full", "file", "fast"]


def test_a_window_that_shows_everything_is_pointed_out(fake, small):
    small = small[: small.index("--configs")]
    result = run(*small, "--configs", "naive,fast", "--window", 200)
    assert (
        "\nnaive, fast: the window covers the whole prompt of 200 tokens, so nothing slides; give a smaller --window.\n"
        in (result.stdout)
    )


def test_the_default_length_is_what_the_model_takes(fake, file, tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text(" ".join(f"Line {n} says nothing here." for n in range(2000)))
    arguments = [file, "--task", "needle", "--samples", 1, "--haystack", prose, "--configs", "full", "--json", "-"]
    assert json.loads(run(*arguments).stdout)["settings"]["lengths"] == [4096 - 64]
    assert json.loads(run(*arguments, "--ctx", 300, "--max-tokens", 8).stdout)["settings"]["lengths"] == [292]
    assert Reader.loaded[-1][1] == 300


def test_plain_text_one_style_and_the_engine_s_options(fake, small):
    result = run(*small, "--no-chat", "--style", "spoken", "--threads", 3, "--ctx", 512)
    assert result.exit_code == 0 and "prompts of 200 tokens, plain text; seed 0" in result.stdout
    # Of what is hidden all is found in a decode that sees everything.
    assert re.search(r"^fast \* +100\.0%", result.stdout, re.MULTILINE)
    assert fake.engines[0][0] == EngineSettings(n_ctx=512, n_threads=3) and {n for _, n in Reader.loaded} == {512}
    assert not any(" only" in question for _, question in Reader.asked)


# Own files


def test_own_questions_and_how_they_are_scored(fake, file, tmp_path):
    fake.responses = {"Which?": " 31 and 47", "Who?": " Ann Lee."}
    own = lines(
        tmp_path,
        {"prompt": "a b", "question": "Which?", "answer": ["47", 31]},
        {"prompt": "a b", "question": "Who?", "answer": "ann lee", "id": "who"},
    )

    def accuracy(*more):
        result = run(file, "--task", own, "--configs", "full", "--json", "-", *more)
        assert result.exit_code == 0, result.stderr
        return [(r["sample"], r["correct"]) for r in json.loads(result.stdout)["answers"]]

    assert accuracy() == [("own/1", True), ("own/who", True)]
    assert accuracy("--scorer", "in-order") == [("own/1", False), ("own/who", True)]
    assert accuracy("--scorer", "exact") == [("own/1", False), ("own/who", True)]
    assert accuracy("--scorer", "regex") == [("own/1", True), ("own/who", False)]
    assert accuracy("--limit", 1) == [("own/1", True)]


def test_codes_in_another_order_are_wrong_in_built_in_questions_only(fake, small):
    fake.responses = {"codes of": " 10 11 12 " + " ".join(map(str, range(99, 9, -1)))}
    arguments = [*small[:2], "multi-needle", *small[3:], "--style", "direct", "--samples", 20]
    answers = json.loads(run(*arguments, "--json", "-", "--configs", "full", "--scorer", "contains").stdout or "{}")
    assert answers == {}, "--scorer applies to questions from a file"
    answers = json.loads(run(*arguments, "--json", "-").stdout)["answers"]
    assert 0 < sum(r["correct"] for r in answers) < len(answers)


def test_questions_that_are_too_long(fake, file, tmp_path):
    long = {"prompt": "word " * 80, "question": "Who?", "answer": "x"}
    own = lines(tmp_path, {"prompt": "a b", "question": "Who?", "answer": "x"}, long)
    arguments = [file, "--task", own, "--configs", "full", "--ctx", 100, "--max-tokens", 20]
    result = run(*arguments)
    tokens = 80 + 1 + 3  # with the question, and what the template puts around them
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {own}:2: a prompt of {tokens} tokens and 20 for the answer don't fit")
    assert result.stderr.count("\n") == 1
    result = run(*arguments, "--skip-long")
    assert "\n1 questions exceed the context and were skipped.\n" in result.stdout and len(Reader.asked) == 1


@pytest.mark.parametrize(
    "records, message",
    [
        (['{"prompt": "a", "answer": "b"}', '{"prompt": "a", "answer" "b"}'], ":2: malformed JSON at column 26"),
        (['{"prompt": "a", "answer": "b"}', "", '{"prompt": "a"}'], ":3: the field answer is missing; the record has"),
        (['{"answer": "b"}'], ":1: the field prompt is missing; the record has answer"),
    ],
)
def test_wrong_lines(fake, file, tmp_path, records, message):
    own = lines(tmp_path, *records)
    result = run(file, "--task", f"needle,{own}", "--prompt-tokens", "100", "--configs", "full")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {own}{message}") and result.stderr.count("\n") == 1
    assert Reader.loaded == ()


def test_a_wrong_pattern_names_its_line(fake, file, tmp_path):
    own = lines(tmp_path, {"prompt": "a", "answer": "ok"}, {"prompt": "a", "answer": "(47"})
    result = run(file, "--task", own, "--scorer", "regex")
    assert result.stderr.startswith(f"Error: {own}:2: answer '(47' is not a regular expression: ")
    assert (result.exit_code, result.stderr.count("\n"), Reader.loaded) == (1, 1, ())


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--task", ","], 1, "the list of tasks is empty; give some of needle, multi-needle, kv, chain, ppl, or a"),
        (["--configs", ""], 1, "--configs is empty; name some of full, naive, quality,"),
        (["--task", "needel"], 1, "there is no task needel (is it needle?); there are needle, multi-needle, kv, "),
        (["--task", "none.jsonl"], 1, "cannot read none.jsonl: No such file or directory"),
        (["--task", "a.jsonl,b/a.jsonl"], 1, "two tasks have the name a; rename one of the files"),
        (["--configs", "fsat"], 1, "there is no configuration fsat (is it fast?); there are full, naive, quality, "),
        (["--configs", "fast,fast"], 1, "--configs has fast twice; name each configuration once"),
        (["--configs", "file"], 1, "--configs file: "),
        (["--configs", "fast", "--recipe", "fast"], 1, "--configs can't be combined with --recipe or --config"),
        (
            ["--prompt-tokens", "4090"],
            1,
            "a prompt of 4090 tokens and 64 for the answer exceed the context of 4096 tok",
        ),
        (["--prompt-tokens", "20", "--task", "kv"], 1, "kv doesn't fit into a prompt of 20 tokens; give at least "),
        (
            ["--prompt-tokens", "100", "--task", "needle", "--beyond", "100"],
            1,
            "beyond = 100 must be at most 93 in needle prompts of 100 tokens",
        ),
        (
            ["--prompt-tokens", "12"],
            2,
            "Invalid value for '--prompt-tokens': '12' must be numbers from 16 to 2147483647, as in 40",
        ),
        (["--depths", "0,2"], 2, "Invalid value for '--depths': '0,2' must be numbers from 0 to 1, as in 0,0.5,1"),
        (["--depths", "nan"], 2, "Invalid value for '--depths': 'nan' must be"),
        (["--needles", "1"], 1, "needles = 1 must be from 2 to "),
        (["--scorer", "exact"], 2, "--scorer applies to questions from a file; add --task FILE.jsonl"),
        (["--judge", "http://x/v1", "--task", "a.jsonl"], 1, "a judge needs both --judge URL and --judge-model NAME"),
        (["--scorer", "judge", "--task", "a.jsonl"], 1, "--scorer judge requires --judge URL and --judge-m"),
        (["--text", "a.txt"], 2, "--text applies to the task ppl; add --task ppl"),
        (["--task", "ppl", "--plot", "a.png"], 2, "--plot shows accuracy, which ppl does not measure"),
        (["--task", "kv", "--heatmap", "a.png"], 2, "--heatmap shows the task needle; add needle to --task"),
        (["--task", "ppl", "--text", "none"], 1, "cannot read none: No such file or directory"),
        (["--task", "needle,ppl", "--text", "model.gguf"], 1, "model.gguf is not UTF-8 text (byte "),
        (["--task", "needle,ppl", "--text", "short.txt"], 1, "the text has 3 tokens, fewer than a window of 200"),
        (["--haystack", "blank.txt"], 1, "blank.txt is empty; give a file with text"),
        (["--plot", "a.bmp"], 1, "a.bmp must end in one of .png, .svg, .pdf"),
        (["--plot", "a.png", "--json", "a.png"], 1, "a.png can't be both a JSON file and a picture; give two names"),
        (["--json", "none/a.json"], 1, "the folder none does not exist; create it or choose another output"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_loaded(fake, file, tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    if any(arg.startswith("a.") and arg.endswith(("png", "bmp")) for arg in args):
        pytest.importorskip("matplotlib")
    (tmp_path / "short.txt").write_text("only three words")
    (tmp_path / "blank.txt").write_text(" \n")
    before = sorted(tmp_path.iterdir())
    more = [] if "--prompt-tokens" in args else ["--prompt-tokens", "200"]
    result = run("model.gguf", *more, *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(f"Error: {message}") and result.stderr.count("\n") == 1, result.stderr
    assert Reader.loaded == () and sorted(tmp_path.iterdir()) == before


# The real engine


@pytest.mark.native
def test_tasks_a_file_and_perplexity_on_the_engine(gguf_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = lines(tmp_path, {"prompt": "A fox. " * 90, "question": "Who?", "answer": "fox"})
    arguments = [
        gguf_model("qwen3", layers=4),
        "--task",
        f"needle,{own},ppl",
        "--prompt-tokens",
        320,
        "--samples",
        2,
        "--configs",
        "naive",
        "--window",
        64,
        "--max-tokens",
        4,
        "--ubatch",
        128,
        "--threads",
        1,
        "--json",
        "-",
    ]
    whole = json.loads(run(*arguments, "--journal", tmp_path / "journal").stdout)
    assert [row["samples"] for row in whole["table"]] == [3, 3] and whole["table"][0]["prompt_tokens"] == 320
    full, naive = whole["perplexity"]["perplexity"]
    assert full["windows"] == naive["windows"] == 2 and full["kl"] == 0 < naive["kl"] and full["ppl"] > 1
    assert [r["prompt_tokens"] for r in whole["answers"]] == [320, 320, whole["answers"][2]["prompt_tokens"]] * 2
    responses = {(r["config"], r["sample"]): r["reply"] for r in whole["answers"]}
    assert {r for (name, _), r in responses.items() if name == "full"} != {
        r for (name, _), r in responses.items() if name == "naive"
    }, "a window of 64 changes nothing"
    # Interrupted after three answers, and after one window; then the same command to its end.
    add, kept = Journal.add, []

    def adds(self, record):
        add(self, record)
        kept.append(record)
        if len(kept) in (3, 7):
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", adds)
    for message, answers in (("Interrupted\n", 3), ("resuming after 3 of 6 answers\nInterrupted\n", 6)):
        result = run(*arguments)
        assert (result.exit_code, result.stderr) == (130, message)
        assert json.loads(result.stdout)["progress"]["answers"] == answers
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (
        0,
        "resuming after 6 of 6 answers\nresuming after 1 of 4 windows\n",
    )
    again = json.loads(result.stdout)
    assert {(r["config"], r["sample"]): r["reply"] for r in again["answers"]} == responses
    assert again["perplexity"] == whole["perplexity"] and len(kept) == 10
    assert list((tmp_path / "cache" / "swaa-edge").iterdir()) == []
