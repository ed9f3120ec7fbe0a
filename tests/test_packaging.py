"""Setup: pyproject.toml, the pins, environment.yml, the Makefile, CI and the README agree."""

import ast
import re
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(text) for text in texts]
    for extra, texts in PROJECT["optional-dependencies"].items()
}
DEPENDENCIES = [*CORE, *(requirement for extra in EXTRAS.values() for requirement in extra)]
NO_PIN = {"triton"}  # each CUDA build of torch requires one version of it
PINS = [
    Requirement(line)
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def names(requirements):
    return {canonicalize_name(requirement.name) for requirement in requirements}


def commands(path):
    """The lines of a script or Makefile without comments and indentation."""
    lines = (line.strip() for line in (REPOSITORY / path).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def distributions_imported_by(paths):
    """The distributions whose packages some files import, without the standard library and us."""
    packages = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                packages.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                packages.add(node.module.partition(".")[0])
    programs = {path.stem for path in (REPOSITORY / "notebooks" / "programs").glob("*.py")}
    packages -= {*sys.stdlib_module_names, "cnnlab", "helpers", "many_machines", "recorded"}
    packages -= programs
    found = packages_distributions()
    return {canonicalize_name(found[package][0]) for package in packages}


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=lambda dependency: dependency.name)
def test_every_dependency_has_one_pin_within_its_range(dependency):
    pins = [
        pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(dependency.name)
    ]
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


def test_the_core_dependencies_are_what_the_package_imports():
    files = [path for path in (REPOSITORY / "cnnlab").rglob("*.py") if "widgets" not in path.parts]
    assert distributions_imported_by(files) == names(CORE)


def test_the_panels_import_only_the_core_and_the_extra_lab():
    imported = distributions_imported_by((REPOSITORY / "cnnlab" / "widgets").glob("*.py"))
    assert {"ipython", "ipywidgets"} <= imported
    assert imported <= names(CORE + EXTRAS["lab"])


def test_the_tests_import_only_what_the_extra_test_declares():
    files = [
        path for path in (REPOSITORY / "tests").rglob("*.py") if "benchmarks" not in path.parts
    ]
    assert distributions_imported_by(files) <= names(CORE + EXTRAS["lab"] + EXTRAS["test"])


def test_the_core_needs_no_notebook_packages():
    notebook = {"ipykernel", "ipython", "ipywidgets", "jupyterlab", "nbval", "playwright"}
    assert not names(CORE) & notebook


def test_every_folder_of_the_package_is_installed():
    folders = {path.parent for path in (REPOSITORY / "cnnlab").rglob("*.py")}
    assert len(folders) > 1
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_conda_installs_what_make_installs():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    make = re.search(r"pip install --quiet (.*)", (REPOSITORY / "Makefile").read_text()).group(1)
    assert " ".join(pip) == make.replace('"', "")
    assert "python=3.11" in conda and "cxx-compiler" in conda


def test_ci_ends_with_make_test():
    assert commands(".ci/run")[-1] == "make test"


def test_make_test_checks_first():
    assert "test: check" in commands("Makefile")
    check = "\n".join(commands("Makefile"))
    for tool in ("ruff format --check", "ruff check", "lint-imports", "mypy"):
        assert re.search(rf"^\$\(BIN\)/{tool}\b", check, re.MULTILINE), tool


def test_the_readme_names_the_commands():
    readme = (REPOSITORY / "README.md").read_text()
    assert re.search(r"\bmake lab\b", readme) and re.search(r"\bmake test\b", readme)


def test_the_readme_explains_exactly_the_dependencies():
    section = (REPOSITORY / "README.md").read_text().partition("## Dependencies\n")[2]
    rows = re.findall(r"^\| ([\w.-]+) \| .+ \|$", section.partition("\n## ")[0], re.MULTILINE)
    assert sorted(rows[1:]) == sorted(dependency.name for dependency in DEPENDENCIES)
