"""Throughput by batch size, next to that of other machines."""

from collections.abc import Mapping, Sequence

import numpy as np

from cnnlab.plots.style import COLORS, PREDICTED, Axes, color_of, hide_frame

Rates = Mapping[int, Sequence[float]]  # images/s of each repeat, by batch size


def batch_size_curve(
    ax: Axes,
    measured: Rates,
    others: Mapping[str, Mapping[int, float]] | None = None,
    predicted: tuple[int, float] | None = None,
) -> None:
    """Draw the median images/s by batch size, with quartiles.

    `others`: {label: {batch size: images/s}} of other machines. `predicted`: the learner's
    (batch size, images/s).
    """
    sizes = sorted(measured)
    q1, median, q3 = np.transpose([np.percentile(measured[size], (25, 50, 75)) for size in sizes])
    error = [median - q1, q3 - median]
    ax.errorbar(sizes, median, error, fmt="o-", color=COLORS[0], capsize=3, label="measured here")
    for number, (label, points) in enumerate((others or {}).items(), start=1):
        rates = list(points.values())
        ax.plot(list(points), rates, "D--", color=color_of(number), markersize=5, label=label)
    if predicted is not None:
        size, rate = predicted
        ax.plot(size, rate, "x", color=PREDICTED, markersize=10, mew=2, label="your prediction")
    ax.set(xscale="log", yscale="log", xlabel="images per batch", ylabel="images/s")
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    lowest, highest = np.log10(ax.get_ylim())
    ax.set_ylim(10 ** np.floor(lowest), 10 ** np.ceil(highest))  # whole decades: at least two ticks
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.legend(fontsize=8, frameon=False)
    hide_frame(ax)
