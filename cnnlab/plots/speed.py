"""Speed of recipes: images/s, the ladder, and the roofline."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnnlab.measure.compare import Measurement, speedup
from cnnlab.plots import style
from cnnlab.plots.style import COLORS, PREDICTED, Axes, color_of, hide_frame, label_at


def speedup_bars(
    ax: Axes,
    measurements: Mapping[str, Measurement],
    prediction: float | None = None,
) -> None:
    """Draw the median images/s of each measurement with quartiles, and its speedup over the first.

    `prediction` is the learner's, of the last speedup.
    """
    baseline = next(iter(measurements.values()))
    for row, measurement in enumerate(measurements.values()):
        q1, median, q3 = measurement.quartiles
        error = [[median - q1], [q3 - median]]
        ax.barh(row, median, xerr=error, color=color_of(row), capsize=3, height=0.6)
        label = f"{median:,.0f}"
        if row > 0:
            gain = speedup(baseline, measurement)
            label += f"  ({gain.value:.2f}x{_note(gain)})"
        label_at(ax, label, q3, row)
    right = 1.8 * max(m.quartiles[2] for m in measurements.values())  # room for the labels
    if prediction:
        last = len(measurements) - 1
        x = prediction * baseline.quartiles[1]
        ax.plot([x, x], [last - 0.4, last + 0.4], color=PREDICTED, linestyle=":", linewidth=2)
        ax.text(x, last - 0.42, "your prediction", ha="center", va="bottom", fontsize=9)
        right = max(right, 1.15 * x)
    ax.set(xlim=(0, right), xlabel="images/s (median, quartiles)")
    ax.set_yticks(range(len(measurements)), list(measurements))
    ax.invert_yaxis()
    hide_frame(ax)


def ladder_bars(
    ax: Axes,
    rungs: Sequence[Mapping[str, Any]],
    prediction: float | None = None,
    recorded: Mapping[str, Any] | None = None,
    running: str | None = None,
) -> None:
    """Draw the speedup of each rung over the naive baseline, with its 95% confidence interval.

    `rungs` are as in JSON (`Rung.to_dict`), the baseline first; rungs that were not kept are gray.
    `prediction` is the learner's, of the best speedup. `recorded` is a ladder of another machine as
    `cnnlab ladder --json` writes it, drawn as diamonds. `running` names the rung being measured.
    """
    others = {rung["name"]: rung["speedup"] for rung in recorded["rungs"]} if recorded else {}
    measured = [rung["name"] for rung in rungs]
    names = [name for name in dict.fromkeys([*measured, running, *others]) if name]
    ends = [min(rung["speedup_ci"][1], 1.5 * rung["speedup"]) for rung in rungs]
    widest = max([2.0, prediction or 0.0, *ends, *others.values()])
    for row, rung in enumerate(rungs):
        _draw_rung(ax, row, rung, widest)
    if recorded and others:
        batch_size = recorded["recipe"]["batch_size"]
        label = f"recorded: {style.machine_label(recorded['machine'])}, batch {batch_size}"
        rows = [names.index(name) for name in others]
        diamond: Any = {"marker": "D", "ms": 5, "mfc": "none", "color": style.RECORDED, "ls": ""}
        ax.plot(list(others.values()), rows, label=label, zorder=4, **diamond)
    if prediction:
        label = f"your prediction: {prediction:g}x"
        ax.axvline(prediction, color=PREDICTED, linestyle=":", linewidth=2, label=label)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(0, 1.5 * widest), ylim=(max(len(names), 4) - 0.4, -0.6))
    ax.set_xlabel("speedup over the naive baseline (95% CI)")
    if others or prediction:
        ax.legend(loc="upper right", fontsize=9, framealpha=0.9, edgecolor="none", borderpad=0.1)
    hide_frame(ax)


def roofline(
    ax: Axes,
    peaks: Mapping[str, float],
    points: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Draw the roofline of Williams, Waterman and Patterson (2009): attainable FLOP/s.

    `peaks` is what `peaks.peaks` measures: FLOP/s of each precision, and bytes/s of "copy".
    `points` is {name: (FLOP per byte, FLOP/s)}.
    """
    intensity = np.logspace(-1, 4, 200)
    for number, name in enumerate(name for name in peaks if name != "copy"):
        roof = np.minimum(peaks["copy"] * intensity, peaks[name]) / 1e9
        label = f"{name} peak {peaks[name] / 1e9:,.0f} GFLOP/s"
        ax.loglog(intensity, roof, color=COLORS[number], linewidth=2, label=label)
    _draw_roofline_points(ax, points or {})
    ax.set(xlabel="arithmetic intensity (FLOP per byte moved)", ylabel="GFLOP/s")
    ax.set_title(f"memory bandwidth: {peaks['copy'] / 1e9:.0f} GB/s copied", fontsize=10)
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    hide_frame(ax)


def _note(gain):
    if gain.significant:
        return ""
    return ": no significant difference" if np.isfinite(gain.high) else ", one run"


def _draw_rung(ax, row, rung, widest):
    low, high = rung["speedup_ci"]
    value = rung["speedup"]
    label = f"{value:.2f}x"
    color, hatch = COLORS[0], None
    if rung["kept"] is None:  # still being measured
        label += "  ..."
        color = COLORS[5]
    elif not rung["kept"]:
        slower = rung["over_below_ci"][1] < 1
        label += "  slower: not kept" if slower else "  no significant gain: not kept"
        color, hatch = style.REJECTED, "//"
    ax.barh(row, value, color=color, height=0.6, hatch=hatch, edgecolor="white")
    if 0 < low < high < float("inf"):
        error = [[value - low], [high - value]]
        ax.errorbar(value, row, xerr=error, color="black", capsize=3, linewidth=1)
    label_at(ax, label, max(value, min(high, widest)), row, offset=6)


def _draw_roofline_points(ax, points):
    """Draw the points from the lowest up, and move a label up that would cover an earlier one."""
    labels: list[tuple[float, float]] = []
    ascending = sorted(points.items(), key=lambda item: item[1][1])
    for number, (name, (x, flops)) in enumerate(ascending, start=1):
        y = flops / 1e9
        ax.plot(x, y, "o", color=color_of(number), markersize=7)
        height = y
        for other_x, other_y in labels:
            if 0.3 < x / other_x < 3 and other_y < 1.45 * y:
                height = max(height, 1.45 * other_y)
        labels.append((x, height))
        label_at(ax, name, x, height)
