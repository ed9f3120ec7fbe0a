"""Lessons without extras, compiler, network and GPU: they run and say what is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
HIDDEN = ("numba", "tbb", "pyopencl", "mpi4py", "triton", "jax", "jaxlib")
SITECUSTOMIZE = f"""
import socket
from importlib.machinery import PathFinder

find = PathFinder.find_spec
connect = socket.socket.connect


def find_unless_hidden(name, path=None, target=None):
    if name.partition(".")[0] in {HIDDEN}:
        return None
    return find(name, path, target)


def connect_locally(self, address):
    remote = address[0] not in ("127.0.0.1", "::1", "localhost")
    if self.family in (socket.AF_INET, socket.AF_INET6) and remote:
        raise OSError(101, "Network is unreachable")
    return connect(self, address)


PathFinder.find_spec = find_unless_hidden
socket.socket.connect = connect_locally
"""
# Patterns that a lesson must print. The other lessons use no extras, compiler or system tools.
EXPECTED = {
    "04": ["numba is missing", "no C compiler"],
    "05": ["mpi4py"],
    "08": ["numba is missing", "OpenCL is missing", "Triton is missing"],
    "10": [r"C\+\+ compiler|g\+\+", "GPU"],
    "11": ["JAX is not installed", r"g\+\+"],
    "15": ["Virtual hosts are not available", "is simulated"],
}
LESSONS = [path for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")) if path.name[:2] in EXPECTED]
PROBE = f"""
import importlib
import shutil
import socket

import torch

for name in {HIDDEN}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        print("hidden", name)
assert not torch.cuda.is_available() and not shutil.which("g++")
try:
    socket.create_connection(("192.0.2.1", 80), 2)
except OSError as error:
    print(error)
"""


@pytest.fixture
def bare(tmp_path):
    """The environment of a kernel that has only the core packages and Jupyter."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "bin").mkdir()
    return {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "PATH": str(tmp_path / "bin"),
        "CUDA_VISIBLE_DEVICES": "",
        "CNNLAB_QUICK": "1",
        "CNNLAB_DATA": str(tmp_path / "data"),
        "CXX": "",
    }


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_says_what_is_missing(path, bare):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=200, kernel_name="python3", resources=resources)
    client.execute(env=bare)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = "\n".join(output.get("text", "") for cell in code for output in cell.outputs)
    for pattern in EXPECTED[path.name[:2]]:
        assert re.search(pattern, printed), f"the lesson says nothing about {pattern}"
    assert "Traceback" not in printed


def test_the_bare_environment_hides_packages_compiler_network_and_gpu(bare):
    """Otherwise the test above would prove nothing."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=bare, capture_output=True, text=True, timeout=60
    )
    assert re.findall(r"hidden (\w+)", done.stdout) == list(HIDDEN), done.stderr
    assert "unreachable" in done.stdout
