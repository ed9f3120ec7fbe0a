"""The lessons as files: their structure, their cells, and their links. (nbval executes them.)"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from cnnlab import Recipe, run
from cnnlab.events import Evaluated

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))
# Lessons with tasks, whose key functions the learner writes, and the other ones.
TASK_LESSONS = [path for path in LESSONS if (NOTEBOOKS / "solutions" / f"{path.stem}.py").exists()]
EXERCISE_LESSONS = [path for path in LESSONS[1:] if path not in TASK_LESSONS]
SECTIONS = ["Predict", "By hand", "Measure", "Packaged", "Why", "Exercise"]
TASK_SECTIONS = ["Predict", "Build", "Measure", "Packaged", "Why", "Exercises"]
MAX_CELLS = 50
MAX_LINES = 15
MAX_COLUMNS = 100
MIN_TASKS = 6


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
    sections = TASK_SECTIONS if path in TASK_LESSONS else SECTIONS
    headings = re.findall(r"^## (.*)", text(path, "markdown"), re.M)
    found = [section for heading in headings for section in sections if heading.startswith(section)]
    assert found == sections


@pytest.mark.parametrize("path", TASK_LESSONS, ids=notebook_id)
def test_a_lesson_with_tasks_has_few_and_short_cells(path):
    code = [cell.source.splitlines() for cell in cells(path, "code")]
    assert len(code) + len(cells(path, "markdown")) <= MAX_CELLS
    for lines in code:
        assert len([line for line in lines if line.strip()]) <= MAX_LINES, lines[0]
        assert max(map(len, lines)) <= MAX_COLUMNS, lines[0]


@pytest.mark.parametrize("path", TASK_LESSONS, ids=notebook_id)
def test_a_lesson_with_tasks_says_at_the_start_what_it_brings_and_what_it_needs(path):
    start = cells(path, "markdown")[0].source
    assert len(re.findall(r"^- ", start, re.M)) == 3
    for word in ("Time", "You need", "Hardware"):
        assert f"**{word}" in start


@pytest.mark.parametrize("path", TASK_LESSONS, ids=notebook_id)
def test_each_stub_is_checked_in_its_cell_and_its_task_is_announced(path):
    tasks = []
    for cell in cells(path, "code"):
        checked = re.findall(r'(\w+) = check\.build\("([\d.]+)", \1\)', cell.source)
        stubs = re.findall(r"^def (\w+).*\n(?:^ .*\n|\n)*^    \.\.\.", cell.source, re.M)
        assert set(stubs) <= {name for name, _ in checked}
        tasks += [task_id for _, task_id in checked]
    announced = re.findall(r"\*\*Task (\d+\.\d+)", text(path, "markdown"))
    assert announced == tasks
    assert len(tasks) >= (MIN_TASKS if path != LESSONS[0] else 1)


@pytest.mark.parametrize("path", TASK_LESSONS, ids=notebook_id)
def test_a_lesson_with_tasks_has_pictures_with_a_description(path):
    pictures = re.findall(r"!\[(.*?)\]\((.+?)\)", text(path, "markdown"))
    assert pictures
    for description, file in pictures:
        assert len(description) > 50 and (NOTEBOOKS / file).exists()


@pytest.mark.parametrize("path", TASK_LESSONS, ids=notebook_id)
def test_a_lesson_with_tasks_ends_with_a_picture_and_links_to_its_neighbors(path):
    assert "plt.show()" in cells(path, "code")[-1].source
    names = [lesson.name for lesson in LESSONS]
    number = names.index(path.name)
    last = nbformat.read(path, as_version=4).cells[-1].source
    for label, neighbor in (("Before", number - 1), ("Next", number + 1)):
        if neighbor in range(len(names)):
            assert re.search(rf"\*\*{label}:\*\* \[[^\]]+\]\({names[neighbor]}\)", last)


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=notebook_id)
def test_notebooks_are_stored_without_outputs(path):
    assert not any(cell.outputs or cell.execution_count for cell in cells(path, "code"))


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=notebook_id)
def test_notebooks_use_no_star_imports_and_no_magics(path):
    assert not re.search(r"import \*|^%|^!", text(path, "code"), re.M)


@pytest.mark.parametrize("path", EXERCISE_LESSONS, ids=notebook_id)
def test_by_hand_cells_are_short(path):
    plotting = re.compile(r"\bax(es)?\b")  # plots may take more lines
    sources = [source for source in by_hand_cells(path) if not plotting.search(source)]
    assert sources
    assert not [source for source in sources if count_lines(source) > MAX_LINES]


@pytest.mark.parametrize("path", EXERCISE_LESSONS, ids=notebook_id)
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


@pytest.mark.parametrize("path", LESSONS, ids=notebook_id)
def test_a_lesson_has_no_relative_paths(path):
    assert not re.findall(r'(?:Path|open)\("[^/"].*', text(path, "code"))


@pytest.mark.parametrize("name", ["07_gpu", "11_whole_program", "15_many_machines"])
def test_a_lesson_finds_its_files_from_another_folder(name, tmp_path):
    """As with papermill, or VS Code's workspace root."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    needed = re.compile(r"^import|NOTEBOOKS|MANY_MACHINES")
    notebook.cells = [
        cell for cell in notebook.cells if cell.cell_type == "code" and needed.search(cell.source)
    ]
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "No such file" not in str(notebook.cells)


def test_the_recipe_of_lesson_02_reaches_98_percent_accuracy():
    events = run(Recipe(batch_size=64, epochs=20, schedule="cosine", augment="shift"))
    assert [event.accuracy for event in events if isinstance(event, Evaluated)][-1] >= 0.98
