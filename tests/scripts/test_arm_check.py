"""The Arm check: how it parses the tools' output, what it reports as a failure, and whether the kernels compile.

The check itself, which takes minutes, is `make arm-check`; here stand-ins replace the compiler and qemu.

    pytest tests/scripts/test_arm_check.py
"""

import json
import subprocess
import sys

import pytest
from arm import check as arm_check
from arm import program, tools
from arm.program import Part, Program
from arm.tools import MissingTools, Tools
from gpu import building
from gpu.runner import CheckError

from support import ROOT

WARNINGS = ("-Wall", "-Wextra", "-Werror")
CASE = "  FLASH_ATTN_EXT(hsk=64,kv=113,type_K=f16): "
PASSED = f"{CASE}\x1b[1;32mOK\x1b[0m\n  1/1 tests passed\n1/1 backends passed\n"
COUNTED = "warning: something\nattention: ops 4, ours 3, reference 4, threads 2\n"


# Tools


def whichever(*there):
    return lambda name: f"/bin/{name}" if name in there else None


ALL = ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64", "cmake", "ninja")


def test_tools_are_found_with_and_without_a_version():
    found = tools.find(whichever(*ALL))
    assert (found.cxx, found.qemu, found.ninja) == ("/bin/aarch64-linux-gnu-g++", "/bin/qemu-aarch64", "/bin/ninja")
    versions = (*ALL[2:3], *(f"aarch64-linux-gnu-{tool}-{n}" for tool in ("gcc", "g++") for n in (11, 12)))
    found = tools.find(whichever(*versions, "qemu-aarch64-static", "cmake"))
    assert (found.cc, found.cxx) == ("/bin/aarch64-linux-gnu-gcc-12", "/bin/aarch64-linux-gnu-g++-12")
    assert (found.qemu, found.ninja) == ("/bin/qemu-aarch64-static", None)


@pytest.mark.parametrize(
    ("lacks", "named"),
    [
        (ALL[:2], "install the Debian package g++-aarch64-linux-gnu"),
        (ALL[1:2], "install the Debian package g++-aarch64-linux-gnu"),
        (ALL[3:4], "install the Debian package qemu-user"),
        (ALL[1:4], "install the Debian packages g++-aarch64-linux-gnu and qemu-user"),
    ],
)
def test_a_missing_tool_is_named_by_its_package(lacks, named):
    with pytest.raises(MissingTools) as error:
        tools.find(whichever(*(name for name in ALL if name not in lacks)))
    assert str(error.value) == named


def test_without_tools_it_is_one_line_and_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(building, "search_path", lambda: str(tmp_path))
    assert arm_check.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "Error: install the Debian packages g++-aarch64-linux-gnu and qemu-user and cmake\n")


def test_every_level_has_the_processor_that_it_needs():
    assert tools.DEFAULT_LEVEL in tools.LEVELS
    assert tools.processor("armv8-a") == "cortex-a53" and tools.processor("armv9-a") == "max"


# Parsing the op tests' output


def test_a_run_that_passed():
    assert program.read("FLASH_ATTN_EXT", PASSED, COUNTED, 0) == {
        "op": "FLASH_ATTN_EXT",
        "passed": 1,
        "total": 1,
        "unsupported": 0,
        "examples_unsupported": [],
        "failures": [],
        "exit_code": 0,
        "truncated": False,
        "ops": 4,
        "ours": 3,
        "reference": 4,
        "threads": 2,
    }


def test_a_case_that_failed_and_one_not_supported():
    failed = f"[FLASH_ATTN_EXT] NMSE = 1.0 > 0.0005 {CASE.strip()} FAIL"
    output = f"{CASE}not supported [CPU]\n{failed}\n  0/1 tests passed\n"
    result = program.read("FLASH_ATTN_EXT", output, COUNTED, 1)
    assert (result["passed"], result["total"], result["unsupported"], result["exit_code"]) == (0, 1, 1, 1)
    assert len(result["failures"]) == 1 and "NMSE = 1.0" in result["failures"][0]


def test_a_crash_is_a_failure_without_counts():
    result = program.read("FLASH_ATTN_EXT", CASE, "Illegal instruction\n", -4)
    assert "ended early with code -4" in result["failures"][0] and "Illegal instruction" in result["failures"][0]
    assert result["ours"] is None and result["threads"] is None


def test_no_case_is_a_total_of_0_and_a_program_that_says_nothing_is_an_error():
    counted = "attention: ops 0, ours 0, reference 0, threads 0\n"
    result = program.read("FLASH_ATTN_EXT", "  0/0 tests passed\n", counted, 0)
    assert (result["passed"], result["total"], result["ours"]) == (0, 0, 0)
    with pytest.raises(CheckError, match="ran no case"):
        program.read("FLASH_ATTN_EXT", "", "", 0)


# Our code in the program, and which of it ran

MAP = """
 .text          0x0000000000401000      0x100 ggml/src/libggml-cpu.a(ops.cpp.o)
 .text          0x0000000000401100       0x10 ggml/src/libggml-cpu.a(fattn-tile.cpp.o)
 .text._ZN12_GLOBAL__N_1
                0x0000000000401110        0x8 ggml/src/libggml-cpu.a(fattn.cpp.o)
 .text          0x0000000000401118        0x0 ggml/src/libggml-cpu.a(fattn-decode.cpp.o)
 .text._ZSt3max 0x0000000000000000       0x10 ggml/src/libggml-cpu.a(fattn.cpp.o)
 .eh_frame      0x0000000000402000       0x10 ggml/src/libggml-cpu.a(fattn.cpp.o)
"""
PARTS = [Part(0x401100, 0x10, "fattn-tile.cpp"), Part(0x401110, 8, "fattn.cpp")]
CODE = """
0000000000401100 <_Z5tile>:
  401100:\t4e22cc20 \tfmla\tv0.4s, v1.4s, v2.4s
  401104:\t1f420820 \tfmla\ts0, s1, v2.s[0]
  401108:\t4e829420 \tsdot\tv0.4s, v1.16b, v2.16b
  40110c:\td65f03c0 \tret
  401110:\t4e22cc20 \tfmla\tv0.4s, v1.4s, v2.4s
  401114:\t00000000 \tudf\t#0
  401118:\td503201f \tnop
"""
LOG = """----------------
IN: _Z5tile
0x00401100:  4e22cc20  fmla     v0.4s, v1.4s, v2.4s
0x00401104:  1f420820  .byte    0x20

"""


def test_our_sources_are_found_in_the_map():
    assert program.read_map(MAP) == PARTS
    assert program.ranges(PARTS) == "0x401100+0x10,0x401110+0x8"


def test_instructions_are_counted_by_source_and_as_far_as_they_ran():
    code = program.read_code(CODE, PARTS)
    assert program.executed(LOG) == {0x401100, 0x401104}
    assert program.count(code, program.executed(LOG)) == {
        "fattn-tile.cpp": {"instructions": 4, "ran": 2, "notable": {"fmla": [1, 1], "sdot": [1, 0]}},
        "fattn.cpp": {"instructions": 1, "ran": 0, "notable": {"fmla": [1, 0]}},
    }
    assert program.count({}, {1}) == {}


# Failures


def level(of_level=None, **of_run):
    """A result with changes, in the level and in the run of its second op."""
    ops = [
        {
            "op": op,
            "passed": 2,
            "total": 2,
            "unsupported": 0,
            "failures": [],
            "exit_code": 0,
            "ops": 4,
            "ours": 4,
            "reference": 4,
            "threads": 2,
            "seconds": 60.0,
            "params": None,
        }
        for op in (program.BLOCKS, program.PLAIN)
    ]
    ops[1] |= of_run
    return {"march": "armv8-a", "vector": "neon", "ops": ops, **ran(fmla=2, sdot=1), **(of_level or {})}


def ran(fmla, sdot):
    row = {"instructions": 9, "ran": 5, "notable": {"fmla": [3, fmla], "sdot": [1, sdot]}}
    return {"kernels": {"fattn-tile.cpp": row}}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),
        ({"of_level": {"vector": "portable"}}, "armv8-a: the kernels were compiled for portable, not neon"),
        ({"of_level": {"vector": None}}, "armv8-a: the kernels were compiled for no vector, not neon"),
        ({"passed": 1}, "armv8-a FLASH_ATTN_EXT: 1 of 2 passed, exit code 0"),
        ({"exit_code": -4}, "armv8-a FLASH_ATTN_EXT: 2 of 2 passed, exit code -4"),
        ({"failures": ["a case"]}, "armv8-a FLASH_ATTN_EXT: a case"),
        ({"passed": 0, "total": 0, "ops": 0, "ours": 0}, "armv8-a FLASH_ATTN_EXT: no case was run"),
        ({"ours": None}, "armv8-a FLASH_ATTN_EXT: ended before reporting how many ops our kernels computed"),
        ({"ours": 3}, "armv8-a FLASH_ATTN_EXT: our kernels computed 3 of 4 ops"),
        ({"ops": 0, "ours": 0}, "armv8-a FLASH_ATTN_EXT: our kernels computed 0 of 0 ops"),
        ({"of_level": {"kernels": {}}}, "armv8-a: no vector multiply-add (fmla) of our kernels ran"),
        ({"of_level": ran(0, 1)}, "armv8-a: no vector multiply-add (fmla) of our kernels ran"),
        ({"of_level": ran(2, 0)}, "armv8-a: no sdot of fattn-tile.cpp ran"),
    ],
)
def test_each_failure_is_one_line(changes, line):
    assert arm_check.judge(level(**changes), filtered=False) == ([line] if line else [])


def test_a_filter_may_leave_out_an_op_or_a_kernel_but_not_everything():
    nothing = {"passed": 0, "total": 0, "ops": 0, "ours": 0}
    assert arm_check.judge(level(ran(2, 0), **nothing), filtered=True) == []
    none = level(**nothing)
    none["ops"][0] |= nothing
    assert arm_check.judge(none, filtered=True) == ["armv8-a: no case matches the filter"]


def test_which_cases():
    assert arm_check.selection(None, False) == {program.BLOCKS: None, program.PLAIN: program.SELECTION}
    assert arm_check.selection("hs=64", False) == {program.BLOCKS: "hs=64", program.PLAIN: "hs=64"}
    assert arm_check.selection(None, True) == {program.BLOCKS: None, program.PLAIN: None}


# The whole check, with stand-ins

STAND_IN = """#!{python}
import os, pathlib, sys
me, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
if me == "cmake" and "-B" in words:
    folder = pathlib.Path(words[words.index("-B") + 1])
    (folder / "test-backend-ops.map").write_text({map!r})
    (folder / "compile_commands.json").write_text({commands!r})
elif me == "cmake" and {broken}:
    sys.exit("x.cpp:1: error: broken")
elif me == "g++":
    print('#define FATTN_SIMD_NAME "neon"')
elif me == "objdump":
    print({code!r})
elif me == "qemu":
    pathlib.Path(words[words.index("-D") + 1]).write_text({log!r})
    print({output!r})
    print("attention: ops 1, ours 1, reference 1, threads", os.environ["ARM_CHECK_THREADS"], file=sys.stderr)
"""
FMLA = "\t4e22cc20 \tfmla\tv0.4s, v1.4s, v2.4s\n"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(output): replaces the tools with stand-ins, of which qemu prints `output`."""

    def put(output, broken=False):
        cxx = str(tmp_path / "g++")
        entry = {"file": "fattn/fattn-tile.cpp", "directory": str(tmp_path), "command": f"launcher {cxx} -c x -o y"}
        text = STAND_IN.format(
            python=sys.executable,
            map=MAP,
            commands=json.dumps([entry]),
            output=output,
            broken=broken,
            code=f"  401100:{FMLA}  401110:{FMLA}",
            log="0x00401100:  fmla\n0x00401110:  fmla\n",
        )
        for name in ("cmake", "g++", "objdump", "qemu"):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        paths = {name: str(tmp_path / name) for name in ("cmake", "objdump", "qemu")}
        found = Tools(cc="gcc", cxx=cxx, ninja=None, **paths)
        monkeypatch.setattr(tools, "find", lambda: found)
        monkeypatch.setattr(arm_check, "export", lambda root, folder: None)
        return ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "result.json")]

    return put


def output_of(op):
    return f"{op}(x): OK\n  1/1 tests passed"


def test_a_whole_check_reports_each_level(stand_in, tmp_path, capsys):
    marches = ["--march", "armv8-a", "all", "armv8-a"]
    assert arm_check.main([*stand_in(output_of("FLASH_ATTN_EXT")), *marches, "--threads", "3"]) == 0
    out = capsys.readouterr().out
    for march, processor in tools.LEVELS.items():
        assert f"{march} on qemu's {processor}: vector neon" in out
    assert out.count("FLASH_ATTN_EXT_KV_BLOCKS: 1 OK, 0 failed, 0 not supported; ours 1 of 1 ops on 3 threads") == 3
    assert "fattn-tile.cpp: 1 of 1 instructions ran; fmla 1 of 1" in out
    document = json.loads((tmp_path / "result.json").read_text())
    assert [row["march"] for row in document["levels"]] == list(tools.LEVELS) and document["problems"] == []


def test_a_check_that_ran_nothing_is_a_failure(stand_in, capsys):
    assert arm_check.main(stand_in("  0/0 tests passed")) == 1
    assert "armv8.2-a+fp16+dotprod FLASH_ATTN_EXT: no case was run" in capsys.readouterr().err
    assert arm_check.main([*stand_in("  0/0 tests passed"), "--filter", "none"]) == 1
    assert "no case matches the filter" in capsys.readouterr().err


def test_a_build_that_fails_is_one_line_with_the_compilers_error(stand_in, capsys):
    assert arm_check.main([*stand_in("", broken=True), "--march", "armv8-a"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "building" not in line]
    assert len(lines) == 1 and lines[0].startswith("Error: build for armv8-a failed, see ") and "broken" in lines[0]


# The tree, and the kernels through the compiler


def test_what_the_program_is_made_of():
    for path in ("ggml/CMakeLists.txt", "ggml/src/ggml.c", "ggml/src/ggml-cpu/fattn/fattn.cpp", "tests/test-kv-x.h"):
        assert arm_check.needed(path), path
    for path in ("src/llama.cpp", "ggml/src/ggml-cuda/fattn.cu", "tests/test-quantize-fns.cpp", "CMakeLists.txt"):
        assert not arm_check.needed(path), path


def test_a_series_that_can_not_be_applied_is_one_line(tmp_path):
    with pytest.raises(CheckError, match=r"cannot make the patched tree: .*UPSTREAM") as error:
        arm_check.export(tmp_path, tmp_path / "tree")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The compiler, and the folder of ggml's sources with ours."""
    if not (ROOT / "vendor/llama.cpp").is_dir():
        pytest.skip("llama.cpp is not there; scripts/patches.py fetch gets it")
    try:
        found = tools.find()
    except MissingTools as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("arm")
    (folder / "ggml").mkdir()
    (folder / "ggml/stale.c").write_text("")
    arm_check.export(ROOT, folder)
    assert not (folder / "ggml/stale.c").exists() and (folder / "tests/test-backend-ops.cpp").exists()
    return found, folder / "ggml"


@pytest.mark.parametrize("march", tools.LEVELS)
def test_the_kernels_compile_without_a_warning(exported, march):
    found, ggml = exported
    sources = sorted((ggml / "src/ggml-cpu/fattn").glob("*.cpp"))
    assert {path.name for path in sources} >= {"fattn.cpp", "fattn-decode.cpp", "fattn-tile.cpp"}
    # Upstream's headers count as system headers: their warnings are not ours.
    headers = [word for sub in ("include", "src", "src/ggml-cpu") for word in ("-isystem", str(ggml / sub))]
    for source in sources:
        command = [found.cxx, "-std=c++17", f"-march={march}", "-O1", *WARNINGS, *headers, "-c", str(source)]
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), source.name


def test_a_program_without_our_kernels_is_an_error(tmp_path):
    (tmp_path / "test-backend-ops.map").write_text(MAP.replace("fattn", "other"))
    with pytest.raises(CheckError, match="test-backend-ops does not contain our kernels"):
        Program(Tools("", "", "", "", "", None), tmp_path, tmp_path, "armv8-a").parts()
