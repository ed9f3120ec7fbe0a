"""The curve of throughput by batch size."""

from helpers import points, render, texts

from cnnlab.plots import batch_size_curve


def test_the_curve_shows_medians_other_machines_and_the_prediction(ax):
    measured = {16: [900, 1000, 1100], 1: [90, 100, 110]}
    batch_size_curve(ax, measured, {"published: P100": {32: 144, 64: 154}}, (16, 500))
    curve, *_, published, predicted = ax.lines
    assert points(curve) == ([1, 16], [100, 1000])
    assert points(published) == ([32, 64], [144, 154])
    assert points(predicted) == ([16], [500])
    render(ax)
    for text in ("measured here", "published: P100", "your prediction", "16"):
        assert text in texts(ax)
