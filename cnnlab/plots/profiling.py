"""A profile as a timeline: what ran in each thread and on each GPU stream, and the gaps."""

from math import ceil
from typing import TYPE_CHECKING

from cnnlab.plots.style import COLORS, PHASES, REJECTED, Axes, legend_above_bars

if TYPE_CHECKING:
    from cnnlab.measure.profile import Profile

CATEGORIES = {  # of spans: (color, label)
    "arithmetic": (COLORS[0], "convolutions, matrix products"),
    "memory": (COLORS[5], "other operations"),
    "optimizer": (COLORS[2], "optimizer"),
    "loader": (PHASES["waiting"], "loader"),
    "copies": (COLORS[3], "copies to and from the GPU"),
    "communication": (PHASES["communication"], "communication"),
    "synchronize": (REJECTED, "waiting for the GPU"),
    "label": ("#E5E5E5", "_"),  # of record_function
}
DARK = ("arithmetic", "optimizer", "communication")  # colors for white text
FONT_SIZE = 7.5
LETTER = 0.68 * FONT_SIZE  # its width in points
HEIGHT = 0.8  # of a box; the distance of two rows is 1
COLUMNS = 4  # of the legend


def profile_timeline(
    ax: Axes, profile: "Profile", window: tuple[float, float] | None = None
) -> None:
    """Draw the last steps of a profile: a row for each lane, a box for each operation.

    White gaps are time without an operation. `window`: the milliseconds (from, to) to show.
    """
    lanes = profile.lanes
    ends = [1000 * span.end for spans in lanes.values() for span in spans]
    left, right = window or (0.0, max(ends, default=1.0))
    for category, (color, label) in CATEGORIES.items():
        for row, spans in enumerate(lanes.values()):
            bars = [
                (1000 * span.start, 1000 * (span.end - span.start))
                for span in spans
                if span.category == category
            ]
            if bars:
                place = (row - HEIGHT / 2, HEIGHT)
                ax.broken_barh(
                    bars, place, facecolor=color, edgecolor="white", linewidth=0.3, label=label
                )
                label = "_"  # one entry in the legend
    ax.set(xlim=(left, right), xlabel="milliseconds, latest steps")
    legend_pt = 13 * ceil(len(ax.get_legend_handles_labels()[0]) / COLUMNS)
    rows = max(len(lanes), 2)
    rest_pt = max(1.0, _size_pt(ax)[1] - legend_pt)
    room = rows * legend_pt / rest_pt  # above the first row, for the legend
    ax.set_ylim(rows - 0.5, -0.5 - room)
    ax.set_yticks(range(len(lanes)), list(lanes))
    ax.spines[["top", "right"]].set_visible(False)
    _write_names(ax, lanes, left, right)
    if ax.collections:
        legend_above_bars(ax, COLUMNS)


def _write_names(ax, lanes, left, right):
    """Write the name of each operation into its box where it fits, across or upward."""
    width, height = _size_pt(ax)
    across = width / (right - left) / LETTER  # letters per millisecond
    bottom, top = ax.get_ylim()
    upward = int(HEIGHT * height / (bottom - top) / LETTER)
    for row, spans in enumerate(lanes.values()):
        until = 0.0
        for span in spans:
            overlaps = span.start < until
            until = max(until, span.end)
            start, end = max(left, 1000 * span.start), min(right, 1000 * span.end)
            letters = int((end - start) * across)
            rotation = 0 if letters > min(len(span.name), upward) else 90
            room = upward if rotation else letters
            if overlaps or letters < 3 or min(len(span.name), room) < 4:
                continue
            ax.text(
                (start + end) / 2,
                row,
                _shorten(span.name, upward if rotation else letters - 1),
                rotation=rotation,
                fontsize=FONT_SIZE,
                ha="center",
                va="center",
                color="white" if span.category in DARK else "black",
            )


def _size_pt(ax):
    """Width and height of the axes in points."""
    frame = ax.get_position()
    return 72 * frame.size * ax.figure.get_size_inches()


def _shorten(name, letters):
    return name if len(name) <= letters else name[: letters - 1] + "…"
