"""Pictures of runs: pure `draw(ax, data)` functions, the same for live, recorded and tested plots.

The curves can be drawn again on the same axes with more data: a line that is there already only gets new points.
"""

import numpy as np

from cnnlab.measure.compare import speedup
from cnnlab.plots.style import (
    CLEAR,
    COLORS,
    PREDICTED,
    RECORDED,
    REJECTED,
    _plain,
    machine_label,
)


def speedup_bars(ax, measurements, prediction=None, caveat=None):
    """Images/s of each `Measurement` with its quartiles, and its `Speedup` over the first. `prediction`: of the last's.

    `caveat`: what else differs, as `compare.confounders` says; it is written on the plot.
    """
    names = list(measurements)
    quartiles = [measurements[name].quartiles for name in names]
    medians = [median for _, median, _ in quartiles]
    errors = [
        [median - q1 for q1, median, _ in quartiles],
        [q3 - median for _, median, q3 in quartiles],
    ]
    ax.barh(
        names,
        medians,
        xerr=errors,
        color=[COLORS[i % len(COLORS)] for i in range(len(names))],
        capsize=3,
        height=0.6,
    )
    gains = [speedup(measurements[names[0]], measurements[name]) for name in names]
    for row, (gain, (_, median, q3)) in enumerate(zip(gains, quartiles)):
        said = (
            f"  ({gain.value:.2f}x"
            + ("" if gain.significant else ": no significant difference")
            + ")"
        )
        ax.annotate(
            f"{median:,.0f}" + (said if row else ""),
            (q3, row),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox=CLEAR,
        )
    if prediction:
        x, last = prediction * medians[0], len(names) - 1
        ax.plot([x, x], [last - 0.4, last + 0.4], color=PREDICTED, linestyle=":", linewidth=2)
        ax.annotate(
            "your prediction",
            (x, last - 0.4),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    ax.invert_yaxis()
    ax.set_xlim(
        0,
        max(
            [
                1.7 * max([*medians, *(q3 for _, _, q3 in quartiles)]),
                1.1 * (prediction or 0) * medians[0],
            ]
        ),
    )  # room for what is said
    ax.set_xlabel("images/s: median, quartiles")
    if caveat:
        ax.set_title(
            "not the same work: "
            + ", ".join(f"{name} {values}" for name, values in caveat.items()),
            color=COLORS[1],
            fontsize=9,
        )
    _plain(ax)


def ladder_bars(ax, rungs, prediction=None, recorded=None, running=None):
    """The ladder so far: a bar a rung, speedup over the naive baseline with its 95% confidence interval.

    `rungs`: rungs as JSON has them (`Rung.to_dict`), from the ground up; those that lost are grey. `prediction`:
    of the best rung's speedup. `recorded`: what `cnnlab ladder --json` wrote on another machine, drawn as
    diamonds beside the rungs of the same name. `running`: name of the rung being measured.
    """
    names = [rung["name"] for rung in rungs] + (
        [running] if running and running not in [rung["name"] for rung in rungs] else []
    )
    others = {rung["name"]: rung["speedup"] for rung in recorded["rungs"]} if recorded else {}
    names += [name for name in others if name not in names]
    widest = max(
        [
            2.0,
            *(min(rung["speedup_ci"][1], 1.5 * rung["speedup"]) for rung in rungs),
            *others.values(),
            prediction or 0,
        ]
    )
    for row, rung in enumerate(rungs):
        (low, high), value, kept = rung["speedup_ci"], rung["speedup"], rung["kept"]
        colour = REJECTED if kept is False else COLORS[5] if kept is None else COLORS[0]
        ax.barh(
            row,
            value,
            color=colour,
            height=0.6,
            hatch="//" if kept is False else None,
            edgecolor="white",
        )
        if 0 < low < high < float("inf"):
            ax.errorbar(
                value,
                row,
                xerr=[[value - low], [high - value]],
                color="black",
                capsize=3,
                linewidth=1,
            )
        lost = (
            "  slower: left out"
            if rung["over_below_ci"][1] < 1
            else "  no significant gain: left out"
        )
        ax.annotate(
            f"{value:.2f}x" + {True: "", False: lost, None: "  ..."}[kept],
            (max(value, min(high, widest)), row),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox=CLEAR,
        )
    if others:
        points = [(value, names.index(name)) for name, value in others.items()]
        where = f"recorded: {machine_label(recorded['machine'])}, batch {recorded['recipe']['batch_size']}"
        ax.plot(
            *zip(*points), "D", color=RECORDED, markersize=5, markerfacecolor="none", label=where
        )
    if prediction:
        ax.axvline(
            prediction,
            color=PREDICTED,
            linestyle=":",
            linewidth=2,
            label=f"your prediction: {prediction:g}x",
        )
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(max(len(names), 4) - 0.4, -0.6)
    ax.set_xlim(0, 1.5 * widest)
    ax.set_xlabel("speedup over the naive baseline (bars: 95% confidence)")
    if others or prediction:
        ax.legend(frameon=False, loc="upper right", fontsize=9)
    _plain(ax)


def roofline(ax, peaks, points=None, precision="fp32"):
    """The roofline of Williams, Waterman and Patterson (2009): attainable FLOP/s against FLOP per byte moved.

    `peaks`: as `peaks.peaks` measures them; `points`: {name: (FLOP per byte, FLOP/s)}.
    """
    intensity = np.logspace(-1, 4, 200)
    shown = [name for name in peaks if name != "copy"]
    for number, name in enumerate(shown):
        style = dict(
            color=COLORS[number],
            linewidth=2 if name == precision else 1,
            alpha=1 if name == precision else 0.6,
        )
        roof = np.minimum(peaks["copy"] * intensity, peaks[name]) / 1e9
        ax.loglog(intensity, roof, label=f"{name} peak {peaks[name] / 1e9:,.0f} GFLOP/s", **style)
    labels = []  # (x, y) of each: one that would lie on another moves up
    for number, (name, (x, y)) in enumerate(
        sorted((points or {}).items(), key=lambda item: item[1][1])
    ):
        ax.plot(x, y / 1e9, "o", color=COLORS[(number + 1) % len(COLORS)], markersize=7)
        height = max(
            [
                y / 1e9,
                *(
                    1.45 * below
                    for left, below in labels
                    if 0.3 < x / left < 3 and below < y / 1e9 * 1.45
                ),
            ]
        )
        labels.append((x, height))
        ax.annotate(
            name,
            (x, height),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox=CLEAR,
        )
    ax.set_xlabel("arithmetic intensity (FLOP per byte moved)")
    ax.set_ylabel("GFLOP/s")
    ax.set_title(f"memory: {peaks['copy'] / 1e9:.0f} GB/s copied", fontsize=10)
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    _plain(ax)
