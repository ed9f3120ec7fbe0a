"""How speedup ought to grow with the number of workers: the laws that measured points are held against."""

import numpy as np

from cnnlab.recipe import CnnlabError


def amdahl(workers, serial):
    """Speedup of a fixed amount of work of which the share `serial` (0 to 1) cannot be split over the workers.

    S(n) = 1 / (serial + (1 - serial) / n): G. M. Amdahl, "Validity of the single processor approach" (1967).
    """
    _check_fraction(serial)
    return 1 / (serial + (1 - serial) / np.asarray(workers, float))


def gustafson(workers, serial):
    """Speedup when the work grows with the workers and the share `serial` (0 to 1) of the parallel run is not split.

    S(n) = serial + (1 - serial) n: J. L. Gustafson, "Reevaluating Amdahl's law" (1988).
    """
    _check_fraction(serial)
    return serial + (1 - serial) * np.asarray(workers, float)


def fit_serial_fraction(workers, speedups, law=amdahl):
    """The serial share, 0 to 1, for which the law, `amdahl` or `gustafson`, comes nearest to measured speedups.

    Least squares where the law is a straight line: 1/S - 1/n = serial (1 - 1/n), and n - S = serial (n - 1). Needs a point with
    more than one worker.
    """
    n, s = np.asarray(workers, float), np.asarray(speedups, float)
    if not (n > 1).any():
        raise CnnlabError(
            f"workers={list(workers)} has no point with more than one worker: measure 2 or more as well."
        )
    x, y = (1 - 1 / n, 1 / s - 1 / n) if law is amdahl else (n - 1, n - s)
    return float(np.clip((x @ y) / (x @ x), 0, 1))


def _check_fraction(serial):
    if not 0 <= serial <= 1:
        raise CnnlabError(f"serial={serial!r} is not allowed: it is a share, from 0 to 1.")
