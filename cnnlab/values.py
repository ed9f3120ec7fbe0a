"""Compare and describe values, and choose between those of a full and of a quick run."""

import os
from typing import Any, TypeVar

import numpy as np

LONGEST = 160  # characters of a formatted value
SEQUENCE = (list, tuple)  # A list equals a tuple with the same items.


Value = TypeVar("Value")


def full_or_quick(full: Value, quick: Value) -> Value:
    """`full`; or `quick` if the environment variable CNNLAB_QUICK is set, as in the tests."""
    return quick if os.environ.get("CNNLAB_QUICK") else full


def difference(expected: Any, got: Any, rtol: float, atol: float, where: str = "") -> list[str]:
    """Three lines about the first difference: what was expected, got, and is wrong; or no lines.

    Compares tensors, arrays, numbers and other objects, also in lists and dictionaries. Numbers are
    equal if abs(got - expected) <= atol + rtol * abs(expected), or if both are NaN. Networks are
    compared by their parameters.
    """
    if hasattr(expected, "named_parameters") and type(got) is type(expected):
        expected, got = dict(expected.named_parameters()), dict(got.named_parameters())
    if isinstance(expected, dict) and isinstance(got, dict) and expected.keys() == got.keys():
        parts = [(key, expected[key], got[key]) for key in expected]
    elif isinstance(expected, SEQUENCE) and isinstance(got, SEQUENCE) and len(expected) == len(got):
        parts = [(f"item {n}", expected[n], got[n]) for n in range(len(expected))]
    elif problem := _problem(expected, got, rtol, atol):
        return [
            f"{where}expected {format_value(expected)}",
            f"{where}got      {format_value(got)}",
            problem,
        ]
    else:
        return []
    for name, item, other in parts:
        if lines := difference(item, other, rtol, atol, f"{where}{name}: "):
            return lines
    return []


def format_value(value: Any) -> str:
    """The value in a short line: shape, dtype and first numbers of tensors and arrays."""
    if _is_array(value):
        numbers = [f"{number:.4g}" for number in _numbers(value).flatten()[:4]]
        if _numbers(value).size > 4:
            numbers.append("...")
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{_kind(value)} {tuple(value.shape)} {dtype} [{', '.join(numbers)}]"
    if isinstance(value, dict):
        text = ", ".join(f"{key}: {format_value(item)}" for key, item in value.items())
    elif isinstance(value, SEQUENCE):
        text = f"[{', '.join(map(format_value, value))}]"
    elif isinstance(value, float):
        text = f"{value:.6g}"
    elif value is ...:
        text = "nothing yet (...)"
    else:
        text = repr(value)
        if "\n" in text:  # A network, say.
            text = type(value).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def _problem(expected: Any, got: Any, rtol: float, atol: float) -> str:
    """What is wrong, in one phrase, or nothing."""
    if _is_array(expected):
        return _array_problem(expected, got, rtol, atol)
    try:
        if isinstance(expected, (float, np.floating)):
            right = bool(np.isclose(float(got), expected, rtol, atol, equal_nan=True))
        elif type(expected).__eq__ is object.__eq__:  # It has no meaning of equality.
            right = type(got) is type(expected)
        else:
            right = bool(expected == got)
    except (TypeError, ValueError, RuntimeError):
        right = False
    return "" if right else "these differ"


def _array_problem(expected: Any, got: Any, rtol: float, atol: float) -> str:
    if _kind(got) != _kind(expected):
        return f"this must be a {_kind(expected)}, not a {_kind(got)}"
    if got.shape != expected.shape:
        return f"the shape is {tuple(got.shape)} instead of {tuple(expected.shape)}"
    if got.dtype != expected.dtype:
        return f"the dtype is {got.dtype} instead of {expected.dtype}"
    if "int" in str(expected.dtype):
        rtol = 0
    right, numbers = _numbers(expected), _numbers(got)
    wrong = ~np.isclose(numbers, right, rtol, atol, equal_nan=True)
    if not wrong.any():
        return ""
    if np.isnan(numbers[wrong]).any():
        return f"{np.isnan(numbers).sum()} of {numbers.size} numbers are NaN"
    error = np.abs(numbers[wrong] - right[wrong]).max()
    text = f"{wrong.sum()} of {wrong.size} numbers are wrong, the largest error is {error:.2g}"
    if wrong.size > 1 and np.isfinite(numbers).all():
        factor = (numbers * right).sum() / ((right**2).sum() or 1)
        if factor and np.allclose(numbers, factor * right, rtol, atol):
            text += f": all numbers are {factor:.5g} times the expected ones"
    return text


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def _kind(value: Any) -> str:
    return "tensor" if hasattr(value, "detach") else type(value).__name__


def _numbers(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().double()  # NumPy has no bfloat16.
    return np.asarray(value, dtype=float)
