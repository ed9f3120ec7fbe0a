"""The checkers accept right answers, reject wrong ones, print both, and never raise."""

import pytest
import torch

from cnnlab import check


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
    ],
    ids=repr,
)
def test_a_right_answer_solves_the_exercise(expected, got, capsys):
    assert check.answer("1", expected, got) is True
    assert "Exercise 1: solved." in capsys.readouterr().out


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
    ],
    ids=repr,
)
def test_a_wrong_answer_does_not_solve_the_exercise(expected, got, capsys):
    assert check.answer("1", expected, got) is False
    output = capsys.readouterr().out
    assert "Exercise 1: not yet." in output and "wrong" in output


def test_expected_value_and_answer_are_printed(capsys):
    check.answer("2", 41, 42)
    assert "expected 41, got 42" in capsys.readouterr().out


def test_a_function_is_compared_case_by_case(capsys):
    assert not check.function("3", lambda x: x * x, lambda x: x + x, [(2,), (3,)])
    output = capsys.readouterr().out.splitlines()
    assert output[1].startswith("ok") and "for 2" in output[1]
    assert output[2].startswith("wrong") and "expected 9, got 6" in output[2]


def test_a_function_is_called_with_all_arguments(capsys):
    assert check.function("4", lambda a, b: a - b, lambda a, b: a - b, [(5, 3)])
    assert "for 5, 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer",
    [lambda x: 1 / 0, lambda: 1, lambda x: None, 3],
    ids=["raises", "wrong signature", "returns nothing", "not a function"],
)
def test_a_broken_function_is_a_wrong_answer_and_not_an_error(answer, capsys):
    assert check.function("5", lambda x: x, answer, [(1,)]) is False
    assert "not yet" in capsys.readouterr().out


def test_the_error_of_the_learners_function_is_printed(capsys):
    check.function("6", lambda x: x, lambda x: 1 / 0, [(1,)])
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_a_missing_answer_is_named(capsys):
    check.answer("7", 0.5, ...)
    assert "nothing yet (...)" in capsys.readouterr().out


def test_tensors_are_printed_by_shape(capsys):
    check.answer("8", torch.zeros(2, 3), torch.zeros(3, 2))
    output = capsys.readouterr().out
    assert "(2, 3)" in output and "(3, 2)" in output
