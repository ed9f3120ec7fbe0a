"""Exercise checkers: compare a learner's answer with the expected one, and print both."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


def report(exercise: str, cases: Iterable[tuple[str, Any, Any]]) -> bool:
    """Print one line per case and a verdict. Returns whether all cases are correct.

    `cases`: (description, expected value, learner's value).
    """
    lines = []
    solved = True
    for description, expected, got in cases:
        correct = _matches(expected, got)
        solved &= correct
        mark = "ok   " if correct else "wrong"
        lines.append(f"{mark}  {description}: expected {_format(expected)}, got {_format(got)}")
    print(f"Exercise {exercise}: {'solved.' if solved else 'not yet.'}", *lines, sep="\n")
    return solved


def answer(exercise: str, expected: Any, got: Any) -> bool:
    """Check a single number, word, or tensor."""
    return report(exercise, [("your answer", expected, got)])


def function(exercise: str, spec: Callable, got: Callable, inputs: Iterable[tuple]) -> bool:
    """Compare the learner's function with `spec` on the same `inputs` (tuples of arguments)."""
    cases = []
    for arguments in inputs:
        try:
            value = got(*arguments)
        except Exception as error:  # a wrong answer, printed like any other
            value = error
        description = "for " + ", ".join(map(_format, arguments))
        cases.append((description, spec(*arguments), value))
    return report(exercise, cases)


def _matches(expected: Any, got: Any) -> bool:
    if got is None or got is ... or isinstance(got, Exception):
        return False
    try:
        if isinstance(expected, torch.Tensor):
            got = got.to(expected.dtype)
            same_shape = expected.shape == got.shape
            return same_shape and torch.allclose(expected, got, rtol=1e-3, atol=1e-4)
        if isinstance(expected, float):
            return math.isclose(float(got), expected, rel_tol=1e-3, abs_tol=1e-6)
        return bool(expected == got)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False


def _format(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = f"a tensor of shape {tuple(value.shape)}"
        if value.numel() < 5:
            return f"{shape} {[round(number, 4) for number in value.flatten().tolist()]}"
        return f"{shape} with mean {value.float().mean():.4f}"
    if value is ...:
        return "nothing yet (...)"
    if isinstance(value, Exception):
        return f"{type(value).__name__}: {value}"
    return repr(value)
