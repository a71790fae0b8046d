"""The shape of the package: which room may import which, and how large modules, commands and functions may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support import ROOT

# Lowest first: a room imports only rooms to its left.
ORDER = [
    *("errors", "support", "layers", "config", "metadata", "files", "native", "convert"),
    *("engine", "llama", "kvsize", "hf", "describe", "generate", "server"),
    *("shapes", "bench", "evaluate", "calibrate", "finetune", "demo", "cli"),
]
# The only upward imports, all within functions.
DOORS = {
    ("config", "metadata"),  # SwaaConfig.from_gguf
    ("metadata", "files"),  # read_swaa
    ("engine", "llama"),  # EngineSettings.load
}
# Where the names come from that swaa_edge/__init__.py exports.
ROOT_NAMES = {"SwaaConfig": "config", "SwaaError": "errors", "SwaaLlama": "llama", "__version__": None}
LONG = "Long because"


def modules():
    found = {}
    for folder in ("swaa_edge", "convert"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "__pycache__" not in path.parts:
                found[path.relative_to(ROOT).as_posix()] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def room_of(path):
    """The room of a file: "swaa_edge/files/header.py" is in files, "swaa_edge/hf.py" in hf."""
    parts = Path(path).with_suffix("").parts
    return parts[0] if parts[0] == "convert" else parts[1]


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree, *, in_functions):
    """(line, room) for each import of our own: those of the module level, or those in functions."""
    found = []

    def visit(node, inside):
        if is_type_checking(node):
            return
        if isinstance(node, ast.ImportFrom | ast.Import) and inside == in_functions:
            found.extend((node.lineno, room) for room in rooms(node))
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(tree, False)
    return found


def rooms(node):
    names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    for name in filter(None, names):
        if name == "swaa_edge" and isinstance(node, ast.ImportFrom):
            yield from (ROOT_NAMES.get(alias.name, alias.name) for alias in node.names)
        elif name.startswith("swaa_edge."):
            yield name.split(".")[1]
        elif name.split(".")[0] == "convert":
            yield "convert"


def upward(path, *, in_functions):
    own = room_of(path)
    return [
        (line, room)
        for line, room in imports(MODULES[path], in_functions=in_functions)
        if room is not None and room != own and ORDER.index(room) > ORDER.index(own)
    ]


PLACED = [path for path in MODULES if room_of(path) not in ("__init__", "__main__")]


def test_every_room_has_its_place_in_the_order():
    assert {room_of(path) for path in PLACED} == set(ORDER)


@pytest.mark.parametrize("path", PLACED)
def test_modules_import_only_lower_rooms(path):
    assert upward(path, in_functions=False) == []


def test_functions_import_upwards_only_by_the_doors():
    found = {(room_of(path), room) for path in PLACED for _, room in upward(path, in_functions=True)}
    assert found == DOORS


def test_commands_do_not_import_one_another():
    commands = [path for path in MODULES if path.startswith("swaa_edge/cli/") and path.count("/") == 2]
    assert len(commands) > 12
    for path in commands:
        tree = ast.walk(MODULES[path])
        names = [node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module]
        wrong = [name for name in names if name.startswith("swaa_edge.cli.") and ".options" not in name]
        assert wrong == [], path


def test_at_most_twelve_modules_stand_beside_the_rooms():
    assert len(list((ROOT / "swaa_edge").glob("*.py"))) <= 12


def test_no_command_is_longer_than_150_lines():
    files = sorted((ROOT / "swaa_edge" / "cli").glob("*.py"))
    assert len(files) >= 14
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 150} == {}


def test_no_module_is_longer_than_350_lines():
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_a_function_over_60_lines_has_a_reason():
    long = []
    for path, tree in MODULES.items():
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if not any(LONG in line for line in (lines[first - 2], lines[node.lineno - 2], lines[node.lineno - 1])):
                    long.append(f"{path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert long == []
