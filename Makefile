# make lab    sets up .venv once, then opens JupyterLab on the first lesson
# make check  format, lint, layers, types and the fast unit tests: about a minute
# make test   make check, then everything: all unit tests, all lessons, the browser
# make test-panels   all lessons in a browser, and all of their panels: about 15 minutes
# make test-gpu   the tests that need a GPU; they need torch and pytest, but no Jupyter

PYTHON ?= python3
BIN := .venv/bin
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
# Unit tests that start no ranks.
FAST_TESTS := tests/plots tests/data/test_loader.py \
	tests/measure/test_scaling.py tests/training/test_clock.py tests/measure/test_predictor.py \
	$(addprefix tests/test_,$(addsuffix .py,check events imports machine model packaging recipe record))

# How long a waiting OpenMP thread spins before it sleeps. The default blocks a core that the browser
# needs (see cnnlab/launch); the tests, two files at a time, do not spin at all: with spinning, two
# programs with two threads each take five times longer on two cores.
lab: export GOMP_SPINCOUNT ?= 40000
check test: export GOMP_SPINCOUNT ?= 0

lab: .venv/ready
	$(BIN)/jupyter lab --ip=127.0.0.1 $(AS_ROOT) --ServerApp.root_dir="$(CURDIR)/notebooks" --LabApp.default_url=/lab/tree/00_start_here.ipynb

check: .venv/ready
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=0 --durations-min=5 $(FAST_TESTS)

test: check
	CNNLAB_QUICK=1 CNNLAB_UNATTENDED=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env $(addprefix --ignore=,$(FAST_TESTS)) tests notebooks

# In .venv, or in the Python that has torch for the GPU.
test-gpu:
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m pytest -o addopts= --confcutdir=tests/gpu -m gpu -rs -v tests/gpu

# `make test` uses one panel of each kind in the same way.
test-panels: .venv/ready
	CNNLAB_ALL_PANELS=1 $(BIN)/python -m pytest tests/browser/test_lessons.py

# JupyterLab's news dialog would greet every learner: its extension is disabled, in .venv only.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("cnnlab needs Python 3.10 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv || (echo "On Debian and Ubuntu: apt install python3-venv" && false)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[lab,test,tour,xla]"
	$(BIN)/jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements
	touch .venv/ready

clean:
	rm -rf .venv

.PHONY: lab check test test-panels test-gpu clean
