# make lab   sets up .venv once, then opens JupyterLab on the first lesson
# make test  sets up .venv once, then runs everything: unit tests, all lessons, the browser

PYTHON ?= python3
BIN := .venv/bin
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

# How long a waiting thread of OpenMP spins before it sleeps. The default blocks a core that the browser needs (see cnnlab/launch.py);
# the tests, two files at a time, do not spin at all: with spinning, two programs of two threads on two cores take five times as long.
lab: export GOMP_SPINCOUNT ?= 40000
test: export GOMP_SPINCOUNT ?= 0

lab: .venv/ready
	$(BIN)/jupyter lab --ip=127.0.0.1 $(AS_ROOT) --ServerApp.root_dir="$(CURDIR)/notebooks" --LabApp.default_url=/lab/tree/00_start_here.ipynb

test: .venv/ready
	CNNLAB_QUICK=1 CNNLAB_UNATTENDED=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env tests notebooks

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("cnnlab needs Python 3.10 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv || (echo "On Debian and Ubuntu: apt install python3-venv" && false)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[lab,test,tour,xla]"
	touch .venv/ready

clean:
	rm -rf .venv

.PHONY: lab test clean
