"""Speedup against the number of workers."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cnnlab.measure.compare import Speedup
from cnnlab.measure.scaling import amdahl
from cnnlab.plots.style import COLORS, PREDICTED, REJECTED, Axes, hide_frame


def scaling_curve(
    ax: Axes,
    workers: Sequence[int],
    measured: Sequence[Speedup],
    serial: float | None = None,
    prediction: Mapping[int, float] | None = None,
    law: Callable = amdahl,
    until: int = 2,
) -> None:
    """Draw measured speedups next to the ideal line and the curve of a scaling law.

    `measured` has a `Speedup` for each entry of `workers`. `law` is `amdahl` for strong scaling and
    `gustafson` for weak scaling; its curve is drawn if the `serial` fraction is given. `prediction`
    is the learner's: {workers: speedup}. The lines end at `until` workers, or at the most measured.
    """
    end = max([until, *workers])
    n = np.linspace(1, end, 50)
    ax.plot(n, n, "--", color=REJECTED, label="ideal")
    if serial is not None:
        label = f"{law.__name__.title()}, {100 * serial:.0f}% serial"
        ax.plot(n, law(n, serial), color=COLORS[1], label=label)
    if measured:
        _draw_measured(ax, workers, measured)
    guesses = dict(prediction or {})
    if guesses:
        x, y = list(guesses), list(guesses.values())
        ax.plot(x, y, "x", color=PREDICTED, markersize=9, label="your prediction")
    values = [speedup.value for speedup in measured]
    ax.set_ylim(0, 1.1 * max([end, *values, *guesses.values()]))
    ax.set_xticks(sorted({1, *workers}))
    ax.set_xlabel("workers")
    ax.set_ylabel(f"speedup over {measured[0].baseline}" if measured else "speedup")
    ax.legend(fontsize=9, loc="upper left", framealpha=0.9, edgecolor="none")
    hide_frame(ax)


def _draw_measured(ax: Axes, workers: Sequence[int], measured: Sequence[Speedup]) -> None:
    values = np.array([speedup.value for speedup in measured])
    low = np.array([speedup.low for speedup in measured])
    high = np.array([speedup.high for speedup in measured])
    known = np.isfinite(high)  # a single run has no confidence interval
    below = np.where(known, values - low, 0.0)
    above = np.where(known, np.minimum(high - values, values), 0.0)
    label = "measured (95% CI)" if known.any() else "measured"
    errors = [below, above]
    ax.errorbar(workers, values, errors, fmt="o", color=COLORS[0], capsize=3, label=label)
