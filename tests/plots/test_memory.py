"""The memory picture: the bars, the formula next to them, the unit, and the limit."""

from helpers import render, texts

from cnnlab import plots
from cnnlab.plots.memory import byte_unit

MIB = 2**20
ONE = {"parameters": 4 * MIB, "gradients": 4 * MIB, "optimizer state": 8 * MIB, "activations": MIB}
SHARDED = {part: size / 2 for part, size in ONE.items()}


def widths(ax, row):
    """The widths of the bars around a row, in the order in which they were drawn."""
    patches = [bar for bar in ax.patches if bar.get_width()]
    return [
        bar.get_width() for bar in patches if abs(bar.get_y() + bar.get_height() / 2 - row) < 0.3
    ]


def test_parts_are_stacked_in_the_same_order_and_unit_in_each_bar(ax):
    plots.memory_bars(ax, {"one rank": ONE, "fsdp": SHARDED})
    render(ax)
    assert widths(ax, 0) == [4, 4, 8, 1]
    assert widths(ax, 1) == [2, 2, 4, 0.5]
    first = [bar.get_x() for bar in ax.patches if bar.get_width()][:4]
    assert first == [0, 4, 8, 16]
    assert "MiB" in ax.get_xlabel() and "17" in texts(ax) and "8.5" in texts(ax)
    assert "formula" not in texts(ax)


def test_the_formula_is_next_to_the_measurement_of_the_same_name(ax):
    plots.memory_bars(ax, {"fsdp": SHARDED}, {"fsdp": ONE, "tensor": SHARDED})
    render(ax)
    assert widths(ax, 0) == [2, 2, 4, 0.5, 4, 4, 8, 1]
    hatched = [bar.get_width() for bar in ax.patches if bar.get_hatch() and bar.get_width()]
    assert hatched == [4, 4, 8, 1, 2, 2, 4, 0.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["fsdp", "tensor"]
    assert "formula" in texts(ax)


def test_nothing_measured_yet_draws_an_empty_picture(ax):
    plots.memory_bars(ax, {})
    render(ax)


def test_the_unit_follows_the_size():
    assert byte_unit(1000) == (1, "bytes")
    assert byte_unit(1024) == (2**10, "KiB")
    assert byte_unit(5 * 2**30) == (2**30, "GiB")
