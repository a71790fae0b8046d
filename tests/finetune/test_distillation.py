"""`distill` with the demo model: the data it writes, interrupted runs, and the example of docs/distill.md."""

import json
import random

import pytest

from support.docs import run_example
from support.fakes.distill_files import lines, read, run
from swaa_edge.evaluate.facts import ask_codes, code_fact
from swaa_edge.support.journal import Journal


@pytest.fixture(scope="module")
def demo():
    from swaa_edge.demo import MODEL

    return str(MODEL)


def needles(path, count, words=150):
    """A file of questions on short documents; two follow one another on each."""
    from swaa_edge.support.sample_text import real_text

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
def test_the_command_resumes_to_the_same_bytes(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = needles(tmp_path / "needles.jsonl", 8)
    out = tmp_path / "out.jsonl"
    arguments = [
        demo,
        "--data",
        data,
        "-o",
        out,
        "--max-tokens",
        24,
        "--samples",
        3,
        "--keep",
        2,
        "--threads",
        1,
        "--temp",
        1.5,
        "--ubatch",
        64,
        "--batch",
        64,
    ]
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    counts, kept, asked = json.loads(result.stdout), read(out), read(data)
    assert len(kept) == counts["kept"] >= 4 and counts["records"] == 8
    for line in kept:
        source = asked[int(line["id"]) - 1]
        assert line["prompt"] == source["prompt"] and line["question"] == source["question"]
        assert source["answer"] in line["answer"] and line["reference"] == [source["answer"]]
    whole = out.read_bytes()
    # Interrupted after every few responses; the rest is asked of a model that has prefilled something else before.
    add, count = Journal.add, 0

    def adds(self, response):
        nonlocal count
        add(self, response)
        count += 1
        if count in (2, 6, 9):
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", adds)
    for _ in range(3):
        result = run(*arguments, "--force")
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "Interrupted")
    result = run(*arguments, "--force")
    assert (result.exit_code, result.stderr) == (0, "resuming after 9 responses\n")
    assert count == counts["responses"] > 9 and out.read_bytes() == whole


@pytest.mark.native
def test_the_example_of_the_docs(demo, tmp_path):
    (tmp_path / "model.gguf").symlink_to(demo)
    needles(tmp_path / "questions.jsonl", 4)
    output = run_example("docs/distill.md", 0, tmp_path)
    assert " responses to 4 records: " in output and output.endswith("\nwrote data.jsonl\n")
    assert read(tmp_path / "data.jsonl")
