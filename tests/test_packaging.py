"""The package around the code: pins that must agree, the AMX trial, and what an installation holds."""

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import swaa_edge
from support import ROOT

GXX = shutil.which("g++")
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")


def read(name):
    return (ROOT / name).read_text()


def test_the_python_bindings_and_the_patches_pin_one_release():
    # Its ctypes declarations mirror the structs of exactly the llama.cpp that it ships.
    upstream = re.search(r"^version *= *(\S+)", read("patches/UPSTREAM"), re.MULTILINE).group(1)
    assert re.findall(r"llama-cpp-python==([\w.]+)", read("pyproject.toml")) == [upstream]


def test_torch_is_pinned_for_the_makefile_only():
    assert re.search(r"^torch==", read("constraints.txt"), re.MULTILINE)
    assert "torch==" not in read("pyproject.toml")


def installation():
    try:
        return importlib.metadata.distribution("swaa-edge")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("swaa-edge is not installed; make setup does it")


def library_folder():
    folder = Path(installation().locate_file("swaa_edge/lib"))
    if not folder.is_dir():
        pytest.skip(f"no native build in {folder}; make setup builds it")
    return folder


@pytest.mark.native
def test_metadata_of_the_installation():
    found = installation()
    assert found.version == swaa_edge.__version__
    assert [(point.name, point.value) for point in found.entry_points] == [("swaa-edge", "swaa_edge.cli:main")]


PROBES = {
    "works": ("int main(void) { return 0; }", "works", []),
    "refused": ("int main(void) { return 1; }", "broken", ["-mno-amx-int8", "-mno-amx-bf16", "-mno-amx-tile"]),
    "sigill": (
        "#include <signal.h>\nint main(void) { return raise(SIGILL); }",
        "broken",
        ["-mno-amx-int8", "-mno-amx-bf16", "-mno-amx-tile"],
    ),
    "uncompilable": ("#error\n", "broken", ["-mno-amx-int8", "-mno-amx-bf16", "-mno-amx-tile"]),
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is an x86 extension")
@pytest.mark.skipif(CMAKE is None, reason="needs cmake")
@pytest.mark.parametrize("probe", PROBES)
def test_a_machine_that_only_claims_amx_is_built_without_it(tmp_path, probe):
    source, verdict, switches = PROBES[probe]
    (tmp_path / "probe.c").write_text(source)
    (tmp_path / "empty.c").write_text("int nothing;\n")
    (tmp_path / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.21)
        project(trial C)
        set(GGML_NATIVE ON)
        include("{(ROOT / "cmake/Amx.cmake").as_posix()}")
        add_library(kernels STATIC empty.c)
        target_compile_options(kernels PRIVATE -march=native)
        swaa_edge_leave_out_amx(kernels)
        get_target_property(options kernels COMPILE_OPTIONS)
        message(STATUS "verdict=${{SWAA_EDGE_AMX}} options=${{options}}")
        """)
    reported = ["-DSWAA_EDGE_AMX_REPORTED=ON", f"-DSWAA_EDGE_AMX_PROBE={tmp_path}/probe.c"]
    command = [CMAKE, "-S", str(tmp_path), "-B", str(tmp_path / "build"), *reported]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"verdict=(\w+) options=(.*)", done.stdout)
    assert found.group(1) == verdict
    assert found.group(2).split(";") == ["-march=native", *switches]
    # The compiler must know the switches, too.
    subprocess.run([CMAKE, "--build", str(tmp_path / "build")], check=True, capture_output=True, timeout=300)
    assert ("building without AMX" in done.stdout) == (verdict == "broken")


# A configuration as ggml's kernels write it; GCC's own header does not declare the byte of 113 as read.
TILE_CONFIG = """
#include <immintrin.h>
void configure() {
    alignas(64) unsigned char config[64] = {};
    config[0] = 1;
    config[53] = 113;
    _tile_loadconfig(config);
}
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is an x86 extension")
@pytest.mark.skipif(GXX is None, reason="needs g++")
def test_the_optimizer_keeps_the_whole_tile_configuration(tmp_path):
    header = ROOT / "cmake/amx_tile_config.h"
    command = [GXX, "-O3", "-mamx-tile", "-include", str(header), "-x", "c++", "-S", "-o", "-", "-"]
    done = subprocess.run(command, input=TILE_CONFIG, capture_output=True, text=True, check=True, timeout=60)
    assert re.search(r"\$113\b", done.stdout.partition("ldtilecfg")[0])


@pytest.mark.native
@pytest.mark.skipif(CMAKE is None, reason="needs cmake")
@pytest.mark.parametrize("state", ["wheel", "editable"])
def test_a_wheel_runs_on_other_cpus_and_every_backend_asked_for_is_in_it(tmp_path, state):
    tree = ROOT / "vendor/llama.cpp-patched"
    if not tree.is_dir():
        pytest.skip(f"no {tree}; make setup makes it")
    options = [f"-DSKBUILD_STATE={state}", "-DSKBUILD=2", f"-DSWAA_EDGE_TREE={tree}", "-DGGML_RPC=ON"]
    command = [CMAKE, "-S", str(ROOT), "-B", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    script = read(tmp_path / "cmake_install.cmake")
    installed = set(re.findall(r"swaa_edge/lib/(?:lib)?([\w.-]+)\.(?:so|dylib|dll)\b", script))
    assert {"llama", "ggml", "ggml-base", "ggml-rpc"} <= installed
    if "GNU" in done.stdout and platform.machine() in ("x86_64", "AMD64"):
        kernels = re.findall(r'"command".*/amx/mmq\.cpp', read(tmp_path / "compile_commands.json"))
        assert kernels and all("amx_tile_config.h" in command for command in kernels)
    cpu = {name for name in installed if name.startswith("ggml-cpu")}
    if state == "wheel":
        assert len(cpu) > 1
        assert "march=native" not in done.stdout
    else:
        assert cpu == {"ggml-cpu"}


@pytest.mark.native
def test_one_plain_file_per_library():
    files = sorted(library_folder().iterdir())
    names = {re.sub(r"\.(so|dylib|dll)$", "", file.name).removeprefix("lib") for file in files}
    assert {"llama", "ggml", "ggml-base"} <= names
    assert any(name.startswith("ggml-cpu") for name in names)
    assert len(names) == len(files), "a library was installed twice, as a versioned name or a symbolic link"
    assert not [file for file in files if file.is_symlink()]


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_libraries_find_each_other_from_anywhere(tmp_path):
    folder = library_folder()
    code = (
        "import llama_cpp, re\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(*sorted(set(re.findall(r'\\S*/lib(?:llama|ggml)[^/\\s]*', maps))), sep='\\n')\n"
    )
    env = {"LLAMA_CPP_LIB_PATH": str(folder), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = [Path(line) for line in done.stdout.split()]
    assert {path.parent for path in loaded} == {folder.resolve()}
    assert {"libllama.so", "libggml.so", "libggml-base.so"} <= {path.name for path in loaded}


@pytest.mark.native
def test_upstreams_converter_and_ours_come_along(tmp_path):
    upstream = library_folder().parent / "upstream"
    for name in ("LICENSE", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/base.py"):
        assert (upstream / name).is_file(), name
    assert (upstream / "gguf-py/gguf/__init__.py").is_file()
    done = subprocess.run(
        [sys.executable, "-c", "import swaa_edge.convert as c; print(c.__name__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "swaa_edge.convert\n", done.stderr
