"""The lessons as files: their structure, their cells, and their links. (nbval executes them.)"""

import re
from pathlib import Path

import nbformat
import pytest

from cnnlab import Recipe, run
from cnnlab.events import Evaluated

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))
SECTIONS = ["Predict", "By hand", "Measure", "Packaged", "Why", "Exercise"]
MAX_BY_HAND_LINES = 15


def cells(path, kind):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def text(path, kind):
    return "\n".join(cell.source for cell in cells(path, kind))


def notebook_id(path):
    return f"{path.parent.name}/{path.stem}" if path in SOLUTIONS else path.stem


def by_hand_cells(path):
    """The code cells of the section "By hand"."""
    section = None
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^## .*", cell.source, re.M)
            section = headings[-1] if headings else section
        elif section == "## By hand":
            yield cell.source


def count_lines(source):
    """Lines that a reader has to understand: no blank lines, imports or docstrings."""
    lines = [line.strip() for line in source.splitlines()]
    return sum(1 for line in lines if line and not line.startswith(("import ", "from ", '"""')))


@pytest.mark.parametrize("path", LESSONS[1:], ids=notebook_id)
def test_a_lesson_has_the_six_sections_in_order(path):
    headings = re.findall(r"^## (.*)", text(path, "markdown"), re.M)
    found = [section for heading in headings for section in SECTIONS if heading.startswith(section)]
    assert found == SECTIONS


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=notebook_id)
def test_notebooks_are_stored_without_outputs(path):
    assert not any(cell.outputs or cell.execution_count for cell in cells(path, "code"))


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=notebook_id)
def test_notebooks_use_no_star_imports_and_no_magics(path):
    assert not re.search(r"import \*|^%|^!", text(path, "code"), re.M)


@pytest.mark.parametrize("path", LESSONS[1:], ids=notebook_id)
def test_by_hand_cells_are_short(path):
    plotting = re.compile(r"\bax(es)?\b")  # plots may take more lines
    sources = [source for source in by_hand_cells(path) if not plotting.search(source)]
    assert sources
    assert not [source for source in sources if count_lines(source) > MAX_BY_HAND_LINES]


@pytest.mark.parametrize("path", LESSONS[1:], ids=notebook_id)
def test_a_lesson_has_two_to_four_exercises_and_all_are_solved(path):
    number = path.stem[:2]
    exercises = set(re.findall(rf'"({number}\.\d)"', text(path, "code")))
    assert 2 <= len(exercises) <= 4
    solutions = text(NOTEBOOKS / "solutions" / path.name, "code")
    assert exercises == set(re.findall(rf'assert check\.\w+\(\s*"({number}\.\d)"', solutions))


def test_links_between_lessons_are_valid():
    links = [
        (path, link)
        for path in LESSONS
        for link in re.findall(r"\]\(([^)#]+\.ipynb)\)", text(path, "markdown"))
    ]
    assert links
    assert not [(path.name, link) for path, link in links if not (path.parent / link).exists()]


def test_the_recipe_of_lesson_02_reaches_98_percent_accuracy():
    events = run(Recipe(batch_size=64, epochs=20, schedule="cosine", augment="shift"))
    assert [event.accuracy for event in events if isinstance(event, Evaluated)][-1] >= 0.98
