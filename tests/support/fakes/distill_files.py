"""The command `distill` and its files, as its tests write and read them.

Use: `run(model, "--data", lines("own.jsonl", record), "-o", "out.jsonl"); read("out.jsonl")`
"""

import json

from click.testing import CliRunner

from swaa_edge.cli import cli


def run(*args):
    return CliRunner().invoke(cli, ["distill", *map(str, args)], prog_name="swaa-edge")


def lines(path, *records):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    return path


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
