# All targets run in a virtual environment of their own, with fdkernels installed from this source tree. Needs Python
# 3.10 or later and, for the C++ kernels, a C++ compiler.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_FLAGS) -c constraints.txt

# `build-system.requires` of pyproject.toml, which pip does not install without build isolation. Isolation would
# download it for each build, unpinned, and recompile unchanged files.
BUILD_TOOLS := cmake ninja pybind11 setuptools

# Include folders: their modification time records removed files.
SOURCES := pyproject.toml setup.py CMakeLists.txt LICENSE $(wildcard README.md) \
	$(shell find csrc fdkernels -name '__pycache__' -prune -o \( -type d -o -name '*.py' -o -name '*.md' \
	-o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name 'py.typed' \) -print)
CPP_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# PYTHONPATH could shadow the installed package with this source tree, which has no compiled module. `python -m pytest`
# would do the same, so the recipes call the scripts in $(BIN).
unexport PYTHONPATH

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(VENV)/.demo ## Train a small UNet without and with the loss; results go to demo_output/
	$(BIN)/fdkernels demo --output demo_output

# Use Triton's interpreter where there is no GPU; it must be selected before triton is imported.
.PHONY: test test-slow
test: lint ## Run the linters and the tests
	TRITON_INTERPRET=$$($(BIN)/python -c "import torch; print(int(not torch.cuda.is_available()))") \
		$(BIN)/pytest -m "not slow and not clients"

test-slow: $(VENV)/.dev ## Run the tests that take minutes
	TRITON_INTERPRET=$$($(BIN)/python -c "import torch; print(int(not torch.cuda.is_available()))") \
		$(BIN)/pytest -m slow

# Other people's packages have a virtual environment of their own: some change what the rest of the tests import.
.PHONY: test-clients run-clients
test-clients: ## Train networks of MONAI, timm, transformers and others with the loss, in $(VENV)-clients
	$(MAKE) VENV=$(VENV)-clients run-clients

run-clients: $(VENV)/.clients
	$(BIN)/pytest -m clients

# Checks that take long, each beside the tests of `make test` and of no CI; docs/ has what their last runs gave.
.PHONY: test-matrix sanitize study fuzz
test-matrix: $(VENV)/.dev ## Test one wheel beside each torch and Python, into docs/versions.md (hours, gigabytes)
	cd python_tests && $(abspath $(BIN))/python -m matrix.run

sanitize: $(VENV)/.dev ## Test the C++ and the emulated CUDA kernels under sanitizers (needs g++)
	cd python_tests && PATH="$(abspath $(BIN)):$$PATH" $(abspath $(BIN))/python -m sanitize.run

study: $(VENV)/.dev ## Repeat docs/study.md on the data sets in DATA=FOLDER (hours on two cores)
	$(BIN)/python docs/study/repeat.py --data $(DATA) --output study_output

FUZZ_CASES ?= 100000
FUZZ_FIRST ?= 0
fuzz: $(VENV)/.dev ## Try FUZZ_CASES random calls of the op and as many broken files, from seed FUZZ_FIRST
	cd python_tests; failed=0; for part in op files; do \
		$(abspath $(BIN))/python -m fuzz.$$part --cases $(FUZZ_CASES) --first $(FUZZ_FIRST) || failed=1; \
	done; exit $$failed

# What is measured lies in a folder for the kind of machine: a new run takes the place of the last one. Training steps
# under torch.compile and autocast are those of one network, as CPUs are slow at both.
.PHONY: bench bench-full bench-instructions bench-report
bench: $(VENV)/.bench ## Measure the op beside its floors and its peers (about ten minutes)
	folder=benchmarks/results/$$($(BIN)/python -m benchmarks.cases); \
	$(BIN)/python -m benchmarks.calls --set core,scaling --results $$folder/calls.json $(BENCH_FLAGS); \
	$(BIN)/python -m benchmarks.classes --results $$folder/classes.json; \
	$(BIN)/python -m benchmarks.steps --modes eager channels_last --output $$folder/steps.json; \
	$(BIN)/python -m benchmarks.steps --modes compiled --networks unet --output $$folder/steps-compiled.json; \
	$(BIN)/python -m benchmarks.steps --modes amp --networks unet --output $$folder/steps-amp.json; \
	$(BIN)/python -m benchmarks.host --output $$folder/host.json; \
	$(BIN)/python -m benchmarks.counts launches || echo "Launches were not counted."
	$(MAKE) bench-report

bench-full: $(VENV)/.bench ## Measure every case in every dtype and layout (an hour and more)
	folder=benchmarks/results/$$($(BIN)/python -m benchmarks.cases); \
	$(BIN)/python -m benchmarks.calls --set full,scaling --results $$folder/calls.json $(BENCH_FLAGS)
	$(MAKE) bench-report

bench-instructions: $(VENV)/.bench ## Count the instructions of a call with callgrind, and compare with the last count
	$(BIN)/python -m benchmarks.counts instructions
	$(MAKE) bench-report

bench-report: $(VENV)/.bench ## Make benchmarks/README.md and the tables from the measured results
	$(BIN)/python -m benchmarks.page

.PHONY: lint format
lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: $(VENV)/.dev ## Format the sources
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

.PHONY: wheel sdist
wheel: $(VENV)/.dev ## Build a wheel into dist/
	$(BIN)/python -m build --wheel

sdist: $(VENV)/.dev ## Build a source distribution into dist/
	$(BIN)/python -m build --sdist

.PHONY: clean
clean: ## Remove build output and caches, but not the virtual environment
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f fdkernels/_C*.so fdkernels/_build_report.json $(VENV)/.package

$(VENV)/.tools: constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'fdkernels needs Python 3.10 or later; \
	set PYTHON, as in make PYTHON=python3.12')"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) --quiet --upgrade pip $(BUILD_TOOLS)
	@touch $@

$(VENV)/.package: $(VENV)/.tools $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --quiet --no-build-isolation --no-deps --force-reinstall .
	@touch $@

# Install the dependencies of the extra of that name.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.bench $(VENV)/.clients: $(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/.package
	$(PIP) "fdkernels[$*]"
	@touch $@
