"""Pictures of runs: pure `draw(ax, data)` functions, the same for live, recorded and tested plots.

The curves can be drawn again on the same axes with more data: a line that is there already only gets new points.
"""

import numpy as np

REJECTED, RECORDED, PREDICTED = "#BBBBBB", "#888888", "#000000"
COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito: told apart by everyone


BY = {"images": "training images seen", "seconds": "seconds of training"}


PHASES = {
    "waiting": "#E69F00",
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "update": "#009E73",
    "communication": "#D55E00",
    "exposed": "#D55E00",
}


CLEAR = {
    "facecolor": "white",
    "edgecolor": "none",
    "alpha": 0.8,
    "pad": 0.5,
}  # behind text that may lie on a line


def machine_label(machine):
    """A machine, as JSON has it, in a few words: processor, cores, GPUs."""
    return ", ".join([machine["name"], f"{machine['cores']} cores", *machine["gpus"]])


def _recipe(events):
    return next(event.recipe for event in events if hasattr(event, "recipe"))


def _running_mean(values, window=10):
    """Mean over the last `window` values; over fewer at the start."""
    padded = np.concatenate([np.zeros(window - 1), values])
    counts = np.minimum(np.arange(1, len(values) + 1), window)
    return (
        np.lib.stride_tricks.sliding_window_view(padded, window).sum(axis=1) / counts
        if len(values)
        else counts
    )


def _curve(ax, gid, x, y, **style):
    """The line of that id, with new points; made when it is not there yet."""
    line = next((line for line in ax.lines if line.get_gid() == gid), None)
    if line is None:
        (line,) = ax.plot([], [], gid=gid, **style)
    line.set_data(x, y)
    if "label" in style:
        line.set_label(style["label"])


def _frame(ax, title, xlabel, runs):
    """Limits that seldom change, so that a live picture need not be drawn anew: x ends where the longest run will."""
    ends = [last for line in ax.lines if len(line.get_xdata()) for last in [line.get_xdata()[-1]]]
    totals = [
        event.steps * event.recipe.batch_size
        for events in runs.values()
        for event in events
        if hasattr(event, "recipe")
    ]
    ax.set_xlim(
        0, max(totals, default=1) if "images" in xlabel else _round_up(max(ends, default=1))
    )
    if ax.get_xlabel() != xlabel:
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel(xlabel)
        _plain(ax)
    labels = list(runs)
    legend = ax.get_legend()
    if len(labels) > 1 and (
        legend is None or [text.get_text() for text in legend.get_texts()] != labels
    ):
        ax.legend(frameon=False, fontsize=8, loc="best" if "loss" in title else "lower right")


def _fit(ax, width, room):
    """Limits for bars up to `width`, and as much room; they stay while they fit: a live picture is then drawn faster."""
    shown = ax.get_xlim()[1] if ax.get_legend() else 0
    if not width <= shown <= 3 * width:
        ax.set_xlim(0, _round_up(room * width))


def _legend_of_bars(ax, columns):
    """A legend above bars that are thick lines; thinner in it."""
    ax.legend(
        frameon=False,
        fontsize=8,
        ncols=columns,
        loc="upper left",
        columnspacing=0.8,
        handlelength=0.8,
        handletextpad=0.4,
        borderaxespad=0,
    )
    for line in ax.get_legend().get_lines():
        line.set_linewidth(6)


def _round_up(value):
    """The next of 1, 1.5, 2, 3, 5, 7, 10 times a power of ten: limits that stay put while data grow."""
    power = 10.0 ** np.floor(np.log10(max(value, 1e-9)))
    return next(
        step * power for step in (1, 1.5, 2, 3, 5, 7, 10) if step * power >= value * (1 - 1e-9)
    )


def _plain(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
