"""Set-up: pyproject.toml, the pins, environment.yml, make and CI say the same."""

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DEPENDENCIES = [
    Requirement(text)
    for text in [
        *PROJECT["dependencies"],
        *EXTRAS["lab"],
        *EXTRAS["test"],
        *EXTRAS["tour"],
        *EXTRAS["xla"],
    ]
]
NO_PIN = {"triton"}  # each CUDA build of torch asks for one version of it
PINS = [
    Requirement(line)
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=lambda dependency: dependency.name)
def test_every_dependency_has_one_pin_within_its_range(dependency):
    pins = [pin for pin in PINS if plain(pin.name) == plain(dependency.name)]
    if dependency.name in NO_PIN:
        assert not pins
        return
    assert len(pins) == 1
    assert dependency.specifier.contains(str(pins[0].specifier).removeprefix("=="))


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="the pins are the tested set of Python 3.11"
)
def test_the_installed_versions_are_the_pinned_ones():
    installed = {pin.name: version(pin.name).split("+")[0] for pin in PINS}
    assert installed == {pin.name: str(pin.specifier).removeprefix("==") for pin in PINS}


def test_conda_installs_what_make_installs():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    make = re.search(r"pip install --quiet (.*)", (REPOSITORY / "Makefile").read_text()).group(1)
    assert " ".join(pip) == make.replace('"', "")
    assert "python=3.11" in conda and "cxx-compiler" in conda


def test_ci_runs_the_command_of_the_readme():
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text()
    readme = (REPOSITORY / "README.md").read_text()
    assert "make lab" in readme and "make test" in readme


def test_the_core_needs_no_notebook_packages():
    core = " ".join(PROJECT["dependencies"]).lower()
    assert not any(
        name in core
        for name in ("jupyter", "ipywidgets", "ipython", "ipykernel", "nbval", "playwright")
    )


def test_the_readme_explains_every_dependency():
    readme = (REPOSITORY / "README.md").read_text().lower()
    missing = [
        dependency.name
        for dependency in DEPENDENCIES
        if f"| {dependency.name.lower()}" not in readme
    ]
    assert not missing


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()
