"""Colors, labels and axis limits that all plots share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cnnlab.events import Event, Started

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any  # importing the plots must not import matplotlib

# The palette of Okabe and Ito, which color-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REJECTED = "#BBBBBB"
RECORDED = "#888888"
PREDICTED = "#000000"

PHASES = {
    "waiting": "#E69F00",
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "update": "#009E73",
    "communication": "#D55E00",
    "exposed": "#D55E00",
}

X_LABELS = {"images": "training images seen", "seconds": "seconds of training"}

Runs = Mapping[str, Sequence[Event]]  # the events so far of each run, by its label


def machine_label(machine: Mapping[str, Any]) -> str:
    """A machine, as in JSON, in a few words: processor, cores, GPUs."""
    cores, physical = f"{machine['cores']} cores", machine.get("physical_cores")
    if physical and physical < machine["cores"]:
        cores = f"{physical} cores ({machine['cores']} logical)"
    return ", ".join([machine["name"], cores, *machine["gpus"]])


def color_of(number: int) -> str:
    """The color of the run or bar with this number; colors repeat after six."""
    return COLORS[number % len(COLORS)]


def round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 5, 7, 10 times a power of ten: axis limits that rarely change."""
    power = 10.0 ** np.floor(np.log10(max(value, 1e-9)))
    steps = [step * power for step in (1, 1.5, 2, 3, 5, 7, 10)]
    return next(step for step in steps if step >= value * (1 - 1e-9))


def running_mean(values: Sequence[float] | np.ndarray, window: int = 10) -> np.ndarray:
    """Mean of each value and up to `window - 1` values before it."""
    if len(values) == 0:
        return np.zeros(0)
    # A cumulative sum would carry one infinite or NaN loss on to all later means.
    sums = np.convolve(values, np.ones(window))[: len(values)]
    return sums / np.minimum(np.arange(1, len(values) + 1), window)


def finish_curves(
    ax: Axes, runs: Runs, title: str, by: str, place: Literal["upper right", "lower right"]
) -> None:
    """Add title, x axis and legend to curves of `runs`. In images, x ends where the runs will."""
    if by == "seconds":
        curves = [np.asarray(line.get_xdata(), float) for line in ax.lines]
        right = round_up(max((float(x[-1]) for x in curves if len(x)), default=1.0))
    else:
        starts = [e for events in runs.values() for e in events if isinstance(e, Started)]
        right = max((start.steps * start.recipe.batch_size for start in starts), default=1)
    ax.set_xlim(0, right)
    ax.set_xlabel(X_LABELS[by])
    ax.locator_params(nbins=5)
    ax.set_title(title, fontsize=10, loc="left", y=1.0)
    if len(runs) > 1:
        ax.legend(fontsize=8, loc=place, framealpha=0.7, edgecolor="none")
    hide_frame(ax)


def hide_frame(ax: Axes) -> None:
    """Leave out the upper and right spines, and add a faint grid behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)


def label_at(ax: Axes, text: str, x: float, y: float, offset: int = 8) -> None:
    """Write `text` `offset` points to the right of (x, y), readable where it covers a line."""
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    shift = (offset, 0)
    ax.annotate(text, (x, y), shift, "data", "offset points", va="center", fontsize=9, bbox=white)


def legend_above_bars(ax: Axes, columns: int) -> None:
    """Add a compact legend in the room that a horizontal bar plot leaves at its top."""
    compact: Any = {
        "columnspacing": 0.7,
        "handlelength": 0.7,
        "handletextpad": 0.3,
        "borderaxespad": 0,
    }
    legend = ax.legend(frameon=False, fontsize=7.5, ncols=columns, loc="upper left", **compact)
    for line in legend.get_lines():
        line.set_linewidth(6)
