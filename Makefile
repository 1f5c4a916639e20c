# Needs only Python >= 3.11 and make. `make demo` and `make test` create their own environments.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
FLOOR := .venv-torch-floor
EVAL := .venv-eval
VLLM := .venv-vllm
PAGES := .venv-pages
PY := $(VENV)/bin/python
TORCH := 2.13.0
SOURCES := vlmprune triton_kernels csrc tests benchmarks studies examples notebooks website setup.py
SCENES := examples/glyphworld

# Keeps the checkout off sys.path: its triton_kernels/ must not pass for OpenAI's package of that name.
export PYTHONSAFEPATH := 1
# Packages are installed uncompiled: a sixth of their files is ever imported, and Python compiles those once.
unexport PYTHONDONTWRITEBYTECODE
# Two test workers with one torch thread each; more threads than cores slow everything down.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal
PIP := -m pip install -q --disable-pip-version-check --no-compile

# One core for the engine, one for who asks; a gigabyte of KV cache; nothing is fetched or sent.
VLLM_SETTINGS := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 \
	VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format typecheck test-interpret test-compile test-slow test-oldest test-newest \
	test-torch-floor test-device test-eval test-vllm test-pages site gallery notebooks bench bench-pytest gpu-day resources wheel test-package clean

help:
	@echo "make demo | test | install | lint | format | typecheck"
	@echo "     test-slow | test-oldest | test-newest | test-torch-floor | test-device | test-eval | test-vllm | test-pages"
	@echo "     site | gallery | notebooks | bench | bench-pytest | gpu-day | resources | wheel | test-package | clean"

install: $(VENV)/.installed

# A pip that reads long indexes fast. Then torch, alone: resolved together with the rest, pip may fetch several torch
# builds of gigabytes each. Named again beside the rest, so that a conflict is an error and no other torch.
define make_environment
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'needs Python >= 3.11: make PYTHON=...')"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) pip==26.3
	$(@D)/bin/python $(PIP) torch==$(TORCH)
	$(@D)/bin/python $(PIP) torch==$(TORCH) -r $<
	$(@D)/bin/python $(PIP) --no-build-isolation --no-deps -e .
	touch $@
endef

$(VENV)/.installed: requirements/dev.txt setup.py pyproject.toml
	$(make_environment)

$(OLDEST)/.installed: requirements/oldest.txt setup.py pyproject.toml
	$(make_environment)

$(NEWEST)/.installed: requirements/newest.txt setup.py pyproject.toml
	$(make_environment)

$(FLOOR)/.installed: TORCH := 2.11.0
$(FLOOR)/.installed: requirements/oldest.txt setup.py pyproject.toml
	$(make_environment)

$(EVAL)/.installed: requirements/eval.txt setup.py pyproject.toml
	$(make_environment)

$(PAGES)/.installed: requirements/pages.txt setup.py pyproject.toml
	$(make_environment)

# vLLM's CPU build. PyPI's torchvision is made for CUDA: beside a CPU build of torch two of its registrations name operators
# that are not there, and nothing here calls them.
$(VLLM)/.installed: requirements/vllm.txt setup.py pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) pip==26.3
	$(@D)/bin/python $(PIP) torch==$(TORCH)
	$(@D)/bin/python $(PIP) --no-deps -r $<
	sed -i '/^@torch.library.register_fake("torchvision::q\?nms")$$/d' $(@D)/lib/python3*/site-packages/torchvision/_meta_registrations.py
	$(@D)/bin/python $(PIP) --no-build-isolation --no-deps -e .
	touch $@

demo: install
	$(VENV)/bin/vlmprune run --model $(SCENES)/checkpoint --image $(SCENES)/images/scene_70001.png \
		--prompt "locate the green phone ." --dtype float32 --compare --save kept.png \
		--policy fastv:layer=2,keep=40 --policy feather:layers=2/5,keep=0.3,stride=3

test: lint typecheck test-interpret test-compile

lint: install
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)

format: install
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/ruff check --fix $(SOURCES)

# mypy cannot follow the editable install's folder mapping, so it reads a copy laid out as the wheel is. user.py has the
# mistakes that a user's mypy must see.
typecheck: install
	rm -rf build/typecheck
	mkdir -p build/typecheck
	cp -r vlmprune build/typecheck
	cp -r triton_kernels build/typecheck/vlmprune
	cp tests/typing/user.py build/typecheck
	MYPYPATH=build/typecheck $(VENV)/bin/mypy -p vlmprune -m user

test-interpret: install
	$(PYTEST) -m "not slow" --ignore tests/compile --ignore tests/pages tests

test-compile: install
	TRITON_INTERPRET=0 $(PYTEST) -m "not slow" tests/compile

# What `make test` leaves out: the build of the CUDA extension, first as it takes longest, every launch for sm_90, a thousand
# requests, the stages of the first day on a GPU, small, and one case of every test on the device that is not there.
test-slow: install
	TRITON_INTERPRET=0 $(PYTEST) -m slow tests/csrc tests/benchmarks tests/compile tests/models tests/training
	$(MAKE) test-device CASES=--one-case

# What kernels and transformers have a part in, once more with the oldest supported versions, whose compiler meets every
# launch for one target (all of them: `make resources`) ...
HOSTED := tests/models tests/cli
WIRING := tests/models tests/policies

test-oldest: PY := $(OLDEST)/bin/python
test-oldest: $(OLDEST)/.installed
	$(PYTEST) -m "not slow" tests/ops $(HOSTED)
	TRITON_INTERPRET=0 $(PYTEST) -m "not slow" tests/compile

# ... and with those that pip resolves today: kernels too, unless their Triton is that of `make test`.
test-newest: PY := $(NEWEST)/bin/python
test-newest: $(NEWEST)/.installed
	$(PY) $(PIP) -U torch==$(TORCH) -r requirements/newest.txt
	$(PYTEST) -m "not slow" $(HOSTED)
	if ! grep -q "^triton==$$($(PY) -c 'import triton; print(triton.__version__)');" requirements/dev.txt; then \
		$(PYTEST) tests/ops && TRITON_INTERPRET=0 $(PYTEST) tests/compile; fi

# The oldest supported torch as well. Its wheel is a CUDA build, some 3 GB with what it needs to be imported, and the
# whole takes a while, so .ci/run leaves it out; benchmarks/results/torch_floor_test.log is the log of the last time.
test-torch-floor: PY := $(FLOOR)/bin/python
test-torch-floor: $(FLOOR)/.installed
	$(PYTEST) --ignore tests/compile tests
	TRITON_INTERPRET=0 $(PYTEST) tests/compile

# Models and policies on a device that is not there, which refuses what is left on the CPU: tests/_lib/helpers/pretended.py.
test-device: install
	$(PYTEST) -m "not slow" --device pretend $(CASES) $(WIRING)

# Measures on the GPU if there is one; benchmarks/README.md says what the lines mean. `make bench BENCH=--full` for everything.
bench: install
	$(PY) benchmarks/microbench.py $(BENCH)

bench-pytest: install
	$(PY) -m pytest benchmarks/bench_*.py --benchmark-only

# What a GPU machine without network is given, compiled by the Triton of the oldest versions: benchmarks/gpu_day/README.md.
gpu-day: $(OLDEST)/.installed
	TRITON_INTERPRET=0 $(OLDEST)/bin/python benchmarks/gpu_day/pack.py build/gpu_day

# Rewrites the tables of registers, spills and shared memory, which tests/compile compares with what the compilers give.
resources: install $(OLDEST)/.installed
	TRITON_INTERPRET=0 PYTHONPATH=tests/_lib $(PY) -m helpers.resources
	TRITON_INTERPRET=0 PYTHONPATH=tests/_lib $(OLDEST)/bin/python -m helpers.resources

# lmms-eval without its own list: 140 packages that these tests do not import, another torch among them.
test-eval: $(EVAL)/.installed
	$(EVAL)/bin/python $(PIP) --no-deps lmms-eval==0.7.3
	OMP_NUM_THREADS=1 $(EVAL)/bin/python -m pytest tests/integrations

# vLLM's own engine, on the CPU, in its own environment; benchmarks/results/vllm_test.log is the log of the last time.
test-vllm: $(VLLM)/.installed
	$(VLLM_SETTINGS) $(VLLM)/bin/python -m pytest tests/vllm

# What people look at: the page in a headless Chromium (Debian: apt install chromium), the site and every block of code on it,
# the notebooks.
test-pages: PY := $(PAGES)/bin/python
test-pages: $(PAGES)/.installed
	$(PYTEST) tests/pages

# The docs site, into build/site: no network needed, and none used by its pages.
site: build/gallery/gallery.json
	NO_MKDOCS_2_WARNING=1 $(PAGES)/bin/python -m mkdocs build -q --strict -d build/site

# What every method keeps at the same budgets. docs/gallery.webp is its contact sheet.
GALLERY := --model $(SCENES)/checkpoint-576 --questions $(SCENES)/gallery --dtype float32
build/gallery/gallery.json: $(PAGES)/.installed $(wildcard vlmprune/policies/*.py vlmprune/policies/*/*.py vlmprune/view/*.py $(SCENES)/gallery/* $(SCENES)/checkpoint-576/*)
	OMP_NUM_THREADS=1 $(PAGES)/bin/vlmprune gallery $(GALLERY) --out build/gallery

gallery: $(PAGES)/.installed
	OMP_NUM_THREADS=1 $(PAGES)/bin/vlmprune gallery $(GALLERY) --out build/gallery
	cp build/gallery/sheet.webp docs/gallery.webp

# Runs the notebooks and stores what their cells give.
notebooks: $(PAGES)/.installed
	OMP_NUM_THREADS=1 $(PAGES)/bin/python notebooks/execute.py

# The wheel is built from the sdist, so both hold the same. setuptools would add to the sdist what an older list of its
# files names.
wheel: install
	rm -rf dist vlmprune.egg-info
	$(PY) setup.py -q sdist
	rm -rf vlmprune.egg-info
	$(PY) -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w dist dist/*.tar.gz

# Installs them as a user would, for each Python with pip and with uv; PyPI's torch is a CUDA build of some 3 GB, so .ci/run
# leaves it out. `make test-package PYTHONS="python3.11 python3.12 python3.13"`.
test-package: wheel
	.ci/check_package $(PYTHONS)

clean:
	rm -rf build dist $(VENV) $(OLDEST) $(NEWEST) $(FLOOR) $(EVAL) $(VLLM) $(PAGES) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis kept.png
