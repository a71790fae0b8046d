"""The mutations of scripts/mutate.py fit the sources. Whether tests notice them takes an hour of scripts/mutate.py.

pytest tests/scripts/test_mutate.py
"""

import os

import mutate
import pytest
from patches_lib.workspace import mirror, walk


def test_every_mutation_fits_the_patched_tree():
    if not mutate.TREE.is_dir():
        pytest.skip("no vendor/llama.cpp-patched; run `make setup`")
    mutations = mutate.read_mutations()
    assert len(mutations) >= 20
    assert len({mutation.name for mutation in mutations}) == len(mutations)
    assert all(mutation.old != mutation.new for mutation in mutations)
    assert mutate.stale(mutate.TREE, mutations) == []


def test_a_mutation_that_no_longer_fits_is_named(tmp_path):
    (tmp_path / "a.cpp").write_text("x < y; x < y;")
    problems = mutate.stale(
        tmp_path,
        [
            mutate.Mutation("twice", "a.cpp", "x < y", "x <= y"),
            mutate.Mutation("gone", "a.cpp", "x > y", "x >= y"),
            mutate.Mutation("no file", "b.cpp", "x < y", "x <= y"),
            mutate.Mutation("fits", "a.cpp", "x < y; x", "x <= y; x"),
        ],
    )
    assert problems == [
        "twice: a.cpp has it 2 times, expected once: 'x < y'",
        "gone: a.cpp has it 0 times, expected once: 'x > y'",
        "no file: b.cpp is missing, expected once: 'x < y'",
    ]


@pytest.mark.parametrize("text", ["a name\n", "a name\n  in f\n  -  x\n", "a name\n  in f\n  +  y\n  -  x\n"])
def test_an_incomplete_list(tmp_path, text):
    (tmp_path / "mutations.txt").write_text(text)
    with pytest.raises(ValueError, match=r"mutations\.txt:\d+: expected a name"):
        mutate.read_mutations(tmp_path / "mutations.txt")


def test_a_wrong_call_runs_nothing(capsys):
    with pytest.raises(SystemExit) as ended:
        mutate.main(["--only", "no such mutation"])
    assert ended.value.code == 2
    assert "no mutation has" in capsys.readouterr().err


def test_the_copy_is_brought_in_step_by_content(tmp_path):
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    for name, text in {"a.cpp": "new", "src/b.cpp": "same", "src/c.cpp": "added"}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
        os.utime(tree / name, (1, 1))  # older than what was built from the copy
    for name, text in {"a.cpp": "old", "src/b.cpp": "same", "gone.cpp": "gone"}.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text)
        os.utime(copy / name, (1000, 1000))
    mirror({name: path.read_bytes() for name, path in walk(tree).items()}, copy)
    found = {str(path.relative_to(copy)): path.read_text() for path in copy.rglob("*") if path.is_file()}
    assert found == {"a.cpp": "new", "src/b.cpp": "same", "src/c.cpp": "added"}
    assert (copy / "src/b.cpp").stat().st_mtime == 1000
    assert (copy / "a.cpp").stat().st_mtime > 1000
