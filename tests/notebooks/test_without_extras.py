"""Lessons 04 to 09 where everything is missing that can be: the extras, a compiler, the network, a GPU. They run through, and say what is missing."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
HIDDEN = ("numba", "tbb", "pyopencl", "mpi4py", "triton", "jax", "jaxlib")
SITE = f"""
import socket
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: None if name.partition(".")[0] in {HIDDEN} else find(name, path, target)
connect = socket.socket.connect

def at_home(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(101, "Network is unreachable")
    return connect(self, address)

socket.socket.connect = at_home
"""
SAID = {  # words that must stand in the outputs of a lesson
    "04": ["numba", "pyopencl", "mpi4py", "triton"],
    "05": ["GPU"],
    "06": ["GPU"],
    "07": ["GPU"],
    "08": ["C++ compiler|g\\+\\+", "GPU"],
    "09": ["JAX is not installed", "g\\+\\+"],
}


@pytest.fixture
def bare(tmp_path):
    """The environment of a kernel that has nothing but the core and Jupyter."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "bin").mkdir()
    return {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "PATH": str(tmp_path / "bin"),
        "CUDA_VISIBLE_DEVICES": "",
        "CNNLAB_QUICK": "1",
        "CNNLAB_UNATTENDED": "1",
        "CNNLAB_DATA": str(tmp_path / "data"),
        "CXX": "",
    }


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")) if path.name[:2] in SAID],
    ids=lambda path: path.stem,
)
def test_a_lesson_runs_through_and_says_what_is_missing(path, bare):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=200,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute(env=bare)
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    said = "\n".join(output.get("text", "") for output in outputs)
    for words in SAID[path.name[:2]]:
        assert re.search(words, said), f"nothing is said of {words}"
    assert "Traceback" not in said


def test_what_is_hidden_cannot_be_had(bare):
    """Else the test above would show nothing."""
    import subprocess

    code = "import importlib, shutil, socket, torch\nfor name in {}:\n    try:\n        importlib.import_module(name)\n    except ModuleNotFoundError:\n        print('hidden', name)\n".format(
        HIDDEN
    )
    code += "assert not torch.cuda.is_available() and not shutil.which('g++')\ntry:\n    socket.create_connection(('192.0.2.1', 80), 2)\nexcept OSError as error:\n    print(error)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], env=bare, capture_output=True, text=True, timeout=60
    )
    assert re.findall(r"hidden (\w+)", done.stdout) == list(HIDDEN), done.stderr
    assert "unreachable" in done.stdout
