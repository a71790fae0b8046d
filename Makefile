# Everything is set up by the first target that needs it, into this folder: .venv/, vendor/, build/.
# Needs Python >= 3.10 and a C++ compiler. If ccache is installed, builds use it.

PYTHON ?= python3
JOBS   ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
# Options for llama.cpp, for the library and the baseline alike: make setup CMAKE_ARGS="-DGGML_CUDA=ON"
CMAKE_ARGS ?=

VENV     := .venv
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip --disable-pip-version-check
STAMPS   := $(VENV)/.stamps
NATIVE   := build/editable
BASELINE := build/baseline
VERSION  := $(shell sed -n 's/^version *= *//p' patches/UPSTREAM)
SDIST    := $(or $(SWAA_EDGE_CACHE),vendor)/llama_cpp_python-$(VERSION).tar.gz

# What the native build is made from. The install is editable, so an edited Python file needs no new one; a module that
# is added, moved or deleted does, and changes the time stamp of its folder.
MODULES  := $(shell find swaa_edge convert -type d -not -name __pycache__)
SOURCES  := CMakeLists.txt pyproject.toml swaa_edge/__init__.py $(MODULES) $(wildcard cmake/* scripts/patches.py scripts/patches_lib/*.py) $(shell find patches -type f -not -name '*.md')

# PATH: the environment's cmake and ninja come first, so every build here uses the same ones.
export PATH                      := $(CURDIR)/$(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
# Lets ccache recognise files of another clone of this repository.
export CCACHE_BASEDIR            := $(CURDIR)
export CCACHE_NOHASHDIR          := 1
unexport PYTHONPATH PYTHONHOME LLAMA_CPP_LIB_PATH

.PHONY: help setup native demo real test baseline op-tests arm-check wheel lint clean distclean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "%-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMPS)/native  ## everything into .venv/; the command is .venv/bin/swaa-edge

native:  ## build the library again, after an edit in vendor/llama.cpp-patched
	rm -f $(STAMPS)/native
	$(MAKE) setup

demo: setup  ## set up, then the main job on real input, in about a minute
	$(BIN)/swaa-edge demo

real: setup  ## set up, fetch a real model of 135M parameters (93 MB), show it at work, and measure it in a short table
	$(BIN)/python scripts/real/fetch.py
	$(BIN)/python scripts/real/demo.py
	$(BIN)/python scripts/real/measure.py --quick

test: setup baseline op-tests  ## set up, then all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

baseline: $(BASELINE)/.built  ## the unpatched library at the same flags, in build/baseline/lib

op-tests: setup  ## upstream's op tests with our cases, as build/editable/bin/test-backend-ops
	$(BIN)/cmake --build $(NATIVE) --target test-backend-ops

# Its own flags go into ARM_ARGS: make arm-check ARM_ARGS="--march all"
arm-check: $(STAMPS)/venv  ## the CPU attention kernels for Arm, cross-compiled, their op tests under qemu-user; takes long
	$(BIN)/python scripts/arm/check.py $(ARM_ARGS)

wheel: $(STAMPS)/venv  ## a wheel for this platform, any CPU of it, in dist/
	CMAKE_ARGS="$(CMAKE_ARGS)" $(PIP) wheel --no-deps --wheel-dir dist .

lint: setup  ## ruff: its checks, and its format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

clean:  ## forget the builds
	rm -rf build dist $(STAMPS)/native

distclean: clean  ## forget everything that setup made
	rm -rf $(VENV) vendor

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); 3.10 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

# torch first: it decides the versions of much else, and its pin lives here only.
$(STAMPS)/torch: constraints.txt | $(STAMPS)/venv
	$(PIP) install -c constraints.txt torch scikit-build-core cmake ninja
	touch $@

# llama-cpp-python without its own library, which ours replaces. No pip cache: pip would keep this wheel without a
# library and install it elsewhere. From the sdist that was just fetched, if it is still there.
$(STAMPS)/llama-cpp-python: patches/UPSTREAM | $(STAMPS)/torch
	$(BIN)/python scripts/patches.py fetch
	CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(PIP) install --no-cache-dir --no-build-isolation \
	  -c constraints.txt $$(test -f $(SDIST) && echo $(SDIST) || echo llama-cpp-python==$(VERSION))
	touch $@

# Options given now may differ from those of the last build, so they always lead to a build; it is incremental.
$(STAMPS)/native: $(SOURCES) $(if $(CMAKE_ARGS),always) | $(STAMPS)/llama-cpp-python
	@echo "Building llama.cpp: some minutes the first time"
	CMAKE_ARGS="$(CMAKE_ARGS)" $(PIP) install --no-build-isolation -c constraints.txt -e '.[dev,plot]'
	touch $@

$(BASELINE)/.built: CMakeLists.txt patches/UPSTREAM $(wildcard cmake/*) $(if $(CMAKE_ARGS),always) | $(STAMPS)/native
	$(BIN)/cmake -S . -B $(BASELINE) -G Ninja -DSWAA_EDGE_BASELINE=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python $(CMAKE_ARGS)
	$(BIN)/cmake --build $(BASELINE) --target swaa-edge-libraries
	$(BIN)/cmake --install $(BASELINE) --prefix $(BASELINE) --component swaa_edge
	touch $@

.PHONY: always
