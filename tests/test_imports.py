"""Imports go only to rows above, heavy ones only where they belong, and importing starts nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cnnlab

FOLDER = Path(cnnlab.__file__).parent
ORDER = [
    "recipe",
    "events",
    "record",
    "scaling",
    "model",
    "photos",
    "data",
    "machine",
    "replicas",
    "speed",
    "checkpoint",
    "train",
    "rank",
    "launch",
    "compare",
    "explain",
    "instruments",
    "device",
    "ladder",
    "plot",
    "board",
    "panel",
    "check",
    "__main__",
]
PANELS = {"board", "panel"}
ALLOWED_UPWARD = set()  # (module, what it imports although that stands below): none


def imported(module):
    """Names of cnnlab modules that a module imports, in functions as well, and of packages from elsewhere."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                ours.add(rest or "__init__") if top == "cnnlab" else others.add(top)
        elif isinstance(node, ast.ImportFrom):
            inside = node.level > 0 or (node.module or "").split(".")[0] == "cnnlab"
            name = (node.module or "").removeprefix("cnnlab").lstrip(".")
            if not inside:
                others.add(node.module.split(".")[0])
            elif name:
                ours.add(name.split(".")[0])
            else:
                ours |= {alias.name for alias in node.names}
    return ours, others


MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def test_every_module_has_a_row():
    assert set(MODULES) <= set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_only_to_rows_above(module):
    above = set(ORDER[: ORDER.index(module)])
    below = {(module, name) for name in imported(module)[0] - above}
    assert below <= ALLOWED_UPWARD


@pytest.mark.parametrize("module", [module for module in MODULES if module not in PANELS])
def test_only_the_panels_name_jupyter(module):
    assert not imported(module)[1] & {"ipywidgets", "IPython", "ipykernel", "jupyterlab"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_by_star(module):
    tree = ast.parse((FOLDER / f"{module}.py").read_text())
    assert not [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]


def loaded_after(statement):
    """Names of all modules in a fresh Python after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()
    )


def test_recipe_events_record_and_plot_do_without_torch():
    assert not {"torch", "ipywidgets", "IPython"} & loaded_after(
        "import cnnlab.recipe, cnnlab.events, cnnlab.record, cnnlab.plot"
    )


def test_all_but_the_panels_do_without_jupyter():
    names = ", ".join(f"cnnlab.{module}" for module in MODULES if module not in PANELS)
    assert not {"ipywidgets", "IPython", "ipykernel"} & loaded_after(f"import {names}")


def test_importing_starts_nothing_and_changes_nothing():
    code = """
import os, random, threading, warnings
warnings.simplefilter("ignore")
import numpy, psutil, torch, matplotlib, torch.utils.data, torch.distributed
before = torch.get_num_threads(), torch.initial_seed(), random.getstate(), str(numpy.random.get_state()), matplotlib.get_backend(auto_select=False), dict(os.environ)
import cnnlab, {modules}
after = torch.get_num_threads(), torch.initial_seed(), random.getstate(), str(numpy.random.get_state()), matplotlib.get_backend(auto_select=False), dict(os.environ)
assert before == after
assert not psutil.Process().children() and threading.active_count() == 1, (psutil.Process().children(), threading.enumerate())
""".replace("{modules}", ", ".join(f"cnnlab.{module}" for module in MODULES))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
