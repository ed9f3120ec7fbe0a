"""The curve of a cluster's predictions."""

import pytest
from helpers import points, render, texts

from cnnlab.plots import prediction_curve


def prediction(devices, efficiency, exposed_s=0.1, jitter_s=0.05, idle_s=0.0):
    return {
        "devices": devices,
        "efficiency": efficiency,
        "step_s": 1.0,
        "exposed_communication_s": exposed_s,
        "jitter_s": jitter_s,
        "idle_s": idle_s,
    }


def tops(ax):
    """The highest percentage of each area, the lowest area first."""
    return [area.get_paths()[0].vertices[:, 1].max() for area in ax.collections]


def test_the_curve_shows_where_a_step_goes_and_published_points(ax):
    predictions = [prediction(1, 1.0, 0, 0), prediction(100_000, 0.7), prediction(1000, 0.8)]
    prediction_curve(ax, predictions, {"DGX": {8: 0.97, 64: 0.9}})
    curve, published = ax.lines
    assert points(curve) == ([1, 1000, 100_000], pytest.approx([100, 80, 70]))
    assert points(published) == ([8, 64], pytest.approx([97, 90]))
    assert len(tops(ax)) == 5 and tops(ax)[-1] == pytest.approx(100)  # nothing is missing
    assert ax.get_xscale() == "log" and ax.get_xlim() == (1, 100_000)
    assert "DGX" in texts(ax) and "exposed communication" in texts(ax)
    render(ax)
    assert "100,000" in texts(ax)


def test_waiting_for_data_has_an_area_of_its_own(ax):
    prediction_curve(ax, [prediction(1, 0.6, 0, 0, 0.4), prediction(2, 0.5, idle_s=0.3)])
    assert tops(ax) == pytest.approx([60, 60, 65, 100, 100])


def test_a_single_prediction_can_be_drawn(ax):
    prediction_curve(ax, [prediction(4, 0.5)])
    assert points(ax.lines[0]) == ([4], [50])
    render(ax)
