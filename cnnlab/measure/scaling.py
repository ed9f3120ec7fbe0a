"""Scaling laws: how speedup should grow with the number of workers."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from cnnlab.recipe import CnnlabError


def amdahl(workers: ArrayLike, serial: float) -> np.ndarray:
    """Speedup of fixed work, of which the fraction `serial` (0 to 1) cannot be parallelized.

    S(n) = 1 / (serial + (1 - serial) / n): G. M. Amdahl, "Validity of the single processor
    approach to achieving large scale computing capabilities" (1967).
    """
    _check_fraction(serial)
    return 1 / (serial + (1 - serial) / np.asarray(workers, float))


def gustafson(workers: ArrayLike, serial: float) -> np.ndarray:
    """Speedup of work that grows with the workers, `serial` (0 to 1) of whose time is not parallel.

    S(n) = serial + (1 - serial) n: J. L. Gustafson, "Reevaluating Amdahl's law" (1988).
    """
    _check_fraction(serial)
    return serial + (1 - serial) * np.asarray(workers, float)


def fit_serial_fraction(
    workers: Sequence[int],
    speedups: Sequence[float],
    law: Callable[[ArrayLike, float], np.ndarray] = amdahl,
) -> float:
    """The serial fraction, 0 to 1, with which `amdahl` or `gustafson` fits measured speedups best.

    Least squares in the form in which the law is linear: 1/S - 1/n = serial (1 - 1/n), and
    n - S = serial (n - 1). Raises `CnnlabError` without a point with more than one worker.
    """
    n, s = np.asarray(workers, float), np.asarray(speedups, float)
    if not (n > 1).any():
        raise CnnlabError(
            f"workers={list(workers)} has no point with more than one worker. "
            "Use measurements with 2 or more workers too."
        )
    if law is amdahl:
        x, y = 1 - 1 / n, 1 / s - 1 / n
    else:
        x, y = n - 1, n - s
    return float(np.clip((x @ y) / (x @ x), 0, 1))


def _check_fraction(serial: float) -> None:
    if not 0 <= serial <= 1:
        raise CnnlabError(f"serial={serial!r} is not allowed. Use a fraction from 0 to 1.")
