"""Exercise checkers: each compares the learner's answer with a spec, and prints what was expected and what was got."""

import math

import torch


def report(exercise, cases):
    """Print one line a case and a verdict. `cases`: (what was tried, expected, got); True when all agree."""
    lines, right = [], True
    for tried, expected, got in cases:
        agrees = _agree(expected, got)
        right = right and agrees
        lines.append(
            f"{'ok   ' if agrees else 'wrong'}  {tried}: expected {_short(expected)}, got {_short(got)}"
        )
    print(f"Exercise {exercise}: " + ("solved." if right else "not yet."))
    print("\n".join(lines))
    return right


def answer(exercise, expected, got):
    """Check a number or a word."""
    return report(exercise, [("your answer", expected, got)])


def function(exercise, spec, got, inputs):
    """Call the learner's function and the spec on the same inputs (tuples of arguments), and compare."""
    return report(
        exercise,
        [
            (f"for {', '.join(map(_short, values))}", spec(*values), _call(got, values))
            for values in inputs
        ],
    )


def _call(function, values):
    try:
        return function(*values)
    except Exception as error:  # the learner's code may do anything
        return error


def _agree(expected, got):
    if got is None or got is ... or isinstance(got, Exception):
        return False
    try:
        if isinstance(expected, torch.Tensor):
            return expected.shape == got.shape and torch.allclose(
                expected, got.to(expected.dtype), rtol=1e-3, atol=1e-4
            )
        if isinstance(expected, float):
            return math.isclose(float(got), expected, rel_tol=1e-3, abs_tol=1e-6)
        return bool(expected == got)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False


def _short(value):
    if isinstance(value, torch.Tensor):
        few = [round(number, 4) for number in value.flatten().tolist()[:5]]
        return f"a tensor of shape {tuple(value.shape)}" + (
            f" {few}" if len(few) < 5 else f" with mean {value.float().mean():.4f}"
        )
    if value is ...:
        return "nothing yet (...)"
    return f"{type(value).__name__}: {value}" if isinstance(value, Exception) else repr(value)
