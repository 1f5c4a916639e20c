# Needs only Python >= 3.11 and make. `make demo` and `make test` create their own environments.

PYTHON ?= python3
VENV := .venv
COMPAT := .venv-compat
EVAL := .venv-eval
PY := $(VENV)/bin/python
SOURCES := vlmprune triton_kernels csrc tests benchmarks examples setup.py
SCENES := examples/glyphworld

# Keeps the checkout off sys.path: its triton_kernels/ must not pass for OpenAI's package of that name.
export PYTHONSAFEPATH := 1
# Two test workers with one torch thread each; more threads than cores slow everything down.
WORKERS ?= 2
PYTEST := -m pytest -q
PIP := -m pip install -q --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format typecheck test-interpret test-compile test-compat test-eval bench \
	bench-pytest resources wheel clean

help:
	@echo "make demo | test | install | lint | format | typecheck | test-compile | test-compat | test-eval"
	@echo "     bench | bench-pytest | resources | wheel | clean"

install: $(VENV)/.installed

# torch first and alone: resolved together with the rest, pip may fetch several torch builds of gigabytes each.
define make_environment
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'needs Python >= 3.11: make PYTHON=...')"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) torch==2.13.0
	$(@D)/bin/python $(PIP) -r $<
	$(@D)/bin/python $(PIP) --no-build-isolation --no-deps -e .
	touch $@
endef

$(VENV)/.installed: requirements/dev.txt setup.py pyproject.toml
	$(make_environment)

$(COMPAT)/.installed: requirements/compat.txt setup.py pyproject.toml
	$(make_environment)

$(EVAL)/.installed: requirements/eval.txt setup.py pyproject.toml
	$(make_environment)

demo: install
	$(VENV)/bin/vlmprune run --model $(SCENES)/checkpoint --image $(SCENES)/images/scene_70001.png \
		--prompt "locate the green phone ." --dtype float32 --compare --save kept.png \
		--policy fastv:layer=2,keep=40 --policy feather:layers=2/5,keep=0.3,stride=3

test: lint typecheck test-interpret test-compile test-compat

lint: install
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)

format: install
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/ruff check --fix $(SOURCES)

# mypy cannot follow the editable install's folder mapping, so it reads a plain copy of the package.
typecheck: install
	rm -rf build
	$(PY) $(PIP) --no-build-isolation --no-deps --target build/typecheck .
	MYPYPATH=build/typecheck $(VENV)/bin/mypy -p vlmprune

test-interpret: install
	OMP_NUM_THREADS=1 $(PY) $(PYTEST) -n $(WORKERS) --ignore tests/compile tests

test-compile: install
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(PY) $(PYTEST) -n $(WORKERS) tests/compile

# Measures on the GPU if there is one; benchmarks/README.md says what the lines mean. `make bench BENCH=--full` for everything.
bench: install
	$(PY) benchmarks/microbench.py $(BENCH)

bench-pytest: install
	$(PY) $(PYTEST) benchmarks/bench_*.py --benchmark-only

# Rewrites the tables of registers, spills and shared memory, which tests/compile compares with what the compilers give.
resources: install $(COMPAT)/.installed
	TRITON_INTERPRET=0 $(PY) tests/compile/_resources.py
	TRITON_INTERPRET=0 $(COMPAT)/bin/python tests/compile/_resources.py

test-compat: $(COMPAT)/.installed
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python $(PYTEST) -n $(WORKERS) tests/ops tests/models
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(COMPAT)/bin/python $(PYTEST) -n $(WORKERS) tests/compile

# lmms-eval without its own list: 140 packages that these tests do not import, another torch among them.
test-eval: $(EVAL)/.installed
	$(EVAL)/bin/python $(PIP) --no-deps lmms-eval==0.7.3
	OMP_NUM_THREADS=1 $(EVAL)/bin/python $(PYTEST) tests/integrations

wheel: install
	rm -rf build
	$(PY) -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist $(VENV) $(COMPAT) $(EVAL) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis kept.png
