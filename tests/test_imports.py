"""What importing cnnlab loads and does. Which module may import which: see `pyproject.toml`."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import cnnlab

PACKAGE = Path(cnnlab.__file__).parent
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(PACKAGE)], "cnnlab."))
WITHOUT_WIDGETS = [name for name in MODULES if not name.startswith("cnnlab.widgets")]
LIGHT = [
    "cnnlab.recipe",
    "cnnlab.events",
    "cnnlab.record",
    "cnnlab.machine",
    "cnnlab.check",
    "cnnlab.measure.compare",
    "cnnlab.measure.scaling",
    "cnnlab.plots",
    "cnnlab.cli",
]
JUPYTER = {"IPython", "ipykernel", "ipywidgets", "jupyterlab"}

CHANGES_NOTHING = """
import os, random, sys, threading, warnings
warnings.simplefilter("ignore")
import matplotlib, numpy, psutil, torch, torch.distributed.fsdp, torch.utils.data

def state():
    return {
        "threads of torch": torch.get_num_threads(),
        "seed of torch": torch.initial_seed(),
        "operators of torch": len(torch._C._dispatch_get_all_op_names()),
        "random": random.getstate(),
        "numpy": str(numpy.random.get_state()),
        "matplotlib": matplotlib.get_backend(auto_select=False),
        "environment": dict(os.environ),
        "processes": psutil.Process().children(),
        "threads": threading.enumerate(),
    }

before = state()
import MODULES
changed = [name for name, value in state().items() if value != before[name]]
assert not changed, changed
"""


def source(module):
    path = PACKAGE.parent / Path(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def imported_packages(module):
    """The top-level packages that a module imports, also inside functions."""
    packages = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            packages.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.partition(".")[0])
    return packages


def loaded_after(statement):
    """The names of all modules that a new Python has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_all_modules_are_found():
    assert {"cnnlab.cli", "cnnlab.launch.worker", "cnnlab.widgets.board"} <= set(MODULES)
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert len(files) == len(MODULES)


@pytest.mark.parametrize("module", WITHOUT_WIDGETS)
def test_only_widgets_import_jupyter(module):
    assert not imported_packages(module) & JUPYTER


@pytest.mark.parametrize("module", MODULES)
def test_no_star_imports(module):
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.ImportFrom):
            assert "*" not in [alias.name for alias in node.names]


def test_the_package_loads_neither_torch_nor_numpy_nor_jupyter():
    loaded = loaded_after("import cnnlab")
    assert "cnnlab" in loaded
    assert not loaded & {"torch", "numpy", "matplotlib", *JUPYTER}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_neither_torch_nor_jupyter(module):
    loaded = loaded_after(f"import {module}")
    assert module in loaded
    assert not loaded & {"torch", *JUPYTER}


def test_all_modules_but_widgets_load_no_jupyter():
    loaded = loaded_after(f"import {', '.join(WITHOUT_WIDGETS)}")
    assert "torch" in loaded
    assert not loaded & JUPYTER


def test_importing_starts_nothing_and_changes_nothing():
    code = CHANGES_NOTHING.replace("MODULES", ", ".join(["cnnlab", *MODULES]))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_can_be_imported():
    assert {"Recipe", "CnnlabError", "run", "ranks", "replay", "compare", "explain"} <= set(
        dir(cnnlab)
    )
    for name in dir(cnnlab):
        assert getattr(cnnlab, name).__name__.rpartition(".")[2] == name


def test_public_names_are_the_objects_of_their_modules():
    from cnnlab.launch import launcher
    from cnnlab.recipe import Recipe

    assert cnnlab.Recipe is Recipe
    assert cnnlab.run is launcher.run


def test_folders_and_modules_can_be_imported_from_the_package():
    from cnnlab import check, data, machine, model, plots, record, widgets

    names = [module.__name__ for module in (check, data, machine, model, plots, record, widgets)]
    assert names == [
        f"cnnlab.{name}"
        for name in ("check", "data", "machine", "model", "plots", "record", "widgets")
    ]


def test_a_misspelled_name_raises_as_usual():
    with pytest.raises(AttributeError, match="Recpie"):
        cnnlab.Recpie  # noqa: B018
    with pytest.raises(ImportError, match="Recpie"):
        from cnnlab import Recpie  # noqa: F401
