"""Where the time of a step goes on a cluster, and how many images it trains."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnnlab.plots.style import COLORS, REJECTED, Axes, color_of, hide_frame


def prediction_curve(
    ax: Axes,
    predictions: Sequence[Mapping[str, Any]],
    published: Mapping[str, Mapping[int, float]] | None = None,
) -> None:
    """Draw where the time of a step goes, by the number of devices; the lowest area is efficiency.

    `predictions`: those of `predict()`. `published`: {label: {devices: measured efficiency}}.
    """
    rows = sorted(predictions, key=lambda row: row["devices"])
    devices = [row["devices"] for row in rows]
    step_s = np.array([row["step_s"] for row in rows])
    areas = {
        "useful work": np.array([row["efficiency"] for row in rows]),
        "exposed communication": [row["exposed_communication_s"] for row in rows] / step_s,
        "waiting for the slowest": [row["jitter_s"] for row in rows] / step_s,
        "waiting for data or stages": [row["idle_s"] for row in rows] / step_s,
    }
    areas["stack efficiency"] = 1 - np.sum(list(areas.values()), axis=0)
    percent = 100 * np.array(list(areas.values()))
    colors = ["#CDE3F0", COLORS[1], COLORS[4], COLORS[3], REJECTED]
    ax.stackplot(devices, percent, labels=list(areas), colors=colors)
    marker = "o" if len(rows) < 30 else ""
    ax.plot(devices, percent[0], color=COLORS[0], marker=marker, clip_on=False)
    for number, (label, points) in enumerate((published or {}).items(), 2):
        y, color = [100 * value for value in points.values()], color_of(number)
        ax.plot(list(points), y, "D", label=label, color=color, mec="white", clip_on=False)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    if len(rows) < 8:
        ax.set_xticks(devices)
    ax.minorticks_off()
    ax.set_xlim(devices[0], max(2 * devices[0], devices[-1]))
    ax.set_ylim(0, 105)
    ax.set_xlabel("devices")
    ax.set_ylabel("efficiency (% of a step)")
    ax.legend(fontsize=9, loc="lower left", reverse=True, framealpha=0.9, edgecolor="none")
    hide_frame(ax)
