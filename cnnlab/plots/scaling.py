"""Speedup against the number of workers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cnnlab.measure.compare import Speedup
from cnnlab.measure.scaling import amdahl
from cnnlab.plots.style import COLORS, PREDICTED, REJECTED, Axes, color_of, hide_frame


def scaling_curve(
    ax: Axes,
    workers: Sequence[int],
    measured: Sequence[Speedup],
    serial: float | None = None,
    prediction: Mapping[int, float] | None = None,
    law: Callable = amdahl,
) -> None:
    """Draw measured speedups next to the ideal line and the curve of a scaling law.

    `measured` has a `Speedup` for each entry of `workers`. `law` is `amdahl` for strong scaling and
    `gustafson` for weak scaling; its curve is drawn if the `serial` fraction is given. `prediction`
    is the learner's: {workers: speedup}.
    """
    n = np.linspace(1, max([2, *workers]), 50)
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
    ax.set_ylim(0, 1.1 * max([2, *workers, *values, *guesses.values()]))
    ax.set_xticks(sorted({1, *workers}))
    ax.set_xlabel("workers")
    ax.set_ylabel(f"speedup over {measured[0].baseline}" if measured else "speedup")
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    hide_frame(ax)


def prediction_curve(
    ax: Axes,
    predictions: Sequence[Mapping[str, Any]],
    published: Mapping[str, Mapping[int, float]] | None = None,
) -> None:
    """Draw where the time of a step goes, by the number of devices; the lowest area is efficiency.

    `predictions`: those of `predict()`. `published`: {label: {devices: measured efficiency}}.
    """
    rows = sorted(predictions, key=lambda row: row["devices"])
    devices = np.array([row["devices"] for row in rows])
    step_s = np.array([row["step_s"] for row in rows])
    efficiency = np.array([row["efficiency"] for row in rows])
    exposed_s = np.array([row["exposed_communication_s"] for row in rows])
    jitter_s = np.array([row["jitter_s"] for row in rows])
    lost = np.array([exposed_s, jitter_s]) / step_s
    parts = 100 * np.array([efficiency, *lost, 1 - efficiency - lost.sum(axis=0)])
    labels = ["useful work", "exposed communication", "waiting for the slowest", "stack efficiency"]
    colors = ["#CDE3F0", COLORS[1], COLORS[4], REJECTED]
    ax.stackplot(devices, parts, labels=labels, colors=colors)
    ax.plot(devices, parts[0], color=COLORS[0], marker="o" if len(rows) < 30 else "", clip_on=False)
    for number, (label, points) in enumerate((published or {}).items()):
        percent = [100 * value for value in points.values()]
        color = color_of(number + 2)
        ax.plot(list(points), percent, "D", label=label, color=color, mec="white", clip_on=False)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    if len(rows) < 8:
        ax.set_xticks(devices)
    ax.minorticks_off()
    ax.set_xlim(devices[0], max(2 * devices[0], devices[-1]))
    ax.set_ylim(0, 105)
    ax.set_xlabel("devices")
    ax.set_ylabel("efficiency (% of a step)")
    ax.legend(fontsize=9, loc="lower left", framealpha=0.9, edgecolor="none")
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
