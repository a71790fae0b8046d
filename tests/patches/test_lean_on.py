"""What patches/README.md says we lean on is there: in the pinned llama.cpp and in the installed llama-cpp-python.

Names and messages are looked up in the files that the README's tables name; lists of architectures are derived from
llama.cpp's sources and compared with ours. After a move to another upstream, each failure is something to look at.

    pytest tests/patches/test_lean_on.py
"""

import ast
import functools
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATCHES = ROOT / "patches"
UPSTREAM = ROOT / "vendor" / "llama.cpp"
OURS = [*(ROOT / "swaa_edge").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]

pytestmark = pytest.mark.skipif(not UPSTREAM.is_dir(), reason="vendor/llama.cpp is not there; `make setup` makes it")


def rows(title, *, level=3):
    """The rows of the table below a heading of the README, as lists of cells."""
    text = (PATCHES / "README.md").read_text(encoding="utf-8")
    section = re.split(r"\n#{2,%d} " % level, text.split(f"\n{'#' * level} {title}\n", 1)[1], maxsplit=1)[0]  # noqa: UP031
    table = [line for line in section.splitlines() if line.startswith("|")]
    assert len(table) > 2, title
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


@functools.cache
def source(name):
    """The text of a file of the pinned tree, or of llama_cpp as it is installed."""
    folder = UPSTREAM
    if name.startswith("llama_cpp/"):
        # found, not imported: importing it loads a library
        spec = importlib.util.find_spec("llama_cpp")
        assert spec is not None and spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0]).parent
    return (folder / name).read_text(encoding="utf-8")


def has(text, name):
    """Whether the text is in the file; a plain name must be a whole word."""
    pattern = re.escape(text)
    if re.fullmatch(r"\w+", text):
        pattern = rf"\b{pattern}\b"
    return re.search(pattern, source(name)) is not None


LEANED_ON = [
    (text, quoted(row[1])[0])
    for title in ("llama.cpp and ggml", "llama-cpp-python", "Messages that we recognise", "The converter")
    for row in rows(title)
    for text in quoted(row[0])
]


@pytest.mark.parametrize("text, name", LEANED_ON)
def test_it_is_still_there(text, name):
    assert has(text, name), f"{name} no longer has {text!r}: see patches/README.md"


def test_a_name_that_is_gone_would_be_noticed():
    assert len(LEANED_ON) > 70
    assert not has("v_cell", "src/llama-kv-cache.h")
    assert not has("llama_decode returns", "llama_cpp/_internals.py")


@pytest.mark.parametrize(
    "text", [text for title in ("Messages that we recognise",) for row in rows(title) for text in quoted(row[0])]
)
def test_a_message_is_one_that_we_recognise(text):
    words = text if "%" not in text else r"\[ *(\d+)/ *(\d+)\]"
    assert any(words in path.read_text(encoding="utf-8") for path in OURS), f"nothing matches {text!r}: drop its row"


def squeezed(text):
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"\s*([(),&*<>])\s*", r"\1", re.sub(r"\s+", " ", text)).strip()


def declarations():
    block = (PATCHES / "README.md").read_text(encoding="utf-8").split("```cpp\n", 1)[1].split("```", 1)[0]
    for part in re.split(r"^// ", block, flags=re.MULTILINE)[1:]:
        name, text = part.split("\n", 1)
        whole = re.sub(r"//[^\n]*", "", text)
        for declaration in re.split(r";\n|,\n(?=\S)|;\s*$", re.sub(r" +\n", "\n", whole)):
            if declaration.strip():
                yield squeezed(declaration), name


@pytest.mark.parametrize("declaration, name", list(declarations()))
def test_a_declaration_is_unchanged(declaration, name):
    assert declaration in squeezed(source(name)), f"{name} declares it otherwise: {declaration}"


def test_free_source_of_the_attention_op():
    assert int(re.search(r"#define GGML_MAX_SRC\s+(\d+)", source("ggml/include/ggml.h"))[1]) >= 6
    body = source("ggml/src/ggml.c").split("struct ggml_tensor * ggml_flash_attn_ext(", 1)[1].split("\n}\n", 1)[0]
    assert {int(n) for n in re.findall(r"result->src\[(\d+)\]", body)} <= {0, 1, 2, 3}
    assert re.search(r"\ba->src\[4\] = sinks", source("ggml/src/ggml.c"))


def test_privates_of_llama_cpp_are_listed():
    """Every private name of llama_cpp's Llama that our Python uses is in the table."""
    theirs = set()
    for node in ast.walk(ast.parse(source("llama_cpp/llama.py"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            theirs.add(node.attr)
        elif isinstance(node, ast.FunctionDef):
            theirs.add(node.name)
    theirs = {name for name in theirs if re.match(r"_[a-z]", name)}
    used = set()
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in theirs:
                used.add(node.attr)
    assert {"_ctx", "_requires_eval"} <= used
    listed = {text for row in rows("llama-cpp-python") for text in quoted(row[0])}
    assert used <= listed, "add to patches/README.md"


# Where we hook in


def hooks():
    """(patch number, file) of every file that the series changes."""
    found = set()
    for name in (PATCHES / "series").read_text(encoding="utf-8").split():
        text = (PATCHES / name).read_text(encoding="utf-8")
        found |= {(name[:4], path) for path in re.findall(r"^diff --git a/(\S+) ", text, re.MULTILINE)}
    return found


def test_the_map_names_every_hook():
    listed = rows("Where we hook in", level=2)
    assert {(row[0], quoted(row[1])[0]) for row in listed} == hooks()


@pytest.mark.parametrize(
    "name, where", [(quoted(row[1])[0], text) for row in rows("Where we hook in", level=2) for text in quoted(row[2])]
)
def test_a_hook_is_where_the_map_says(name, where):
    assert has(where, name)


# Lists of architectures, derived from upstream's sources


def switch_cases(text, function):
    """{body of a group of cases: architectures} of the first switch in a function's definition."""
    body = re.search(rf"^[^\n;]*\b{re.escape(function)}\([^;{{]*\{{\n(.*?)^\}}", text, re.DOTALL | re.MULTILINE)[1]
    groups, names, lines = [], [], []
    for line in body.splitlines():
        found = re.findall(r"case (LLM_ARCH_\w+):", line)
        if (found or re.match(r"\s*default:", line)) and lines:
            groups.append(("\n".join(lines), names))
            names, lines = [], []
        if re.match(r"\s*default:", line):
            names = ["default"]
        names = names + found
        rest = re.sub(r"case LLM_ARCH_\w+:", "", line).strip()
        if names and rest and not rest.startswith("//"):
            lines.append(rest)
    return [*groups, ("\n".join(lines), names)]


@functools.cache
def architectures():
    """{LLM_ARCH_X: name in files}"""
    found = dict(re.findall(r'\{ (LLM_ARCH_\w+),\s*"([^"]+)"', source("src/llama-arch.cpp")))
    found.pop("LLM_ARCH_UNKNOWN")
    assert len(found) > 130
    return found


def names_where(file, function, keep):
    return {
        architectures()[arch]
        for body, group in switch_cases(source(file), function)
        for arch in group
        if arch in architectures() and keep(body)
    }


@functools.cache
def classes():
    """{architecture: its class and the classes it derives from, nearest first}; one without a class can't be loaded."""
    bases = dict(
        re.findall(r"^struct llama_model_(\w+) : public llama_model_(\w+)", source("src/models/models.h"), re.MULTILINE)
    )
    mapping = source("src/llama-model.cpp")
    found = {}
    for arch, name in re.findall(r"case (LLM_ARCH_\w+):\s*return new llama_model_(\w+)\(", mapping):
        line = [name]
        while line[-1] in bases:
            line.append(bases[line[-1]])
        found[architectures()[arch]] = line
    assert len(found) > 130
    return found


@functools.cache
def definitions(method):
    """{class: (file, body)} of a method of the model classes."""
    found = {}
    for path in sorted((UPSTREAM / "src/models").glob("*.cpp")):
        text = path.read_text(encoding="utf-8")
        pattern = rf"^[^\n;]*\bllama_model_(\w+)::{method}\([^;{{]*\{{\n(.*?)^\}}"
        for name, body in re.findall(pattern, text, re.DOTALL | re.MULTILINE):
            found[name] = (path.name, body)
    assert len(found) > 100
    return found


def own(architecture, method):
    """(file, body) of the method that the architecture's class has or inherits; ("", "") without one."""
    return next(
        (definitions(method)[name] for name in classes()[architecture] if name in definitions(method)), ("", "")
    )


INPUTS = re.compile(r"\b(build_attn_inp_\w+|build_inp_mem_\w+|build_rs_inp)\(")


@functools.cache
def graph_source(name):
    """The code that builds the graph of a class: its constructors, or those of the graph that it borrows."""
    struct = re.search(
        rf"^struct llama_model_{name} .*?^\}};", source("src/models/models.h"), re.DOTALL | re.MULTILINE
    )[0]
    borrowed = re.search(r"using graph = llama_model_(\w+)::graph", struct) or re.search(
        r"struct graph\w* : public llama_model_(\w+)::graph", struct
    )
    texts = [path.read_text(encoding="utf-8") for path in sorted((UPSTREAM / "src/models").glob("*.cpp"))]
    mine = [text for text in texts if re.search(rf"\bllama_model_{name}::graph\w*(<[^>]*>)?::graph", text)]
    if mine:
        return "\n".join(mine)
    return graph_source(borrowed[1]) if borrowed else ""


def inputs(architecture):
    """What the graphs of an architecture attend with, by name of the function that makes it."""
    for name in classes()[architecture][:-1]:
        if found := set(INPUTS.findall(graph_source(name))):
            break
    else:
        return set()
    if {"build_attn_inp_no_cache", "build_attn_inp_kv"} <= found:  # template <bool embed> graph
        embeds = "graph<true>" in own(architecture, "build_arch_graph")[1]
        found -= {"build_attn_inp_kv" if embeds else "build_attn_inp_no_cache"}
    return found


def sets_window(architecture):
    """Whether loading the hyperparameters can set a type of window."""
    return re.search(r"swa_type\s*=\s*LLAMA_SWA_TYPE_(?!NONE)", own(architecture, "load_arch_hparams")[1]) is not None


@functools.cache
def derived():
    names = set(classes())
    arch, model = "src/llama-arch.cpp", "src/llama-model.cpp"
    true = lambda body: "return true" in body  # noqa: E731
    recurrent = names_where(arch, "llm_arch_is_recurrent", true) | names_where(arch, "llm_arch_is_hybrid", true)
    encoders = names_where(arch, "llm_arch_is_diffusion", true) | names_where(model, "llama_model_has_encoder", true)
    encoders |= names_where(model, "llama_model::create_memory", lambda body: "res = nullptr" in body)
    encoders |= {name for name in names if inputs(name) == {"build_attn_inp_no_cache"}} | {"clip"}
    attention = names_where(model, "llama_model::create_memory", lambda body: "res = nullptr" not in body)
    attention -= recurrent | encoders
    left = names - recurrent - encoders - attention
    windows = {name for name in left if "build_attn_inp_kv_iswa" in inputs(name)}
    if_given = {
        name for name in windows if "build_attn_inp_kv" in inputs(name) and sets_window(name)
    }  # phi3 never does
    windows -= {name for name in windows if "build_attn_inp_kv" in inputs(name)}
    return {
        "_RECURRENT": recurrent, "_ENCODERS": encoders, "_OWN_ATTENTION": attention,
        "_OWN_WINDOW": windows, "_WINDOW_IF_GIVEN": if_given,
    }  # fmt: skip


def listed(name):
    """One of our lists, from whatever module of swaa_edge defines it."""
    for path in OURS:
        if re.search(rf"^{name} = ", path.read_text(encoding="utf-8"), re.MULTILINE):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            return set(getattr(importlib.import_module(module), name))
    raise AssertionError(f"no module defines {name}")


@pytest.mark.parametrize("name", ["_RECURRENT", "_ENCODERS", "_OWN_ATTENTION", "_OWN_WINDOW", "_WINDOW_IF_GIVEN"])
def test_architectures_without_swaa(name):
    special = {"llama4", "exaone4"} if name == "_WINDOW_IF_GIVEN" else set()  # decided by other keys, in code
    assert listed(name) | special == derived()[name]


def test_all_others_attend_by_the_plain_input():
    """SWAA hooks into that one; latent attention, which some of these have too, is recognised by a key."""
    others = set(classes()) - set().union(*derived().values())
    assert len(others) > 70
    for name in sorted(others):
        found = inputs(name)
        assert "build_attn_inp_kv" in found, name
        if "build_attn_inp_k" in found:
            assert any("is_mla()" in graph_source(c) for c in classes()[name][:-1]), name
        if "build_attn_inp_kv_iswa" in found:
            assert not sets_window(name), name
        assert found <= {"build_attn_inp_kv", "build_attn_inp_k", "build_attn_inp_kv_iswa"}, name
    assert {"llama", "mistral3", "qwen2", "qwen3", "qwen3moe", "phi3", "granite", "glm4", "smollm3"} <= others


def test_architectures_with_windows_set_them():
    """A graph with windows has a window type set where its hyperparameters are loaded, and no other graph has."""
    left = set(classes())
    for name in ("_RECURRENT", "_ENCODERS", "_OWN_ATTENTION"):
        left -= derived()[name]
    set_here = {name for name in left if sets_window(name)}
    assert set_here == derived()["_OWN_WINDOW"] | derived()["_WINDOW_IF_GIVEN"]


@pytest.mark.parametrize("name, conditional", [("_MULTI_POSITION", False), ("_MULTI_POSITION_IF_GIVEN", True)])
def test_architectures_with_several_positions(name, conditional):
    """Of those that SWAA can be applied to: the others never get a ring."""
    several = names_where(
        "src/llama-model.cpp",
        "llama_model_rope_type",
        lambda body: "MROPE" in body and bool(re.search(r"\?|\bif \(", body)) == conditional,
    )
    refused = derived()["_RECURRENT"] | derived()["_ENCODERS"] | derived()["_OWN_ATTENTION"]
    assert several
    assert listed(name) - refused == several - refused
