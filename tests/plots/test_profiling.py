"""The timeline of a profile: rows, gaps, and names where they fit."""

import pytest
from helpers import render, texts
from matplotlib.colors import to_hex

from cnnlab import plots
from cnnlab.measure.profile import Profile
from cnnlab.measure.profile_events import Span
from cnnlab.plots.profiling import CATEGORIES


def profile(lanes):
    return Profile(
        title="made up",
        steps=1,
        step_s=0.01,
        idle_s=0.0,
        operations=[],
        lanes=lanes,
        parts={},
        num_operations=0,
        trace_file=None,
    )


LANES = {
    "loader": [Span("next batch", 0.0, 0.002, "loader")],
    "CPU launches": [
        Span("conv2d", 0.0020, 0.0021, "arithmetic"),
        Span("item", 0.0030, 0.0100, "synchronize"),
    ],
    "GPU stream 7": [
        Span("conv2d", 0.0022, 0.0060, "arithmetic"),
        Span("a name that is longer than its box is high", 0.0060, 0.0065, "memory"),
    ],
}


def boxes(ax):
    """(row, left, right, color) of each box, in milliseconds."""
    found = []
    for collection in ax.collections:
        color = to_hex(collection.get_facecolor()[0]).upper()
        for path in collection.get_paths():
            box = path.get_extents()
            found.append((round((box.y0 + box.y1) / 2), box.x0, box.x1, color))
    return sorted(found)


def test_each_lane_is_a_row_and_gaps_stay_white(ax):
    plots.profile_timeline(ax, profile(LANES))
    expected = [
        (0, 0.0, 2.0, "loader"),
        (1, 2.0, 2.1, "arithmetic"),
        (1, 3.0, 10.0, "synchronize"),
        (2, 2.2, 6.0, "arithmetic"),
        (2, 6.0, 6.5, "memory"),
    ]
    for box, (row, left, right, category) in zip(boxes(ax), expected, strict=True):
        assert box[0] == row and box[3] == CATEGORIES[category][0].upper()
        assert box[1:3] == pytest.approx((left, right))
    render(ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(LANES)
    assert "waiting for the GPU" in texts(ax) and "communication" not in texts(ax)


def test_names_are_written_where_they_fit(ax):
    ax.figure.set_size_inches(10, 3)
    plots.profile_timeline(ax, profile(LANES))
    names = [text.get_text() for text in ax.texts]
    assert names[:3] == ["next batch", "item", "conv2d"]  # one of two conv2d is too narrow
    assert len(names) == 4 and names[3].endswith("…")
    renderer = ax.figure.canvas.get_renderer()
    for text in ax.texts[:3]:  # inside of the axes
        assert ax.get_window_extent().contains(*text.get_window_extent(renderer).p0)


def test_a_part_of_the_time_can_be_shown(ax):
    plots.profile_timeline(ax, profile(LANES), window=(2.0, 2.2))
    assert ax.get_xlim() == (2.0, 2.2)
    assert [text.get_text() for text in ax.texts][0] == "conv2d"


def test_an_empty_profile_can_be_drawn(ax):
    plots.profile_timeline(ax, profile({}))
    render(ax)
