"""Tasks accept right functions, reject wrong ones, and print what differs."""

import linecache

import numpy as np
import pytest
import torch

from cnnlab import check
from cnnlab.recipe import CnnlabError
from cnnlab.values import difference, format_value

TASK_FILE = """
import numpy as np
import torch

from cnnlab.check import Task


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


def second_item(x):
    return [2 * x][1]


def clear(items):
    items[:] = [0, 0]


def table(n):
    return {"even": list(range(0, n, 2)), "total": n / 3}


def draw(n):
    return torch.rand(n) + torch.rand(n)


def of_array(x):
    return x * np.array([1.0, np.nan])


TASKS = {
    "98.1": Task(
        reference=double,
        inputs=lambda: [(torch.rand(2, 3),), (torch.rand(4),)],
        hints=["first hint", "second hint"],
        mistakes={triple: "you have tripled it", second_item: "this list has one item"},
    ),
    "98.2": Task(reference=clear, inputs=lambda: [([1, 2],)], hints=["h"], mistakes={}),
    "98.3": Task(reference=table, inputs=lambda: [(5,)], hints=["h"], mistakes={}),
    "98.4": Task(reference=draw, inputs=lambda: [(3,)], hints=["h"], mistakes={}),
    "98.5": Task(reference=of_array, inputs=lambda: [(np.ones(2),)], hints=["h"], mistakes={}),
}
"""


@pytest.mark.parametrize(
    "expected, got",
    [
        (5, 5),
        (5, 5.0),
        (0.5, 0.5),
        (0.5, 0.50001),
        (1e6, 1.0001e6),
        (2.0, 2),
        (2.0, torch.tensor(2.0)),
        ("bf16", "bf16"),
        (True, True),
        ((1, 2), (1, 2)),
        (torch.ones(2), torch.ones(2)),
        (torch.ones(2), torch.ones(2) + 1e-5),
        (np.float64(0.5), 0.5),
        (0.5, np.float32(0.5)),
        (float("inf"), float("inf")),
        (np.array([1.0, np.inf]), np.array([1.0, np.inf])),
        ([1, {"a": 0.5}], (1, {"a": 0.50001})),
    ],
    ids=repr,
)
def test_equal_values_have_no_difference(expected, got):
    assert difference(expected, got, 1e-3, 1e-4) == []


@pytest.mark.parametrize(
    "expected, got",
    [
        (5, 6),
        (0.5, 0.51),
        (0.0003, 0.0),
        (0.5, None),
        (0.5, ...),
        (5, ...),
        (0.5, "half"),
        (0.5, float("nan")),
        ("bf16", "fp16"),
        (torch.ones(2), torch.zeros(2)),
        (torch.ones(2), torch.ones(2, 1)),
        (torch.ones(2), [1, 1]),
        (torch.ones(2), None),
        (True, None),
        ((1, 2), (1, 3)),
        (torch.tensor([10_000]), torch.tensor([10_001])),
        (np.array([1.0, np.inf]), np.array([np.inf, 1.0])),
        (np.array([1.0, np.nan]), np.array([1.0, 2.0])),
        ({"a": 1}, {"b": 1}),
    ],
    ids=repr,
)
def test_different_values_are_printed(expected, got):
    want, have, _ = difference(expected, got, 1e-3, 1e-4)
    assert "expected " in want and "got      " in have


def test_a_missing_value_is_named():
    assert format_value(...) == "nothing yet (...)"


def test_tensors_are_printed_by_shape():
    assert "(2, 3)" in format_value(torch.zeros(2, 3))


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """The working folder is a folder of notebooks, with a file of tasks in `solutions`."""
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "98_a_lesson.py").write_text(TASK_FILE)
    monkeypatch.chdir(tmp_path)
    check._hints_printed.clear()


@pytest.fixture
def build(lesson, capsys):
    """build(task_id, function) -> (whether the function was right, what was printed)."""

    def build(task_id, function):
        returned = check.build(task_id, function)
        output = capsys.readouterr().out
        solved = returned is function
        assert solved == (f"Task {task_id}: solved." in output)
        assert solved or f"Task {task_id}: not yet." in output
        assert "Traceback" not in output and "check.py" not in output
        return solved, output

    return build


def cell(source, name):
    """The function `name` of a notebook cell, with its source where IPython keeps it."""
    file = "/kernel/cell.py"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    variables = {}
    exec(compile(source, file, "exec"), variables)
    return variables[name]


def test_a_right_function_is_returned_and_its_result_printed(build):
    solved, output = build("98.1", lambda x: x + x)
    assert solved
    assert "double for x: tensor (4,) float32 [" in output
    assert "result: expected tensor (4,) float32" in output and "result: got      tensor" in output


@pytest.mark.parametrize(
    "wrong, phrase",
    [
        (lambda x: x + x.sum(), "numbers are wrong, the largest error is"),
        (lambda x: x, "all numbers are 0.5 times the expected ones"),
        (lambda x: 2 * x.T, "the shape is (3, 2) instead of (2, 3)"),
        (lambda x: 2 * x.double(), "the dtype is torch.float64 instead of torch.float32"),
        (lambda x: x * torch.nan, "6 of 6 numbers are NaN"),
        (lambda x: 2 * x.numpy(), "this must be a tensor, not a ndarray"),
        (lambda x: "four", "this must be a tensor, not a str"),
        (lambda x: [x, x], "this must be a tensor, not a list"),
        (lambda x: 2 * x.mul_(1.5), "all numbers are 1.5 times the expected ones"),
        (lambda x: x.add_(1).sub_(1) * 2 + x.zero_(), "x afterwards: expected tensor"),
        (lambda x: 3 * x, "you have tripled it"),
        (lambda x: x.item() / 0, "RuntimeError: a Tensor with 6 elements cannot be converted"),
        (lambda x, y: x, "missing 1 required positional argument: 'y'"),
        (..., "'ellipsis' object is not callable"),
    ],
)
def test_a_wrong_function_is_explained_and_replaced_by_the_reference(wrong, phrase, build):
    solved, output = build("98.1", wrong)
    assert not solved
    assert phrase in output


@pytest.mark.parametrize("stub", [lambda x: None, lambda x: ...])
def test_a_missing_function_is_not_written_yet(stub, build):
    solved, output = build("98.1", stub)
    assert not solved
    assert "double is not written yet." in output
    assert 'check.hint("98.1")' in output and 'check.solution("98.1")' in output


def test_the_returned_reference_works_and_does_not_count_as_the_learners(build):
    reference = check.build("98.1", lambda x: x)
    assert reference(2) == 4
    solved, output = build("98.1", reference)
    assert not solved and "This double is the solution." in output


def test_an_error_is_shown_with_the_line_of_the_cell_and_no_traceback(build):
    source = "def double(x):\n    y = x + x\n    return half(y)\n\n"
    source += "def half(y):\n    return y / len(5)\n"
    solved, output = build("98.1", cell(source, "double"))
    assert not solved
    assert "TypeError: object of type 'int' has no len()" in output
    assert "in line 6 of your cell: return y / len(5)" in output


def test_an_error_is_explained_if_it_is_that_of_a_typical_mistake(build):
    message = "this list has one item"
    assert message in build("98.1", lambda x: [2 * x][1])[1]
    assert message not in build("98.1", lambda x: x[7])[1]


def test_a_function_that_changes_its_argument_is_compared_by_it(build):
    def fill(items):
        for index in range(len(items)):
            items[index] = 0

    assert build("98.2", fill)[0]
    solved, output = build("98.2", lambda items: items.append(0))
    assert not solved and "items afterwards: expected [0, 0]" in output
    solved, output = build("98.2", lambda items: None)
    assert not solved and "clear is not written yet." in output


@pytest.mark.parametrize(
    "wrong, phrase",
    [
        (lambda n: {"even": [0, 2], "total": n / 3}, "even: expected [0, 2, 4]"),
        (lambda n: {"even": [0, 2, 5], "total": n / 3}, "even: item 2: expected 4"),
        (lambda n: {"even": [0, 2, 4], "total": n}, "total: expected 1.66667"),
        (lambda n: {"even": [0, 2, 4]}, "result: got      even: [0, 2, 4]"),
        (lambda n: {"even": [0, 2, 4], "total": None}, "total: expected 1.66667"),
    ],
)
def test_the_wrong_part_of_a_result_is_named(wrong, phrase, build):
    assert build("98.3", lambda n: {"total": torch.tensor(n / 3), "even": (0, 2, 4)})[0]
    solved, output = build("98.3", wrong)
    assert not solved and phrase in output


def test_random_numbers_are_the_same_for_both_and_the_state_is_restored(build):
    state = torch.get_rng_state()
    assert build("98.4", lambda n: torch.rand(n) + torch.rand(n))[0]
    assert not build("98.4", lambda n: torch.rand(n) + 0.5)[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_expected_nan_is_accepted(build):
    assert build("98.5", lambda x: np.array([1.0, np.nan]))[0]
    assert not build("98.5", lambda x: np.array([1.0, 0.0]))[0]


def test_hints_are_printed_one_after_the_other(lesson, capsys):
    for phrase in ["Hint 1 of 2: first hint", "Hint 2 of 2: second hint", "Hint 2 of 2"]:
        check.hint("98.1")
        assert phrase in capsys.readouterr().out


def test_the_solution_is_printed(lesson, capsys):
    check.solution("98.1")
    assert capsys.readouterr().out == "def double(x):\n    return 2 * x\n\n"


def test_tasks_are_found_from_a_folder_below_and_from_any_other_folder(
    lesson, tmp_path, monkeypatch, capsys
):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    check.solution("98.1")  # of the folder above
    check.solution("14.1")  # of the repository
    assert "def double(" in capsys.readouterr().out


def test_unknown_tasks_are_rejected(lesson):
    with pytest.raises(CnnlabError, match="no task '98.9'. Choose from 98.1, 98.2"):
        check.build("98.9", lambda x: x)
    with pytest.raises(CnnlabError, match="no task '97.1'.*Keep the folder"):
        check.hint("97.1")
