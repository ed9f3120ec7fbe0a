"""The lessons as files: their rhythm, their cells, and what they promise. (nbval executes them.)"""

import re
from pathlib import Path

import nbformat
import pytest

from cnnlab.events import Evaluated
from cnnlab.launch.launcher import run
from cnnlab.recipe import Recipe

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))
RHYTHM = ["Predict", "By hand", "Measure", "Packaged", "Why", "Exercise"]


def ids(path):
    return path.stem


@pytest.mark.parametrize("path", LESSONS[1:], ids=ids)
def test_a_lesson_keeps_the_rhythm(path):
    headings = re.findall(
        r"^## (.*)", "\n".join(cell.source for cell in cells(path, "markdown")), re.M
    )
    found = [
        next((step for step in RHYTHM if heading.startswith(step)), None) for heading in headings
    ]
    assert [step for step in found if step] == RHYTHM


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=ids)
def test_no_output_is_kept_that_would_give_the_measurement_away(path):
    assert not any(cell.outputs or cell.execution_count for cell in cells(path, "code"))


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=ids)
def test_imports_are_explicit(path):
    assert not any(re.search(r"import \*|^%|^!", cell.source, re.M) for cell in cells(path, "code"))


@pytest.mark.parametrize("path", LESSONS[1:], ids=ids)
def test_what_is_done_by_hand_can_be_taken_in_at_a_glance(path):
    section, long = None, []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            section = next(
                (line for line in reversed(cell.source.splitlines()) if line.startswith("## ")),
                section,
            )
        elif section == "## By hand" and not re.search(
            r"\bax(es)?\b", cell.source
        ):  # pictures may take longer
            lines = [
                line
                for line in cell.source.splitlines()
                if line.strip() and not line.strip().startswith(("import ", "from ", '"""'))
            ]
            long += [cell.source] if len(lines) > 15 else []
    assert not long


@pytest.mark.parametrize("path", LESSONS[1:], ids=ids)
def test_a_lesson_has_exercises_with_checks_and_solutions(path):
    checks = "\n".join(cell.source for cell in cells(path, "code"))
    number = path.stem[:2]
    exercises = set(re.findall(rf'"({number}\.\d)"', checks))
    assert 2 <= len(exercises) <= 4
    solved = "\n".join(cell.source for cell in cells(NOTEBOOKS / "solutions" / path.name, "code"))
    assert exercises == set(re.findall(rf'assert check\.\w+\(\s*"({number}\.\d)"', solved))


def test_links_between_lessons_lead_somewhere():
    for path in LESSONS:
        for link in re.findall(
            r"\]\(([^)#]+\.ipynb)\)", "\n".join(cell.source for cell in cells(path, "markdown"))
        ):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_the_recipe_of_lesson_02_reads_98_percent_of_the_held_out_digits():
    events = run(Recipe(batch_size=64, epochs=20, schedule="cosine", augment="shift"))
    assert [event.accuracy for event in events if isinstance(event, Evaluated)][-1] >= 0.98


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]
