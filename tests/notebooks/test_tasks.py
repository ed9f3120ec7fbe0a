"""The tasks of the lessons: a solution passes, a stub does not, and typical mistakes are explained.

All files notebooks/solutions/*.py are tested.
"""

import ast
import builtins
import inspect
import re
import runpy
import textwrap
from pathlib import Path

import nbformat
import pytest
import torch.distributed as dist

from cnnlab import check

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
FILES = sorted((NOTEBOOKS / "solutions").glob("*.py"))
TASKS = {
    task_id: task for path in FILES for task_id, task in runpy.run_path(str(path))["TASKS"].items()
}
MISTAKES = [
    pytest.param(task_id, mistake, id=f"{task_id}-{mistake.__name__}")
    for task_id, task in TASKS.items()
    for mistake in task.mistakes
]

each_task = pytest.mark.parametrize("task_id", TASKS)


def stub(outcome):
    """A function that is not written yet. Ranks get local functions by value."""

    def unwritten(*_):
        if outcome is NotImplementedError:
            raise NotImplementedError
        return outcome

    return unwritten


def without_spaces(text):
    return re.sub(r"\s", "", text)


def lines_of_code(function):
    """The statements of a function without its docstring, and without any spaces."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    statements = tree.body[1:] if ast.get_docstring(tree) else tree.body
    lines = [line for statement in statements for line in ast.unparse(statement).splitlines()]
    return [without_spaces(line) for line in lines]


def names_defined_by(code):
    """The names that the code imports, assigns or defines anywhere, arguments too."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_there_are_tasks():
    assert [path.stem for path in FILES] and len(TASKS) >= 6 * len(FILES)


@each_task
def test_the_reference_solves_the_task(task_id, capsys):
    reference = TASKS[task_id].reference
    assert check.build(task_id, reference) is reference, capsys.readouterr().out
    output = capsys.readouterr().out
    assert f"Task {task_id}: solved." in output
    assert "expected" in output and "got" in output


@pytest.mark.parametrize("outcome", [None, ..., NotImplementedError])
@each_task
def test_a_stub_is_not_written_yet_and_the_lesson_continues(task_id, outcome, capsys):
    solution = check.build(task_id, stub(outcome))
    assert solution.__code__ == TASKS[task_id].reference.__code__
    output = capsys.readouterr().out
    assert f"{solution.__name__} is not written yet." in output
    assert f'check.hint("{task_id}")' in output and f'check.solution("{task_id}")' in output


@pytest.mark.parametrize("task_id, mistake", MISTAKES)
def test_a_typical_mistake_is_explained_and_the_lesson_continues(task_id, mistake, capsys):
    solution = check.build(task_id, mistake)
    assert solution.__code__ == TASKS[task_id].reference.__code__
    output = capsys.readouterr().out
    assert f"Task {task_id}: not yet." in output
    message = TASKS[task_id].mistakes[mistake]
    assert message in output
    assert message != check.TIMEOUT or re.search(r"in line \d+ of your cell: \w+\.recv", output)


def test_an_error_in_a_rank_is_shown_with_the_rank_and_the_line_and_no_traceback(capsys):
    def row_parallel(inputs, weight, bias):
        return inputs[dist.get_rank() + 3]

    check.build("14.3", row_parallel)  # 4 rows
    output = capsys.readouterr().out
    assert "rank 1: IndexError: index 4 is out of bounds" in output
    assert re.search(r"in line \d+ of your cell: return inputs\[dist.get_rank", output)
    assert "Traceback" not in output and "worker.py" not in output


@each_task
def test_a_task_has_a_docstring_hints_and_mistakes(task_id):
    task = TASKS[task_id]
    assert task.reference.__doc__ and task.hints and task.mistakes
    messages = list(task.mistakes.values())
    assert len(set(messages)) == len(messages), "two mistakes have the same message"


@each_task
def test_solutions_are_short(task_id):
    assert 1 <= len(lines_of_code(TASKS[task_id].reference)) <= 20


@each_task
def test_hints_and_messages_do_not_contain_the_solution(task_id):
    task = TASKS[task_id]
    texts = [without_spaces(text) for text in [*task.hints, *task.mistakes.values()]]
    for line in lines_of_code(task.reference):
        if len(line) > 20:
            assert not [text for text in texts if line in text]


@each_task
def test_hints_come_one_after_the_other(task_id, capsys):
    hints = TASKS[task_id].hints
    for number, text in enumerate(hints, start=1):
        check.hint(task_id)
        assert f"Hint {number} of {len(hints)}: {text}" in capsys.readouterr().out


@each_task
def test_the_printed_solution_runs_in_the_lesson(task_id, capsys):
    """Its imports, constants and function need only what the lesson's cells define."""
    check.solution(task_id)
    printed = capsys.readouterr().out
    assert f"def {TASKS[task_id].reference.__name__}(" in printed
    (lesson,) = NOTEBOOKS.glob(f"{task_id.partition('.')[0]}_*.ipynb")
    cells = nbformat.read(lesson, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    defined = names_defined_by(code) | names_defined_by(printed)
    loaded = {node.id for node in ast.walk(ast.parse(printed)) if isinstance(node, ast.Name)}
    assert not loaded - defined - set(dir(builtins))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_lesson_uses_the_tasks_and_its_stubs_have_the_same_arguments(path):
    lesson = NOTEBOOKS / f"{path.stem}.ipynb"
    if not lesson.exists():
        pytest.skip("this lesson has no notebook yet")
    cells = nbformat.read(lesson, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    stubs = {node.name: node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
    built = re.findall(r'(\w+) = check\.build\("([\d.]+)", (\w+)\)', code)
    assert sorted(task_id for _, task_id, _ in built) == sorted(runpy.run_path(str(path))["TASKS"])
    for name, task_id, function in built:
        reference = TASKS[task_id].reference
        assert name == function == reference.__name__
        arguments = [argument.arg for argument in stubs[function].args.args]
        assert arguments == list(inspect.signature(reference).parameters)
