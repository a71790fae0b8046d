"""The GPU check without a GPU: which files travel, which kernels are left out, which objects are shared, which stages
are skipped, and a whole run on the CPU with built libraries, from packing to the report.

pytest tests/scripts/test_gpu_check.py
"""

import json
import subprocess
import sys
import tarfile
import time
import venv
from pathlib import Path

import numpy as np
import pytest
from gpu import cases, measuring, objects, operators, oracle, packing, report, trimming
from gpu import check as gpu_check
from gpu.runner import CheckError, OutOfTime, Runner, execute

from support import ROOT
from support.engine.process import library_dir
from support.oracle.grid import Case, schedule

SCRIPTS = ROOT / "scripts"
NATIVE = ROOT / "build/editable/bin"
BASELINE = ROOT / "build/baseline/lib"


# What travels


def test_the_archive_holds_both_trees_once_and_what_runs_them(tmp_path):
    trees = (ROOT / packing.PATCHED, ROOT / packing.BASELINE)
    if not all(tree.is_dir() for tree in trees):
        pytest.skip("the trees are not there; scripts/patches.py apply makes them")
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "cases.json").write_text("[]")
    facts = packing.pack(tmp_path / "a.tar.gz", prepared=prepared)
    assert (tmp_path / "a.tar.gz").stat().st_size < 6e6
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
        links = [entry for entry in archive if entry.islnk()]
    top = tmp_path / packing.TOP
    assert json.loads((top / "PACK.json").read_text()) == facts
    assert (top / "prepared/cases.json").read_text() == "[]" and (top / "site/llama_cpp/llama_cpp.py").exists()
    for tree in (packing.PATCHED, packing.BASELINE):
        for name in ("src/llama.cpp", "ggml/src/ggml.c", "ggml/src/ggml-cuda/fattn.cu", "CMakeLists.txt"):
            assert (top / tree / name).read_bytes() == (ROOT / tree / name).read_bytes(), name
        assert not (top / tree / "ggml/src/ggml-vulkan").exists() and not (top / tree / "tools").exists()
    ours = "ggml/include/ggml-kv-blocks.h"
    assert (top / packing.PATCHED / ours).exists() and not (top / packing.BASELINE / ours).exists()
    assert len(links) > 500
    # The same content, the same digest; another content, another.
    assert packing.pack(tmp_path / "b.tar.gz", prepared=prepared)["digest"] == facts["digest"]
    (prepared / "cases.json").write_text("[1]")
    assert packing.pack(tmp_path / "b.tar.gz", prepared=prepared)["digest"] != facts["digest"]


def test_built_libraries_travel_instead_of_sources(tmp_path):
    folders = {side: tmp_path / side for side in ("patched", "baseline")}
    for side, folder in folders.items():
        folder.mkdir()
        for name in ("libggml-cuda.so", "test-backend-ops", "build.log"):
            (folder / name).write_text(f"{name} of {side}")
    folders["baseline"].joinpath("test-backend-ops").unlink()
    facts = packing.pack(tmp_path / "a.tar.gz", built_for="90", built=folders)
    assert facts["built_for"] == "90" and "head sizes other than 128" in facts["left_out"]
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        names = [name.removeprefix(f"{packing.TOP}/") for name in archive.getnames()]
    assert [name for name in names if name.startswith(packing.BUILT)] == [
        "built/patched/libggml-cuda.so",
        "built/patched/test-backend-ops",
        "built/baseline/libggml-cuda.so",
    ]
    assert not any(name.startswith("vendor/") for name in names) and "scripts/gpu/check.py" in names
    (folders["baseline"] / "libggml-cuda.so").write_text("another")
    assert packing.pack(tmp_path / "b.tar.gz", built_for="90", built=folders)["digest"] != facts["digest"]


def test_a_compute_capability_is_two_or_three_digits(capsys):
    parser = gpu_check.make_parser()
    assert [parser.parse_args(["pack", "--arch", text]).arch for text in ("90", "8.6", "12.0")] == ["90", "86", "120"]
    with pytest.raises(SystemExit):
        parser.parse_args(["pack", "--arch", "hopper"])
    assert "hopper must be a compute capability, like 90 or 8.6" in capsys.readouterr().err


def test_without_the_trees_the_error_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"patches.py apply"):
        packing.pack(tmp_path / "a.tar.gz", root=tmp_path)


# What is left out

MMA = """#include "../fattn-mma-f16.cuh"

DECL_FATTN_MMA_F16_CASE(64, 64, 8, 4);
DECL_FATTN_MMA_F16_CASE(128, 128, 8, 4);
DECL_FATTN_MMA_F16_CASE(192, 128, 8, 4);
"""
MMQ = '#include "../mmq.cuh"\n\nDECL_MMQ_CASE(GGML_TYPE_MXFP4);\n\nDECL_MMQ_CASE_W4A4(GGML_TYPE_MXFP4);\n'


def test_left_out_kernels_still_link_and_the_others_stay():
    place = trimming.INSTANCES
    tree = {
        f"{place}mma.cu": MMA,
        f"{place}tile.cu": "DECL_FATTN_TILE_CASE(40, 40);\n",
        f"{place}vec.cu": "DECL_FATTN_VEC_CASE( 64, GGML_TYPE_F16, GGML_TYPE_F16);\n",
        f"{place}mmq-instance-mxfp4.cu": MMQ,
        f"{place}mmq-instance-q8_0.cu": "DECL_MMQ_CASE(GGML_TYPE_Q8_0);\n",
        "src/llama.cpp": MMA,
    }
    tree = {path: text.encode() for path, text in tree.items()}

    def changed(**what):
        smaller = trimming.trim(tree, **what)
        return {path: data.decode() for path, data in smaller.items() if tree.get(path) != data}

    fewer = changed(heads=(128,))
    assert fewer[f"{place}mma.cu"] == '#include "../fattn-mma-f16.cuh"\n\nDECL_FATTN_MMA_F16_CASE(128, 128, 8, 4);\n'
    stubs = fewer[f"{place}fattn-mma-left-out.cu"]
    assert "ggml_cuda_flash_attn_ext_mma_f16_case<64, 64, 8, 4>(" in stubs and "<192, 128, 8, 4>(" in stubs
    assert "<128, 128" not in stubs and "GGML_ABORT" in stubs
    assert "tile_case<40, 40>(" in fewer[f"{place}fattn-tile-left-out.cu"]
    products = fewer[f"{place}mmq-instance-mxfp4.cu"]
    assert "mul_mat_q_case<GGML_TYPE_MXFP4>(" in products and "<GGML_TYPE_MXFP4, GGML_PREC_Q4>(" in products
    assert "mmq.cuh" not in products and len(fewer) == 5
    # Everything stays if nothing is to go.
    assert changed(heads=None, matrices=None) == {}
    assert list(changed(heads=None)) == [f"{place}mmq-instance-mxfp4.cu"]


def test_every_instance_of_upstream_is_kept_or_stubbed():
    tree = ROOT / packing.BASELINE
    if not tree.is_dir():
        pytest.skip("no tree of upstream; scripts/patches.py apply makes it")
    before = packing.subset(tree)
    after = trimming.trim(before, heads=packing.TIMED_HEADS)

    def count(files, *words):
        texts = [data.decode() for name, data in files.items() if trimming.INSTANCES in name and ".cu" in name]
        return sum(text.count(word) for text in texts for word in words)

    for macro, stub in (("DECL_FATTN_MMA_F16_CASE(", "mma_f16_case<"), ("DECL_FATTN_TILE_CASE(", "tile_case<")):
        assert count(after, macro) + count(after, stub) == count(before, macro) > 0
        assert 0 < count(after, macro) < count(before, macro)
    assert count(after, "DECL_MMQ_CASE", "void mul_mat_q_case<") == count(before, "DECL_MMQ_CASE") > 10
    assert count(after, "DECL_MMQ_CASE") == len(trimming.MATRICES)
    assert count(after, "DECL_FATTN_VEC_CASE(") == count(before, "DECL_FATTN_VEC_CASE(") > 0


# Shared objects

COMPILER = """import sys, pathlib, subprocess
words = [word for word in sys.argv[1:] if word != "--options-file"]
if "-MD" in words:
    with open(pathlib.Path(__file__).with_name("runs"), "a") as runs: print(file=runs)
sys.exit(subprocess.run(["c++", *("@" + w if w.endswith(".rsp") and w[0] != "@" else w for w in words)]).returncode)
"""


@pytest.fixture
def compile_in(tmp_path):
    """compile_in(side, *flags): compile side/tree/a.cpp; returns how often the compiler ran."""
    (tmp_path / "cc.py").write_text(COMPILER)
    for side in ("one", "two"):
        (tmp_path / side / "tree/include").mkdir(parents=True)
        (tmp_path / side / "build").mkdir()
        (tmp_path / side / "tree/a.cpp").write_text('#include "b.h"\n#include <cstddef>\nint a = B;\n')
        (tmp_path / side / "tree/b.h").write_text("#pragma once\n#  include <c.h>\n#define B 1\n")
        (tmp_path / side / "tree/include/c.h").write_text("int c;\n")

    def compile_one(side, *flags):
        tree, build = tmp_path / side / "tree", tmp_path / side / "build"
        command = [sys.executable, tmp_path / "cc.py", f"-I{tree}/include", *flags, "-c", tree / "a.cpp"]
        command = [str(word) for word in command]
        for old in build.iterdir():
            old.unlink()
        more = ["-MD", "-MF", f"{build}/a.d", "-o", f"{build}/a.o"]
        assert objects.launch(tmp_path / "cache", tree, build, [*command, *more]) == 0
        subprocess.run([*command, "-o", tmp_path / "plain.o"], check=True)
        assert (build / "a.o").read_bytes() == (tmp_path / "plain.o").read_bytes()
        listed = (build / "a.d").read_text()
        assert f"{tree}/a.cpp" in listed and (f"{tmp_path}/one/" in listed) == (side == "one")
        return len((tmp_path / "runs").read_text().splitlines())

    compile_one.folder = tmp_path
    return compile_one


def test_an_object_of_equal_sources_is_made_once(compile_in):
    assert [compile_in("one"), compile_in("two"), compile_in("one")] == [1, 1, 1]


@pytest.mark.parametrize("change", ["a.cpp", "b.h", "include/c.h"])
def test_any_difference_makes_another_object(compile_in, change):
    compile_in("one")
    path = compile_in.folder / "two/tree" / change
    path.write_text(path.read_text() + "// another\n")
    assert compile_in("two") == 2
    assert compile_in("two", "-O1") == 3 and compile_in("two") == 3


def test_a_header_that_another_tree_has_in_addition_counts(compile_in):
    compile_in("one")
    (compile_in.folder / "two/tree/include/b.h").write_text("#define B 2\n")  # "b.h" is found beside the source first
    assert [compile_in("two"), compile_in("two"), compile_in("one")] == [2, 2, 2]
    (compile_in.folder / "two/tree/b.h").unlink()
    assert compile_in("two") == 3


def test_an_include_by_macro_counts(compile_in):
    for side in ("one", "two"):
        (compile_in.folder / side / "tree/b.h").write_text("#define B 1\n#define NAME <c.h>\n#include NAME\n")
    assert [compile_in("one"), compile_in("two")] == [1, 1]
    (compile_in.folder / "two/tree/include/c.h").write_text("int other;\n")
    assert [compile_in("two"), compile_in("one")] == [2, 2]


def test_nothing_is_shared_if_the_compiler_lists_no_file_of_the_tree(tmp_path):
    (tmp_path / "a.cpp").write_text("int a;\n")
    writes = "import pathlib, sys; [pathlib.Path(sys.argv[i]).write_text('a.o: /a.cpp') for i in (2, 4)]"
    command = [sys.executable, "-c", writes, "-MF", str(tmp_path / "a.d"), "-o", str(tmp_path / "a.o")]
    assert objects.launch(tmp_path / "cache", tmp_path / "tree", tmp_path / "build", command) == 0
    assert (tmp_path / "a.o").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("option", [["--options-file"], ["@"]])
def test_include_folders_in_a_response_file_count(compile_in, option):
    for side, text in (("one", "int d;"), ("two", "int other;")):
        (compile_in.folder / side / "tree/more").mkdir()
        (compile_in.folder / side / "tree/more/d.h").write_text(text)
        (compile_in.folder / side / "tree/b.h").write_text("#include <d.h>\n#define B 1\n")
        (compile_in.folder / side / "flags.rsp").write_text(f"-I{compile_in.folder / side / 'tree/more'}\n")

    def flags(side):
        file = str(compile_in.folder / side / "flags.rsp")
        return [*option, file] if len(option[0]) > 1 else [f"@{file}"]

    assert [compile_in("one", *flags("one")), compile_in("two", *flags("two"))] == [1, 2]
    (compile_in.folder / "two/tree/more/d.h").write_text("int d;")
    assert compile_in("two", *flags("two")) == 2


def test_a_failing_compiler_fails(tmp_path):
    (tmp_path / "a.cpp").write_text("int a;\n")
    command = [sys.executable, "-c", "raise SystemExit(3)", "-MF", str(tmp_path / "a.d"), "-o", str(tmp_path / "a.o")]
    assert objects.launch(tmp_path / "cache", tmp_path, tmp_path / "build", command) == 3
    assert not (tmp_path / "cache").exists()


# Stages


def test_a_command_that_takes_too_long_ends_with_all_it_started(tmp_path):
    child = f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    code, output, _ = execute([sys.executable, "-c", parent], 1, stdout=subprocess.PIPE)
    assert (code, output) == (None, "begun\n")
    time.sleep(2)
    assert not (tmp_path / "late").exists()
    assert execute([sys.executable, "-c", "exit(3)"])[0] == 3


def test_a_stage_runs_once_for_the_same_inputs(tmp_path):
    ran = []

    def stage(name="a", inputs=(1,), **more):
        runner = Runner(tmp_path, say=lambda text: None)
        result = runner.run(name, inputs, lambda: ran.append(name) or {"n": len(ran)}, **more)
        return result["n"]

    assert [stage(), stage(), stage(inputs=(2,)), stage(inputs=(2,)), stage("b")] == [1, 1, 2, 2, 3]


def test_what_has_no_time_left_is_done_by_the_next_call(tmp_path):
    def half():
        raise OutOfTime({"rows": [1]})

    runner = Runner(tmp_path, time.monotonic() + 60, say=lambda text: None)
    assert runner.run("a", 1, half)["rows"] == [1] and runner.open == {"a": "no time left"}
    assert runner.run("b", 1, dict, needs=90) is None and list(runner.open) == ["a", "b"]
    again = Runner(tmp_path, say=lambda text: None)
    # The partial result is kept until there is a complete one, but never for other inputs.
    late = Runner(tmp_path, time.monotonic() - 1, say=lambda text: None)
    assert late.run("a", 1, dict)["rows"] == [1] and late.run("a", 2, dict) is None
    assert again.run("a", 1, lambda: {"rows": [1, 2]})["rows"] == [1, 2] and again.open == {}
    failed = Runner(tmp_path, say=lambda text: None)
    assert failed.run("c", 1, lambda: (_ for _ in ()).throw(CheckError("no nvcc"))) is None
    assert failed.open == {"c": "no nvcc"}
    # A stage that breaks does not stop the others.
    assert failed.run("d", 1, lambda: {}["rows"]) is None and failed.run("e", 1, dict) is not None
    assert failed.open == {"c": "no nvcc", "d": "KeyError: 'rows'"}


# Parsing the output of test-backend-ops


def test_reading_op_tests():
    output = (
        "  FLASH_ATTN_EXT(hs=64): \x1b[1;32mOK\x1b[0m\n  FLASH_ATTN_EXT(hs=80): not supported [CUDA0]\n"
        "[FLASH_ATTN_EXT] NMSE = 0.1 > 0.0005   FLASH_ATTN_EXT(hs=96): \x1b[1;31mFAIL\x1b[0m\n"
        "  FLASH_ATTN_EXT(hs=99): \x1b[1;31mFAIL\x1b[0m\n  1/3 tests passed\n"
    )
    result = operators.read_ops("FLASH_ATTN_EXT", output, "", 1)
    assert (result["passed"], result["total"], result["unsupported"], result["exit_code"]) == (1, 3, 1, 1)
    assert result["failures"] == [
        "[FLASH_ATTN_EXT] NMSE = 0.1 > 0.0005   FLASH_ATTN_EXT(hs=96): FAIL",
        "FLASH_ATTN_EXT(hs=99): FAIL",
    ]
    ours = operators.read_ops("FLASH_ATTN_EXT_KV_BLOCKS", output.replace("EXT(", "EXT_KV_BLOCKS("), "", 1)
    assert ours["unsupported"] == 1 and len(ours["failures"]) == 2
    crash = operators.read_ops("FLASH_ATTN_EXT", "  FLASH_ATTN_EXT(hs=64): OK\n", "illegal access\n", -6)
    assert "code -6" in crash["failures"][0] and "illegal access" in crash["failures"][0]
    with pytest.raises(CheckError, match="ran no case"):
        operators.read_ops("FLASH_ATTN_EXT", "2/2 backends passed\n", "", 0)
    assert operators.read_ops("FLASH_ATTN_EXT", "  0/0 tests passed\n", "", 0)["total"] == 0
    with pytest.raises(CheckError, match="has no matching case of --version"):
        operators.run_ops(Path("/bin/echo"), "0/0 tests passed", "--version", seconds=9)


def test_reading_what_the_sanitizer_says():
    log = "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n=========     at kernel\n"
    result = operators.read_log(log + "========= ERROR SUMMARY: 3 errors\n", False)
    assert result["errors"] == 3 and result["log"][1] == "Invalid __global__ read of size 4 bytes"
    hazards = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert operators.read_log(hazards, False)["errors"] == 2
    assert operators.read_log("========= ERROR SUMMARY: 0 errors\n", False)["errors"] == 0
    with pytest.raises(CheckError, match="no summary"):
        operators.read_log("========= COMPUTE-SANITIZER\n", False)
    # Ended before it was through: what it found until then counts.
    assert operators.read_log(log, True)["errors"] == 1


def test_op_tests_that_run_out_of_time_are_reported_as_far_as_they_came(tmp_path):
    program = tmp_path / "test-backend-ops"
    text = "  X(a=1): \x1b[1;32mOK\x1b[0m\n  X(a=2): FAIL\n  X(a=3): not supp"
    program.write_text(f"#!{sys.executable}\nimport time\nprint({text!r}, flush=True)\ntime.sleep(30)\n")
    program.chmod(0o755)
    with pytest.raises(OutOfTime) as late:
        operators.run_ops(program, "CUDA0", "X", seconds=1)
    partial = late.value.partial
    assert (partial["passed"], partial["total"], partial["failures"]) == (1, 2, ["X(a=2): FAIL"])
    made = document()
    made["ops"] = [partial]
    assert "X, truncated by the time limit | 1 | 2 |" in "\n".join(report.table(made))
    assert "X: 1/2 passed" in report.problems(made)[0]
    partial |= {"passed": 1, "total": 1, "failures": []}
    assert report.problems(made) == []  # the stage is under `open`


# Cases


@pytest.mark.parametrize("line", [*cases.CASES, *cases.OFF_CASES])
def test_cases_are_sound_and_their_edges_travel(line):
    case = Case.parse(line)
    fed = schedule(case)
    assert len(case.sliding) == len(case.fa_decode) == case.layers and case.n_ubatch <= case.n_batch
    rows = oracle.chosen_rows(case, fed)
    flags = [flag for flags in fed.is_decode for flag in flags]
    assert list(rows) == sorted(set(rows)) and {i for i, flag in enumerate(flags) if flag} <= set(rows)
    assert case.sequences[0][0] - 1 in rows and len(rows) <= 48 + sum(flags) and rows[-1] < len(flags)
    if line in cases.OFF_CASES:
        assert case.arch == "qwen3"  # its heads are of the size that the unpatched build keeps


def test_a_case_is_judged_by_full_attention_on_the_same_device():
    from support.oracle.verdict import Figures

    case = Case.parse(cases.CASES[0])
    good, noisy, wrong = (Figures(60, worst, worst / 2, worst / 3, worst**2 / 50, 0.0) for worst in (0.05, 0.2, 1.2))
    assert oracle.judge(case, good, good) == [] and oracle.judge(case, noisy, noisy) == []
    assert len(oracle.judge(case, noisy, good)) > 0 and len(oracle.judge(case, wrong, noisy)) > 0
    assert "full attention itself" in oracle.judge(case, wrong, wrong)[0]
    lost = Figures(60, *[float("inf")] * 5)
    assert oracle.judge(case, lost, good) and oracle.judge(case, lost, lost)


# The report


def document(**changes):
    row = {
        "shape": "qwen3-4b",
        "recipe": "stream",
        "kv": "f16",
        "ubatch": 512,
        "rounds": 2,
        "prompt_tokens": 131072,
        "decode_tokens": 512,
        "ratio": 9.5,
        "prefill_ratio": 8.0,
        "decode_ratio": 2.0,
        "bound": 9.0,
        "ratio_to_bound": 8 / 9,
        "prefill_seconds": 3.0,
        "decode_seconds": 1.0,
        "seconds": 4.0,
        "device": "A Card",
        "kv_bytes": 1,
        "compute_buffer_bytes": 1,
    } | changes
    off = {"recipe": "off", "prompt_tokens": 512, "prefill_ratio": 1.0, "decode_ratio": 1.0}
    ops = {
        "op": "FLASH_ATTN_EXT_KV_BLOCKS",
        "passed": 3,
        "total": 3,
        "unsupported": 0,
        "failures": [],
        "exit_code": 0,
        "truncated": False,
    }
    results = {
        "ops-x": ops | {"stage_seconds": 1.0},
        "oracle": {"cases": [{"case": "llama/2", "problems": []}], "stage_seconds": 2.0},
        "off": {"cases": [{"case": "llama/2", "problems": []}], "stage_seconds": 2.0},
        "off-speed-x": {"rows": [row | off], "stage_seconds": 2.0},
        "bench-x": {"rows": [row], "stage_seconds": 3.0, "problems": []},
    }
    facts = {
        "card": "A Card, 80 GB",
        "commit": "c0ffee",
        "uncommitted": False,
        "made": "2026-01-01",
        "backend": "cuda",
        "size": "full",
        "built_for": None,
        "left_out": None,
    }
    return report.make_document(facts, results, {})


def test_the_report_has_what_it_must_and_finds_what_is_wrong(tmp_path):
    good = document()
    assert report.problems(good) == []
    row = good["rows"][0]
    wanted = ("recipe", "prompt_tokens", "ratio", "prefill_ratio", "decode_ratio", "seconds", "card", "commit")
    assert [row[key] for key in wanted] == ["stream", 131072, 9.5, 8.0, 2.0, 4.0, "A Card, 80 GB", "c0ffee"]
    paths = report.write(good, tmp_path / "docs")
    assert [path.name for path in paths] == ["a-card.json", "a-card.md"]
    assert json.loads(paths[0].read_text()) == good
    line = "| 131,072 | stream | 4.000 | 9.50 | 8.00 | 3.000 | 8.00 | 9.00 | 89% | 1.000 | 2.00 |"
    assert line in paths[1].read_text().splitlines()
    assert "7.90 of the whole request, expected at least 8.0" in report.problems(document(ratio=7.9))[0]
    assert report.problems(document(ratio=7.9, prompt_tokens=8192)) == []
    for part, change, text in (
        ("ops", {"passed": 2}, "2/3"),
        ("ops", {"unsupported": 1}, "not supported"),
        ("ops", {"failures": ["ended early with code -6"]}, "code -6"),
        ("oracle", {"problems": ["worst 2"]}, "worst 2"),
        ("off", {"problems": ["other bits"]}, "other bits"),
        ("off_speed", {"decode_ratio": 0.97}, "decode_ratio 0.970"),
        ("off_speed", {"prefill_ratio": 1.03}, "prefill_ratio 1.030"),
    ):
        bad = document()
        bad[part][0].update(change)
        assert len(report.problems(bad)) == 1 and text in report.problems(bad)[0], (part, change)
        assert text in "\n".join(report.table(bad))


# The whole, on the CPU


def test_the_published_workload_comes_first():
    full = list(measuring.workloads("full"))
    assert [load.prompts for load in full if load.recipes == ()] == [(512,), (8192,), (32768,)]
    assert {(p.shape, p.kv, p.ubatch, p.prompts[0]) for p in full[3:]} >= {
        (shape, "f16", 512, n) for shape in ("qwen3-4b", "qwen3-0.6b", "llama-3.1-8b") for n in (8192, 32768, 131072)
    }
    caches = {(load.kv, load.ubatch) for load in full if load.shape == "qwen3-4b"}
    assert caches == {(kv, ubatch) for kv in ("f16", "q8_0") for ubatch in (512, 2048)}
    assert len({load.name for load in full}) == len(full) and all(load.decode == 512 for load in full[3:])


@pytest.mark.native
def test_from_packing_to_the_report_and_a_second_call_has_nothing_to_do(tmp_path):
    program = NATIVE / "test-backend-ops"
    if not program.exists() or not BASELINE.is_dir():
        pytest.skip("op tests or the unpatched library are not built; run `make op-tests baseline`")
    command = [sys.executable, str(SCRIPTS / "gpu" / "check.py"), "run", "--backend", "cpu", "--size", "tiny"]
    command += ["--cases", "1", "--jobs", "1", "--seconds", "900"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    command += ["--patched", str(NATIVE), "--baseline", str(BASELINE), "--op-tests", str(program)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert first.returncode == 0, first.stderr[-3000:] + first.stdout[-1000:]
    made = json.loads((tmp_path / "out/cpu.json").read_text())
    assert made["open"] == {} and made["left_out"] is None
    assert [result["op"] for result in made["ops"]] == ["FLASH_ATTN_EXT_KV_BLOCKS", "FLASH_ATTN_EXT"]
    assert all(result["passed"] == result["total"] > 5 for result in made["ops"])
    assert [case["problems"] for case in made["oracle"] + made["off"]] == [[], []]
    assert made["oracle"][0]["swaa"]["worst"] < 0.1
    assert [(row["recipe"], row["kv"]) for row in made["rows"]] == [
        ("full", "f16"),
        ("off", "f16"),
        ("fast", "f16"),
        ("stream", "f16"),
        ("full", "q8_0"),
        ("off", "q8_0"),
        ("memory", "q8_0"),
    ]
    assert all(row["ratio"] > 0 and row["prompt_tokens"] == 320 for row in made["rows"])
    assert "| 320 | stream |" in (tmp_path / "out/cpu.md").read_text()
    second = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert second.returncode == 0 and "started" not in second.stderr, second.stderr
    again = json.loads((tmp_path / "out/cpu.json").read_text())

    def measured(document):  # a commit may have been made meanwhile
        return json.dumps(document).replace(str(document["commit"]), "").replace(document["made"], "")

    assert measured(again) == measured(made)


@pytest.fixture
def bare_python(tmp_path):
    """A Python that has numpy and no other package."""
    venv.create(tmp_path / "venv", with_pip=False)
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(np.__file__).parents[1].glob("numpy*"):
        (packages / path.name).symlink_to(path)
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "numpy.pth").write_text(f"{packages}\n")
    return tmp_path / "venv/bin/python"


@pytest.mark.native
def test_carried_libraries_need_no_build_and_only_numpy(bare_python, tmp_path):
    if not (NATIVE / "test-backend-ops").exists() or not BASELINE.is_dir():
        pytest.skip("op tests or the unpatched library are not built; run `make op-tests baseline`")
    built = {"patched": NATIVE, "baseline": BASELINE}
    oracle.prepare(tmp_path / "prepared", cases.CASES[6:7])
    packing.pack(tmp_path / "a.tar.gz", prepared=tmp_path / "prepared", built_for="90", built=built)
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    command = [str(bare_python), str(tmp_path / packing.TOP / "scripts/gpu/check.py"), "run", "--size", "tiny"]
    command += ["--only", "ops-FLASH_ATTN_EXT_KV,oracle,bench", "--jobs", "1", "--work", str(tmp_path / "w")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--backend", "cpu"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    made = json.loads((tmp_path / "out/cpu.json").read_text())
    assert made["built_for"] == "90" and made["ops"][0]["passed"] == made["ops"][0]["total"] > 5
    assert [row["problems"] for row in made["oracle"]] == [[]] and len(made["rows"]) > 3
    # For a card of another compute capability they hold no code.
    other = subprocess.run([*command, "--arch", "86"], capture_output=True, text=True, timeout=60, check=False)
    assert other.returncode == 1 and "for compute capability 90, not 86" in other.stderr


@pytest.mark.native
def test_a_wrong_answer_is_found(tmp_path):
    folder = tmp_path / "prepared"
    oracle.prepare(folder, cases.CASES[6:7])
    correct = list(oracle.check(folder, library_dir(), gpu=False))
    assert [row["problems"] for row in correct] == [[]]
    expected = dict(np.load(folder / "expected.npz"))
    # What a mask that is off would do: the logits of the rows belong to other rows.
    expected["0-swaa"] = np.roll(expected["0-swaa"], 1, axis=0)
    np.savez(folder / "expected.npz", **expected)
    wrong = list(oracle.check(folder, library_dir(), gpu=False))
    assert wrong[0]["problems"] and "worst" in wrong[0]["problems"][0]
    on_gpu = next(oracle.check(folder, library_dir(), gpu=True))
    assert "not all layers are on the GPU" in on_gpu["problems"][0]


def test_errors_are_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "PACK.json").write_text('{"digest": "0123456789abcdef"}')
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    arguments = ["run", "--backend", "cpu", "--work", str(tmp_path / "work"), "--patched", str(tmp_path)]
    assert gpu_check.main(arguments) == 1
    assert capsys.readouterr().err == "Error: give --patched, --baseline and --op-tests together\n"
