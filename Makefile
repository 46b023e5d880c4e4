# `make demo` makes a video, `make test` runs the tests. Both set up everything they need in $(VENV), once.

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a green square moving up on a blue background
OUTPUT ?= outputs/demo.mp4

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help

.PHONY: help
help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

INPUTS := pyproject.toml constraints.txt
RUN := .
DEVELOP := .[test,quality]

# $(call install,WHAT): make the environment and install WHAT in it
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fastdit needs Python 3.10 or later; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "setting up $(VENV); PyTorch is a large download"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '$(1)'
	@touch $(VENV)/.ready
endef

$(VENV)/.ready: $(INPUTS)
	$(call install,$(RUN))

$(VENV)/.ready-dev: $(INPUTS)
	$(call install,$(DEVELOP))
	@touch $@

.PHONY: demo
demo: $(VENV)/.ready  ## Make a video, sparse and dense, and say how they compare (PROMPT="...", OUTPUT=...)
	@mkdir -p $(dir $(OUTPUT))
	$(VENV)/bin/fastdit generate "$(PROMPT)" --compare -o "$(OUTPUT)" --report "$(basename $(OUTPUT)).json"
	@echo "the videos are in $(abspath $(dir $(OUTPUT)))"

.PHONY: results
results: demo  ## Put the pictures and numbers of `make demo` into the README, and keep them in benches/results
	cp "$(basename $(OUTPUT)).json" benches/results/demo.json
	$(PY) docs/results.py benches/results/demo.json

# A process for each core, each with one thread; ARGS="-n 0" runs the tests in one process.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

.PHONY: test
test: $(VENV)/.ready-dev  ## Run all tests
	$(PYTEST) $(ARGS)

.PHONY: test-fast
test-fast: $(VENV)/.ready-dev  ## Run the tests that take seconds
	$(PYTEST) -m "not slow" $(ARGS)

# The Triton of the oldest PyTorch that is supported on a GPU; it compiles beside any PyTorch.
OLD_TRITON := 3.6.0
OLD_TRITON_AT := $(abspath $(VENV))/triton-$(OLD_TRITON)

$(OLD_TRITON_AT)/.ready: $(VENV)/.ready-dev
	$(PY) -m pip install --disable-pip-version-check --no-deps --target $(OLD_TRITON_AT) triton==$(OLD_TRITON)
	@touch $@

.PHONY: gate
gate: $(OLD_TRITON_AT)/.ready  ## Compile the Triton kernels with an older Triton (`make test` does so with the installed one)
	PYTHONPATH=$(OLD_TRITON_AT) $(PY) -c 'import triton; assert triton.__version__ == "$(OLD_TRITON)", triton'
	PYTHONPATH=$(OLD_TRITON_AT) $(PYTEST) tests/test_kernels_compile.py $(ARGS)

.PHONY: style
style: $(VENV)/.ready-dev  ## Format the code and mend what can be mended
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

.PHONY: quality lint docstrings types arrows
quality: lint docstrings types arrows  ## Check style, docstrings, types, import arrows

lint: $(VENV)/.ready-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

docstrings: $(VENV)/.ready-dev
	$(PY) tests/docstrings.py

types: $(VENV)/.ready-dev
	$(PY) -m basedpyright --pythonpath $(PY)

arrows: $(VENV)/.ready-dev
	$(PY) -m pytest -q tests/test_imports.py

.PHONY: clean
clean:  ## Remove caches and build products
	rm -rf build dist .pytest_cache .ruff_cache
	find fastdit tests benches tools -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## Remove the environment and the videos too
	rm -rf $(VENV) outputs
