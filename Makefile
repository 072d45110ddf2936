# make demo, make test: Python >= 3.10, make and a C++ compiler are all they need.
# `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
# The versions that the environment is made with.
CONSTRAINTS ?= constraints.txt
# What `make cuda-compile` compiles for; nvcc alone, no torch.
CUDA_ARCHITECTURES ?= 80 90a
# Processes that the test suite is divided among, each of one thread.
TEST_JOBS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
# More arguments for pytest, e.g. PYTEST_ARGS="-k eigsh".
PYTEST_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

CSRC := $(sort $(shell find csrc -type f))
BUILD_FILES := $(CSRC) setup.py hesskern/ops/source_digest.py
# What a copy of the tree needs in order to build and to run the tests.
TREE := $(wildcard setup.py pyproject.toml MANIFEST.in Makefile *.md LICENSE csrc docs examples hesskern tests)
COPY = rm -rf $(1)/csrc $(1)/hesskern $(1)/tests && mkdir -p $(1) && \
	tar -cf - --exclude='*.so' --exclude=__pycache__ $(TREE) | tar -xf - -C $(1)

.PHONY: help demo test fuzz kill lint format package sanitize cuda-compile cuda-bindings cuda-emulate \
	cuda-emulate-address cuda-emulate-thread cuda-build clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | \
		column -t -s '|'

demo: $(VENV)/built ## digits, a small network, and a report in demo/report.html
	$(VENV)/bin/hesskern analyze --output demo
	@echo "Open demo/report.html in a browser."

test: $(VENV)/built ## the whole test suite
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

# Models, the seed of the first, and processes; COUNT=1 SEED=S replays one.
COUNT ?= 1000
SEED ?= 0
JOBS ?= 1

# DEVICE=cuda: what is said on a GPU against what is said on the CPU.
fuzz: $(VENV)/built ## random models against torch's own derivatives: COUNT=1000 SEED=0 JOBS=1 THOROUGH=1
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -m fuzz \
		--count $(COUNT) --seed $(SEED) --jobs $(JOBS) $(if $(THOROUGH),--thorough) \
		$(if $(DEVICE),--device $(DEVICE))

kill: COUNT = 200
kill: $(VENV)/built ## passes killed -9 at random moments, COUNT=200 times each way; SEED=0
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -m kills --count $(COUNT) --seed $(SEED)

lint: $(VENV)/built ## ruff, mypy, clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)

format: $(VENV)/built ## rewrite the sources as lint wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

package: $(VENV)/built ## sdist and wheel in dist/, installed and checked
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python .ci/check_package.py dist

# torch first and alone: with another package in the same request pip may choose another build.
# Arguments: venv, constraints file.
define make_venv
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python >= 3.10 is needed")'
	@echo "Installing $$(grep '^torch==' $(2)) into $(1) (a large download)"
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -q --upgrade pip
	$(1)/bin/python -m pip install -q "$$(grep '^torch==' $(2))"
	$(1)/bin/python -m pip install -q 'setuptools>=64' wheel ninja
endef

$(VENV)/torch: $(CONSTRAINTS)
	$(call make_venv,$(VENV),$(CONSTRAINTS))
	@touch $@

$(VENV)/built: $(VENV)/torch $(BUILD_FILES) pyproject.toml
	@echo "Building hesskern and installing it into $(VENV)"
	@touch $@.begun
	PYTHONWARNINGS=ignore $(VENV)/bin/python -m pip install -q --no-build-isolation \
		-c $(CONSTRAINTS) -e '.[cli,test,dev]'
	@mv $@.begun $@  # as old as the build's begin: a source edited meanwhile is newer

# Preloaded: the interpreter is not instrumented, and exceptions cross from torch into hesskern.
SANITIZERS = LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 \
	UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2
# Not the sizes beyond 2^31: instrumented, one of them takes minutes.
SANITIZE_TESTS ?= $(filter-out tests/ops/test_ops_scale.py,$(wildcard tests/ops/test_ops*.py)) \
	tests/ops/test_conv_covariance.py tests/ops/test_kernel_paths.py

sanitize: $(VENV)/built ## the operators' tests under AddressSanitizer and UBSan
	@test -n "$(SANITIZE_TESTS)" || { echo "SANITIZE_TESTS names no test" >&2; exit 1; }
	$(call COPY,build/sanitize)
	cd build/sanitize && HESSKERN_CUDA=0 HESSKERN_SANITIZE=1 \
		$(abspath $(VENV))/bin/python setup.py -q build_ext --inplace >build.log 2>&1 || \
		{ cat build.log; exit 1; }
	cd build/sanitize && $(SANITIZERS) $(abspath $(VENV))/bin/python -c \
		"import hesskern; assert hesskern.build_info()['sanitized'], 'not sanitized'"
	# The file descriptors stay as they are, or an abort would take its own report along.
	cd build/sanitize && $(SANITIZERS) $(abspath $(VENV))/bin/python -m pytest \
		-p no:cacheprovider --capture=sys $(SANITIZE_TESTS)

cuda-compile: ## every .cu file with nvcc alone, warnings and spills as errors; no GPU, no torch
	$(PYTHON) .ci/compile_cuda.py --output build/cuda-compile $(CUDA_ARCHITECTURES)

cuda-bindings: $(VENV)/torch ## every CUDA binding with any torch and the toolkit's headers; no GPU
	$(VENV)/bin/python .ci/check_bindings.py

# The kernels on the CPU: every thread of a block a fiber under AddressSanitizer and UBSan; for
# ThreadSanitizer, which looks for races, a real thread, with fewer cases.
# Not position-independent, so that addresses are those of the symbols.
# One with the standard of newer torch's builds, one with that of older ones.
EMULATED_address = -std=c++20 -O1 -no-pie -fsanitize=address,undefined -fno-sanitize-recover=undefined
EMULATED_thread = -std=c++17 -O1 -fsanitize=thread -DHESSKERN_EMULATE_THREADS
EMULATED_SOURCES := $(filter csrc/cuda/%.cu,$(CSRC)) $(wildcard tests/cuda_on_cpu/*.cpp) \
	csrc/conv_plan.cpp
EMULATED_HEADERS := $(filter csrc/cuda/%.h,$(CSRC)) $(wildcard tests/cuda_on_cpu/*.h) csrc/conv_plan.h
EMULATED = build/cuda-emulate

define emulated_build
$(EMULATED)/$(1)/%.o: % $(EMULATED_HEADERS)
	@mkdir -p $$(@D)
	$$$${CXX:-c++} -g1 -Wall -Wextra -Wno-unknown-pragmas -Werror $$(EMULATED_$(1)) \
		-DHESSKERN_SM90A -Itests/cuda_on_cpu -Icsrc/cuda -Icsrc -x c++ -c $$< -o $$@

$(EMULATED)/$(1)/cuda_on_cpu: $(EMULATED_SOURCES:%=$(EMULATED)/$(1)/%.o)
	$$$${CXX:-c++} $$(EMULATED_$(1)) $$^ -o $$@ -pthread
endef
$(eval $(call emulated_build,address))
$(eval $(call emulated_build,thread))

cuda-emulate: cuda-emulate-address cuda-emulate-thread ## the CUDA kernels on the CPU, under sanitizers

cuda-emulate-address: $(EMULATED)/address/cuda_on_cpu
	ASAN_OPTIONS=detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(EMULATED)/address/cuda_on_cpu --kernels $(EMULATED)/kernels.txt
	$(PYTHON) .ci/check_emulated.py $(EMULATED)/address/cuda_on_cpu $(EMULATED)/kernels.txt

cuda-emulate-thread: $(EMULATED)/thread/cuda_on_cpu
	$(EMULATED)/thread/cuda_on_cpu --few

$(CUDA_VENV)/torch: constraints-cuda.txt
	$(call make_venv,$(CUDA_VENV),constraints-cuda.txt)
	@touch $@

cuda-build: $(CUDA_VENV)/torch ## build against a CUDA torch (6 GB, own environment), CPU tests there
	$(call COPY,build/cuda)
	cd build/cuda && PYTHONWARNINGS=ignore HESSKERN_CUDA=1 \
		$(abspath $(CUDA_VENV))/bin/python -m pip install -q --no-build-isolation \
		-c $(abspath constraints-cuda.txt) -e '.[cli,test]'
	cd build/cuda && $(abspath $(CUDA_VENV))/bin/python $(abspath .ci/check_cuda_build.py)
	cd build/cuda && $(abspath $(CUDA_VENV))/bin/python -m pytest -p no:cacheprovider $(PYTEST_ARGS)

clean: ## everything that make made
	rm -rf $(VENV) $(CUDA_VENV) build dist demo hesskern.egg-info hesskern/_C*.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find hesskern tests -name __pycache__ -prune -exec rm -rf {} +
